"""Everything that is timed: one callable each, with its bytes and its multiplications."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from engines.bench.contender import Contender, Run, stored_size
from engines.bench.decoder import INPUT, DecoderStack, measure_ranges, trace_decoder
from engines.bench.mixes import MIXES, Mix
from engines.bench.modelopt import ModeloptEnvironment
from engines.bench.openvino_contenders import OpenVinoBench
from engines.bench.torchao_contender import run_torch, torchao_contenders
from engines.ort import keep_integers_exact, ort_options
from engines.targets import CPU
from qvla_export.graph.external_data import ExternalData
from qvla_export.graph.graph_figures import measure_graph
from qvla_export.graph.lowering import lower
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.plan import BitPlan

BASELINE, DYNAMIC = "ORT FP32", "ORT dynamic INT8"
_LOGGER = logging.getLogger(__name__)
# ONNX Runtime 1.32 otherwise refuses modelopt's signed activations behind a Reshape.
_SIGNED_CODES_BUG = ("QDQS8ToU8Transformer",)


def prepare(
    stack: DecoderStack, folder: Path, threads: int, modelopt: ModeloptEnvironment | None
) -> list[Contender]:
    """Build every contender; graphs go to the folder.

    Args:
        stack: the float network.
        folder: where graphs may be written.
        threads: of one operator.
        modelopt: environment that has it; None leaves its two contenders out.
    """
    float_path, graph = folder / "float.onnx", trace_decoder(stack, CPU)
    _save(lower(graph, None, CPU)[0], float_path)
    every = sum(channels * inputs for channels, inputs in stack.shapes.values())
    parameters = 4 * sum(p.numel() for p in stack.parameters())
    found = [
        Contender(
            BASELINE,
            _session(float_path, threads),
            stored_size(float_path),
            4 * every,
            every,
            "float32",
        ),
        Contender("torch eager FP32", run_torch(stack), parameters, 4 * every, every, "float32"),
        _dynamic(float_path, threads, every),
        *torchao_contenders(stack),
    ]
    sample = stack.example(stack.geometry.tokens)
    if modelopt is not None:
        found += _modelopt(modelopt, float_path, sample, threads, every)
    ranges = measure_ranges(stack, sample)
    paths: dict[str, tuple[Path, int]] = {}
    for mix in MIXES:
        found.append(_ours(stack, graph, mix, ranges, folder, threads, paths))
    if OpenVinoBench.is_installed():
        openvino = OpenVinoBench(folder, threads, every)
        found += openvino.own(float_path, sample)
        made = {c.name: c for c in found}
        rounded = {
            mix.name: (paths[mix.plan(stack.shapes, CPU, ranges).digest][0], made[mix.name])
            for mix in MIXES
            if mix.rounds_inputs
        }
        found += openvino.ours(rounded)
    return found


def _ours(
    stack: DecoderStack,
    graph: ir.Model,
    mix: Mix,
    ranges: ActivationRanges,
    folder: Path,
    threads: int,
    made: dict[str, tuple[Path, int]],
) -> Contender:
    """Lower one mix; mixes that differ in session options only share a graph."""
    plan: BitPlan = mix.plan(stack.shapes, CPU, ranges)
    if plan.digest not in made:
        path = folder / f"plan_{len(made)}.onnx"
        model, _ = lower(graph, plan, CPU)
        figures = measure_graph(model, plan)
        _save(model, path)
        made[plan.digest] = (path, figures.multiplications - figures.multiplications_removed)
    path, left = made[plan.digest]
    run = _session(path, threads, mix.accuracy_level, mix.unpacked, mix.rounds_inputs)
    stored = stored_size(path)
    # Unpacked codes are float32 in memory, expanded ones int8.
    read = 4 * left if mix.unpacked else left if mix.rounds_inputs else stored
    integer = mix.rounds_inputs or mix.accuracy_level > 0
    return Contender(mix.name, run, stored, read, left, "int8" if integer else "float32")


def _dynamic(float_path: Path, threads: int, every: int) -> Contender:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = float_path.with_name("dynamic.onnx")
    with _quiet_root_logger():
        quantize_dynamic(
            float_path,
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    run = _session(path, threads, rounds_inputs=True)
    return Contender(DYNAMIC, run, stored_size(path), every, every, "int8")


def _modelopt(
    environment: ModeloptEnvironment,
    float_path: Path,
    sample: NDArray[np.float32],
    threads: int,
    every: int,
) -> list[Contender]:
    found = []
    for mode, method, level, bits in (("int8", "max", 0, 8), ("int4", "rtn_dq", 4, 4)):
        path = float_path.with_name(f"modelopt_{mode}.onnx")
        environment.quantize(float_path, path, mode, method, sample)
        disabled = _SIGNED_CODES_BUG if mode == "int8" else ()
        run = _session(path, threads, level, disabled=disabled)
        read = every * bits // 8
        found.append(
            Contender(f"modelopt {mode.upper()}", run, stored_size(path), read, every, "int8")
        )
    return found


def _session(
    path: Path,
    threads: int,
    level: int = 0,
    unpacked: bool = False,
    rounds_inputs: bool = False,
    disabled: tuple[str, ...] = (),
) -> Run:
    options = ort_options(level, threads, "unpacked" if unpacked else "packed")
    if rounds_inputs:
        keep_integers_exact(options)
    session: Any = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    _LOGGER.info("loaded %s", path.name)

    def run(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = session.run(None, {INPUT: hidden})[0]
        return output

    return run


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep ONNX Runtime's quantizer from telling the root logger about every node."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _save(model: ir.Model, path: Path) -> None:
    with ExternalData(path) as data:
        data.save(model)
