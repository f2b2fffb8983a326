"""What a GPU does: a policy's steps and actions beside the CPU; products by the kernel and others.

The products are those of a 7B language model, the kernel for a width per channel beside cuBLAS and
torch's own int8 and int4; all of it takes minutes.
"""

import html
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.pipeline.policy_source import open_checkpoint
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import versions, write_bytes, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.tables.html_table import html_table

if TYPE_CHECKING:
    import torch

    from engines.bench.kernel_times import ProductTime
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.moments import Moments
    from qvla_export.shared.bundle import Bundle
    from qvla_export.shared.observation import Observation

_COUNT, _SIDE, _BITS = 4, 224, 4
_STEPS = ("sensitivities", "sensitivities, weights read part by part", "moments", "rounding")
_ENGINE = "engine of the target"
# Engines that walk a bundle's graphs in torch, loaded beforehand.
_ACTIONS = ("action in torch, float", "action in torch, 4 bits")


@dataclass(frozen=True)
class GpuStep:
    """One piece of work, on the GPU and on the CPU."""

    name: str
    gpu_s: float
    cpu_s: float
    # Largest difference of the results, as a share of the largest number on the CPU.
    difference: float


@dataclass(frozen=True)
class GpuBench:
    """What was measured, on which machine."""

    # Device, policy, versions.
    machine: Mapping[str, Any]
    steps: tuple[GpuStep, ...]
    # Of every layer, number of rows and contestant.
    products: "tuple[ProductTime, ...]"

    def lines(self) -> Iterator[str]:
        """Yield a line for each step and product."""
        for step in self.steps:
            yield (
                f"{step.name}: {step.gpu_s:.3g} s, CPU {step.cpu_s:.3g} s, largest difference "
                f"{step.difference:.2e}"
            )
        yield from map(str, self.products)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        steps = [asdict(step) for step in self.steps]
        products = [product.to_json() for product in self.products]
        return {**self.machine, "steps": steps, "products": products}

    def page(self) -> str:
        """Return one HTML page without any outside resource."""
        rows = [
            (step.name, f"{step.gpu_s:.3g}", f"{step.cpu_s:.3g}", f"{step.difference:.2e}")
            for step in self.steps
        ]
        facts = {name: str(value) for name, value in self.machine.items()}
        heads = ("step", "device, s", "CPU, s", "largest difference")
        title = f"qvla bench gpu: {self.machine['device']}"
        table = html_table(title, heads, rows, facts)
        found = [
            (
                p.layer,
                str(p.rows),
                p.contestant,
                p.reason or f"{p.ms:.3g}",
                f"{p.difference or 0:.1e}",
            )
            for p in self.products
        ]
        columns = ("layer", "rows", "by", "ms, or why not", "largest difference")
        table += html_table("products", columns, found, {})
        return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>{table}\n'


def require_gpu() -> "torch.device":
    """Return this machine's GPU.

    Raises:
        QvlaError: torch or ONNX Runtime cannot use one; the message says which and what to do.
    """
    import onnxruntime
    import torch

    if not torch.cuda.is_available():
        raise QvlaError(
            f"qvla bench gpu needs an NVIDIA GPU that torch sees; torch {torch.__version__} sees "
            "none: look with nvidia-smi, and install a torch built for CUDA"
        )
    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise QvlaError(
            f"qvla bench gpu needs ONNX Runtime with CUDA, {onnxruntime.__version__} has only "
            f"{providers}: pip uninstall onnxruntime, then pip install 'qvla[gpu]'"
        )
    return torch.device("cuda", 0)


