"""torchao's own 8 bits of the stack, rows rounded in every run, where torchao is installed."""

import copy
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bench.contender import Contender, Run
from engines.bench.decoder import DecoderStack
from engines.ort import cpu_description, saturates

TORCHAO = "torchao dynamic INT8, eager"


def torchao_contenders(stack: DecoderStack) -> list[Contender]:
    """Return torchao's int8 layers in eager torch; nothing where it is not installed."""
    if find_spec("torchao") is None:
        return []
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(stack)
    # Smaller codes where sums of products would overflow.
    reduce = saturates(cpu_description())
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig(reduce_range=reduce))
    every = sum(channels * inputs for channels, inputs in stack.shapes.values())
    scales = sum(channels for channels, _ in stack.shapes.values())
    rest = sum(parameter.numel() for parameter in stack.parameters()) - every
    nbytes = every + 4 * (scales + rest)
    return [Contender(TORCHAO, run_torch(quantized), nbytes, every, every, "int8")]


def run_torch(stack: DecoderStack) -> Run:
    """Return a call of a stack in eager torch."""

    def run(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: NDArray[np.float32] = stack(torch.from_numpy(hidden)).numpy()
            return output

    return run
