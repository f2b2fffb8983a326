"""torchao's own 8 and 4 bits of the stack, in eager torch, where torchao is installed."""

import copy
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bench.contender import Contender, Run
from engines.bench.decoder import DecoderStack
from engines.ort import cpu_description, saturates

TORCHAO, TORCHAO_INT4 = "torchao dynamic INT8, eager", "torchao INT4, bfloat16, eager"
_GROUP = 64


def torchao_contenders(stack: DecoderStack) -> list[Contender]:
    """Return torchao's layers in eager torch; nothing where it is not installed."""
    if find_spec("torchao") is None:
        return []
    return [_eight_bits(stack), _four_bits(stack)]


def _eight_bits(stack: DecoderStack) -> Contender:
    """Round rows in every run."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(stack)
    # Smaller codes where sums of products would overflow.
    reduce = saturates(cpu_description())
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig(reduce_range=reduce))
    every, scales, rest = _counts(stack)
    nbytes = every + 4 * (scales + rest)
    return Contender(TORCHAO, run_torch(quantized), nbytes, every, every, "int8")


def _four_bits(stack: DecoderStack) -> Contender:
    """Round weights alone; in float32 torch 2.13 has no fast product for them."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantized = copy.deepcopy(stack).bfloat16()
    config = PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)
    quantize_(quantized, config)
    every, _, rest = _counts(stack)
    # Beside codes a scale and a zero of each group.
    nbytes = every // 2 + 4 * (every // _GROUP) + 2 * rest
    run = run_torch(quantized, torch.bfloat16)
    return Contender(TORCHAO_INT4, run, nbytes, every // 2, every, "float32")


def _counts(stack: DecoderStack) -> tuple[int, int, int]:
    """Return weights and channels of the quantizable layers, and the other parameters."""
    every = sum(channels * inputs for channels, inputs in stack.shapes.values())
    channels = sum(channels for channels, _ in stack.shapes.values())
    return every, channels, sum(parameter.numel() for parameter in stack.parameters()) - every


def run_torch(stack: DecoderStack, dtype: torch.dtype = torch.float32) -> Run:
    """Return a call of a stack in eager torch, in a type of rows."""

    def run(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: NDArray[np.float32] = stack(torch.from_numpy(hidden).to(dtype)).float().numpy()
            return output

    return run