def bench_gpu(
    checkpoint: Path,
    output: Path,
    device: "torch.device",
    target: str = "cuda",
    layers: Mapping[str, tuple[int, int]] | None = None,
    on_progress: OnProgress = ignore,
) -> GpuBench:
    """Do each step on a device and on the CPU; write JSON, and a page beside it.

    Args:
        checkpoint: of a small policy: it is run on the CPU as well.
        output: JSON file; the page has its name with `.html`.
        device: where to compute; the CPU itself in tests.
        target: whose engine is run.
        layers: name -> channels and inputs of products to time; None for a 7B model's.
        on_progress: hears of every step.

    Raises:
        QvlaError: the checkpoint cannot be opened, or an engine refuses the graph.
    """
    import torch

    from engines.bench.kernel_times import LAYERS_7B, product_times
    from jetson.clients.load import random_observations
    from jetson.serving.policy_contract import contract_of

    cpu = torch.device("cpu")
    policy = open_checkpoint(checkpoint)
    observations = (random_observations(contract_of(policy), _SIDE, seed=0))[:_COUNT]
    hear, steps = bar(on_progress, "gpu: steps"), []
    with tempfile.TemporaryDirectory() as folder:
        work = _work(checkpoint, observations, target, Path(folder))
        for number, (name, step) in enumerate(work.items()):
            step(device)  # kernels are chosen, and memory is taken, the first time
            found, gpu_s = _timed(step, device)
            expected, cpu_s = _timed(step, cpu)
            steps.append(GpuStep(name, gpu_s, cpu_s, _difference(found, expected)))
            hear(number + 1, len(work) + 1)
        products = tuple(product_times(device, LAYERS_7B if layers is None else layers))
        hear(len(work) + 1, len(work) + 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = {"device": name, "target": target, "policy": policy.digest, "versions": versions()}
    bench = GpuBench(machine, tuple(steps), products)
    write_json(output, bench.to_json())
    write_bytes(output.with_suffix(".html"), bench.page().encode())
    return bench


_Step = Callable[["torch.device"], NDArray[Any]]


def _work(
    checkpoint: Path, observations: "Sequence[Observation]", target: str, folder: Path
) -> dict[str, _Step]:
    """Return what is done, by name: device -> the numbers that came out."""
    import torch

    from engines.targets import find_target
    from qvla_export.measurement.distributed import Alone
    from qvla_export.measurement.measure_moments import measure_moments
    from qvla_export.measurement.moment_bounds import MomentSettings
    from qvla_export.measurement.weight_placement import WeightPlacement
    from qvla_export.quantizer.quantize import spec_for
    from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order

    stored = open_checkpoint(checkpoint, resident=False)
    settings = FirstOrder(spec_for(find_target("cpu")), probes=2, batch_size=2)
    moment_settings = MomentSettings(probes=2, batch_size=2)

    def on(device: "torch.device") -> "Policy":
        return WeightPlacement.on(device).resident(stored)

    def sensitivities(policy: "Policy", device: "torch.device") -> NDArray[Any]:
        world = Alone(device)
        found = measure_first_order(policy, observations, "bench", settings, world=world)
        return np.concatenate([values.ravel() for values in found.values.values()])

    def moments(device: "torch.device") -> "Moments":
        world = Alone(device)
        return measure_moments(on(device), observations, "bench", moment_settings, world=world)

    measured = moments(torch.device("cpu"))

    def flat(device: "torch.device") -> NDArray[Any]:
        return np.concatenate([m.inputs.ravel() for m in moments(device).layers.values()])

    steps: tuple[_Step, ...] = (
        lambda device: sensitivities(on(device), device),
        lambda device: sensitivities(stored, device),
        flat,
        lambda device: _rounded(stored, measured, device),
    )
    bundles = _bundles(stored, observations, target, folder)
    found = {**dict(zip(_STEPS, steps, strict=True)), _ENGINE: _engine_step(bundles[0])}
    actions = (_torch_step(bundle) for bundle in bundles)
    return {**found, **dict(zip(_ACTIONS, actions, strict=True))}


def _rounded(policy: "Policy", moments: "Moments", device: "torch.device") -> NDArray[Any]:
    """Return compensated weights of the last quantizable layer."""
    from engines.targets import find_target
    from qvla_export.measurement.torch_arrays import elimination_on
    from qvla_export.policies.layers import traced_layers
    from qvla_export.quantizer.compensation import rounded_alone
    from qvla_export.quantizer.quantize import as_rows, spec_for

    name = list(traced_layers(policy))[-1]
    rows = as_rows(policy.read_weight(f"{name}.weight"))
    spec = replace(spec_for(find_target("cpu")), compensation="inputs and channels")
    (weights,) = rounded_alone(rows, [_BITS], spec, moments.layers[name], elimination_on(device))
    return weights


def _bundles(
    policy: "Policy", observations: "Sequence[Observation]", target: str, folder: Path
) -> "tuple[Bundle, Bundle]":
    """Export a float bundle, and one of 4 bits without any rounding but to the nearest."""
    from engines.targets import find_target
    from qvla_export.graph.export import export_bundle
    from qvla_export.policies.layers import layer_shapes
    from qvla_export.quantizer.uniform_plan import uniform_plan

    whole, device = policy.in_memory(), find_target(target)
    plan = uniform_plan(layer_shapes(whole.layers()), _BITS, device, whole.digest)
    plain = export_bundle(whole, None, device, observations, folder / "float")
    return plain, export_bundle(whole, plan, device, observations, folder / "quantized")


def _engine_step(bundle: "Bundle") -> _Step:
    """Return what gives a bundle's actions by the target's runtime, or on a CPU."""
    from engines.load import load_engine
    from engines.verify import run_engine

    def actions(device: "torch.device") -> NDArray[Any]:
        with load_engine(bundle, runtime=None if device.type == "cuda" else "ort") as engine:
            return run_engine(engine, bundle.golden().feeds)

    return actions


def _torch_step(bundle: "Bundle") -> _Step:
    """Return what gives a bundle's first action in torch; the first time it loads an engine."""
    from engines.torch.torch_engine import TorchEngine
    from engines.verify import run_engine

    engines: dict[str, TorchEngine] = {}

    def actions(device: "torch.device") -> NDArray[Any]:
        if device.type not in engines:
            engines[device.type] = TorchEngine(bundle, device.type)
        return run_engine(engines[device.type], bundle.golden().feeds[:1])

    return actions


def _timed(step: _Step, device: "torch.device") -> tuple[NDArray[Any], float]:
    start_s = time.perf_counter()
    found = step(device)
    return found, time.perf_counter() - start_s


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale
