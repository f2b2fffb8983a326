"""TensorRT engines of a bundle, checked before they are loaded, run as one `Engine`."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.base import BundleEngine, EngineError, Feeds, InvalidFeeds
from engines.layer_times import LayerTimes
from engines.targets import find_target
from engines.trt.admission import (
    admit_engine,
    admit_sidecar,
    require_gpu,
    require_tensors,
    require_version,
)
from engines.trt.buffers import Buffers
from engines.trt.device import Device, DeviceError
from engines.trt.devices import open_device
from engines.trt.failures import explain
from engines.trt.layer_log import LayerLog
from engines.trt.log import Log
from engines.trt.modules import TrtModule, load_module
from engines.trt.program_calls import RunCalls, program_calls
from engines.trt.runner import PartRunner, PartTimer, RunnerSetup, Scratch
from engines.trt.shapes import Shape, require_fillable, united
from engines.trt.sidecar import Sidecar, engine_folder, engine_path
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import Part
from qvla_export.shared.program import PartRuns

# First passes of a profile: what TensorRT puts off until a context runs.
_UNTIMED_PASSES = 5
_TO_DEVICE, _TO_HOST = "host_to_device", "device_to_host"


class TensorRtEngine(BundleEngine):
    """A bundle's engines on one GPU and stream; see `Engine`.

    Inputs are copied once, outputs of a part stay on the device for the next. Between repetitions
    an output and the input that it is carried into change memory, so that a KV cache is not copied;
    what a run starts with is. All buffers have the size of the longest prompt and are allocated at
    load. The first action of a prompt length runs the parts one by one, later ones launch what was
    captured of it: a graph per part, so that events between runs tell where the time goes. One
    action at a time; any thread may act.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path | None = None,
        open_gpu: Callable[[], Device] = open_device,
        module: TrtModule | None = None,
        max_shapes: int = 8,
    ) -> None:
        """Check and load a bundle's engines.

        Args:
            bundle: verified by `Bundle.load`.
            folder: of the engines; None for the one beside the bundle.
            open_gpu: opens the GPU, once every check that needs none has passed.
            module: TensorRT; None imports the target's.
            max_shapes: prompt lengths whose contexts and graphs are kept.

        Raises:
            EngineError: an engine is missing, was built elsewhere, for something else or by
                another version, or does not load.
        """
        require_fillable(bundle)
        folder = engine_folder(bundle) if folder is None else folder
        sidecars = {part.name: admit_sidecar(bundle, part, folder) for part in bundle.parts}
        self._module = module or load_module(find_target(bundle.target))
        for sidecar in sidecars.values():
            require_version(sidecar, self._module)
        super().__init__(bundle)
        self._layers = {name: sidecar.layers for name, sidecar in sidecars.items()}
        stated = [(*sidecar.origin.profiles, sidecar.outputs) for sidecar in sidecars.values()]
        self._ranges = united([ranges for part in stated for ranges in part])
        for run in bundle.program.runs:
            for name, source in run.start.items():
                self._ranges.setdefault(source, self._ranges[name])
        self._parts = {part.name: part for part in bundle.parts}
        profiles = {name: len(each.origin.profiles) for name, each in sidecars.items()}
        self._calls = program_calls(bundle, profiles)
        self._log = Log(self._module)
        self._stack = ExitStack()
        try:
            self._open(self._stack, open_gpu(), folder, sidecars, max_shapes)
        except BaseException:
            self.close()
            raise

    @property
    def runtime(self) -> str:
        """Module, version and GPU."""
        return f"{self._module.name} {self._module.version} {self._gpu.name}"

    @property
    def graph_failures(self) -> Mapping[str, str]:
        """Parts that run without a CUDA graph, and why."""
        found = {name: runner.graph_failure for name, runner in self._runners.items()}
        return {name: why for name, why in found.items() if why is not None}

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return the named outputs of named inputs.

        Raises:
            InvalidFeeds: an input does not fit, or is beyond what the engines were built for.
            EngineError: the engine is closed, or the GPU fails.
        """
        shapes = self._admitted_shapes(feeds)
        try:
            return self._run(feeds, shapes)
        except BaseException:
            # What was put into the stream must not run into the next action's buffers.
            with suppress(DeviceError):
                self._device.synchronize()
            raise

    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Run the parts some times under TensorRT's profiler, without graphs.

        A part that repeats is timed at its first call and counted as often as it runs.

        Raises:
            InvalidFeeds: see `infer`.
            EngineError: the engine is closed, the GPU fails, or TensorRT reports nothing.
        """
        shapes = self._admitted_shapes(feeds)
        self._buffers.reset()
        for name, value in feeds.items():
            self._buffers.upload(name, value)
        self._device.synchronize()
        timed: list[tuple[PartRuns, dict[str, Shape], list[tuple[LayerLog, PartTimer]]]] = []
        for calls in self._calls:
            run = calls.run
            shapes |= {name: shapes[source] for name, source in run.start.items()}
            moved, timers = dict(shapes), []
            for name, profile in calls.parts:
                log = LayerLog(self._module, name, self._layers[name])
                inputs = _of(self._parts[name], shapes)
                timer = self._runners[name].open_timer(inputs, profile, log.profiler)
                timers.append((log, timer))
                shapes |= timer.outputs
            timed.append((run, moved, timers))
        for _ in range(passes + _UNTIMED_PASSES):
            for run, moved, timers in timed:
                self._fill(run.start, moved)
                for log, timer in timers:
                    log.begin_pass()
                    timer.run()
        rows = [log.rows(_UNTIMED_PASSES, run.times) for run, _, ts in timed for log, _ in ts]
        return LayerTimes(self.runtime, tuple(row for each in rows for row in each))

    def close(self) -> None:
        """Free graphs, contexts, buffers and the GPU; `infer` fails afterwards."""
        self._is_open = False
        self._stack.close()

    def _run(self, feeds: Feeds, shapes: dict[str, Shape]) -> dict[str, NDArray[Any]]:
        device, runs = self._device, self._bundle.program.runs
        self._buffers.reset()
        device.record(self._events[0])
        for name, value in feeds.items():
            self._buffers.upload(name, value)
        device.record(self._events[1])
        for calls, event in zip(self._calls, self._events[2:], strict=False):
            self._enqueue(calls, shapes)
            device.record(event)
        views = {s.name: self._buffers.download(s.name, shapes[s.name]) for s in self.outputs}
        device.record(self._events[-1])
        device.synchronize()
        names = (_TO_DEVICE, *(run.name for run in runs), _TO_HOST)
        pairs = zip(names, self._events[:-1], self._events[1:], strict=True)
        self._part_ms = {name: device.elapsed_ms(start, end) for name, start, end in pairs}
        self._part_calls = {run.name: run.times * len(run.parts) for run in runs}
        # Copies, since the next action overwrites the pinned memory.
        results = {name: view.copy() for name, view in views.items()}
        for runner in self._runners.values():
            runner.capture()
        return results

    def _enqueue(self, calls: RunCalls, shapes: dict[str, Shape]) -> None:
        """Put all repetitions of a run into the stream; add the shapes of what they put out."""
        self._fill(calls.run.start, shapes)
        for repetition in range(calls.run.times):
            if repetition:
                self._carry(calls, shapes)
            for name, profile in calls.parts:
                inputs = _of(self._parts[name], shapes)
                shapes |= self._runners[name].enqueue(inputs, profile)

    def _carry(self, calls: RunCalls, shapes: dict[str, Shape]) -> None:
        self._fill({name: output for output, name in calls.copied.items()}, shapes)
        for output, name in calls.exchanged.items():
            shapes[name] = shapes[output]
            self._buffers.exchange(output, name, shapes[output])

    def _fill(self, sources: Mapping[str, str], shapes: dict[str, Shape]) -> None:
        """Copy into inputs, by name, what they are from now on."""
        for name, source in sources.items():
            shapes[name] = shapes[source]
            self._buffers.move(source, name, shapes[source])

    def _open(
        self,
        stack: ExitStack,
        device: Device,
        folder: Path,
        sidecars: Mapping[str, Sidecar],
        max_shapes: int,
    ) -> None:
        """Load the engines and allocate; what `stack` holds is freed in reverse order."""
        stack.callback(device.close)
        self._device, self._gpu = device, device.gpu
        for sidecar in sidecars.values():
            require_gpu(sidecar, device.gpu)
        self._runners: dict[str, PartRunner] = {}
        engines: dict[str, Any] = {}
        # Their memory must go before the GPU is left.
        stack.callback(self._runners.clear)
        stack.callback(engines.clear)
        runtime = self._module.api.Runtime(self._log.logger)
        parts = self._bundle.parts
        for part in parts:
            engines[part.name] = self._load(runtime, part, folder, sidecars[part.name])
        of_parts = [spec for part in parts for spec in (*part.inputs, *part.outputs)]
        tensors = [*self.inputs, *of_parts]
        at_host = (*self.inputs, *self.outputs)
        self._buffers = Buffers(device, tensors, at_host, self._ranges)
        stack.callback(self._buffers.free)
        nbytes = max(int(engine.device_memory_size_v2) for engine in engines.values())
        scratch = Scratch(device.allocate(nbytes), nbytes)
        stack.callback(device.free, scratch.address)
        setup = RunnerSetup(self._module, self._log, device, self._buffers, scratch, max_shapes)
        # Before the first run, between any two, and around the copies.
        self._events = [device.event() for _ in range(len(self._bundle.program.runs) + 3)]
        contexts = Counter(n for each in self._calls for n, _ in each.parts * each.sides)
        for part in parts:
            names = [spec.name for spec in (*part.inputs, *part.outputs)]
            runner = PartRunner(part.name, engines[part.name], names, setup, contexts[part.name])
            stack.callback(runner.close)
            self._runners[part.name] = runner

    def _load(self, runtime: Any, part: Part, folder: Path, sidecar: Sidecar) -> Any:
        path = engine_path(folder, part.name)
        data = admit_engine(path, sidecar)
        with self._log.native_errors():
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(explain(f"{path} does not load", self._log.messages))
        require_tensors(part, engine, self._module.api, path)
        return engine

    def _admitted_shapes(self, feeds: Feeds) -> dict[str, Shape]:
        """Return the inputs' shapes, which the engines were built for."""
        self._admit(feeds)
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        for name, shape in shapes.items():
            built = self._ranges[name]
            if not built.admits(shape):
                raise InvalidFeeds(
                    f"input {name!r} has shape {list(shape)}, the engines were built for "
                    f"{list(built.min)} to {list(built.max)}; build them for longer or shorter "
                    "prompts: qvla build BUNDLE --prompt-max, --prompt-min"
                )
        return shapes


def _of(part: Part, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of a part's inputs."""
    return {spec.name: shapes[spec.name] for spec in part.inputs}
