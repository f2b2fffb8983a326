"""Build a bundle's engines part by part; what is up to date is kept."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.targets import find_target
from engines.trt.failures import explain, explain_kill
from engines.trt.gpu import Gpu, find_gpu, read_power_mode
from engines.trt.log import Log
from engines.trt.modules import BuildError, TrtModule, load_module, require_device
from engines.trt.network import Network, parse_part, part_inputs, part_outputs
from engines.trt.progress import Progress
from engines.trt.seal import UnsealedEngine
from engines.trt.shapes import PromptRange, ShapeRange, input_ranges, require_fillable, united
from engines.trt.sidecar import Origin, Sidecar, engine_path, sidecar_path
from engines.trt.timing_cache import TimingCache
from qvla_export.shared.artifacts import read_json, sha256_file, write_bytes, write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.part import Part
from qvla_export.shared.target import Target

_LOGGER = logging.getLogger(__name__)
# Called with (part, phase, steps done, steps in all).
OnProgress = Callable[[str, str, int, int], None]
# Input name -> shapes, of each profile that a part's engine has or gets; the first may hold more.
_Profiles = tuple[dict[str, ShapeRange], ...]


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built."""

    prompt: PromptRange = field(default_factory=PromptRange)
    # Device memory the builder may use as scratch.
    workspace_bytes: int = 4 << 30
    # 0 to 5; more searches longer for faster kernels.
    level: int = 3
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise BuildError(f"the builder's level must be 0 to 5, got {self.level}")
        if self.workspace_bytes < 1 << 20:
            raise BuildError(
                f"the workspace must be at least 1 MB, got {self.workspace_bytes} bytes"
            )


@dataclass(frozen=True)
class _Job:
    """What all parts of one build share."""

    bundle: Bundle
    target: Target
    module: TrtModule
    gpu: Gpu | None
    folder: Path
    settings: BuildSettings
    on_progress: OnProgress | None


def build_engines(
    bundle: Bundle,
    folder: Path,
    settings: BuildSettings | None = None,
    on_progress: OnProgress | None = None,
    find: Callable[[], Gpu | None] = find_gpu,
) -> tuple[Sidecar, ...]:
    """Build the engine of every part; parts whose engine is up to date are kept.

    One part's weights and engine are in memory at a time. Each part is `<part>.engine` and
    `<part>.json`, written whole; after an interruption the next call goes on.

    Args:
        bundle: verified by `Bundle.load`, for a target of TensorRT or TensorRT for RTX.
        folder: where engines go.
        settings: shapes and effort.
        on_progress: hears of every phase of every part.
        find: returns the GPU of this machine.

    Raises:
        BuildError: module or device are missing, or a part cannot be parsed or built.
        TimingCacheError: the timing cache is not for this build.
    """
    settings = settings or BuildSettings()
    require_fillable(bundle)
    target = find_target(bundle.target)
    module = load_module(target)
    gpu = find()
    require_device(target, module, gpu)
    if settings.timing_cache is not None:
        TimingCache.open(settings.timing_cache, module, gpu).read()
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(bundle, target, module, gpu, folder, settings, on_progress)
    known = input_ranges(bundle.inputs, settings.prompt)
    parts, built = {part.name: part for part in bundle.parts}, {}
    exact = _exact_profiles(job, known)
    for run in bundle.program.runs:
        known |= {name: known[source] for name, source in run.start.items()}
        for name in run.parts:
            if name in built:
                continue
            profiles = tuple(exact.get(name, (known,)))
            kept = _load_current(job, parts[name], profiles)
            built[name] = kept or _build_part(job, parts[name], profiles)
            known |= built[name].outputs
    return tuple(built[name] for name in parts)


def _exact_profiles(
    job: _Job, known: Mapping[str, ShapeRange]
) -> dict[str, list[dict[str, ShapeRange]]]:
    """Return the input shapes of every part in each run that calls it, where several call one.

    They depend on what the runs before put out, so all graphs are parsed, one at a time. A graph
    of fixed shapes is given the same ones in each, and its engine has no profile but the first. Of
    other programs nothing is returned: what a part is given is known once those before it are
    built.
    """
    runs, parts = job.bundle.program.runs, {part.name: part for part in job.bundle.parts}
    called = Counter(name for run in runs for name in run.parts)
    found: dict[str, list[dict[str, ShapeRange]]] = {}
    if not any(times > 1 for times in called.values()):
        return {}
    ranges = dict(known)
    for run in runs:
        ranges |= {name: ranges[source] for name, source in run.start.items()}
        for name in run.parts:
            model = job.bundle.model_path(parts[name])
            network = parse_part(job.module, model, job.target, Log(job.module))
            inputs = part_inputs(network, ranges, model)
            if network.dynamic or name not in found:
                found.setdefault(name, []).append(inputs)
            ranges |= part_outputs(network, inputs)
    return found


def _origin(job: _Job, part: Part, profiles: _Profiles) -> Origin:
    files = job.bundle.manifest["files"]
    weights = files.get(f"{part.model}.data", {"sha256": ""})
    timed = not job.module.traits.ahead_of_time and job.gpu is not None
    return Origin(
        target=job.target.name,
        part=part.name,
        bundle_digest=job.bundle.digest,
        model_sha256=files[part.model]["sha256"],
        weights_sha256=weights["sha256"],
        module=job.module.name,
        module_version=job.module.version,
        compute_capability=job.target.compute_capability,
        gpu=job.gpu.name if timed and job.gpu is not None else None,
        level=job.settings.level,
        workspace_bytes=job.settings.workspace_bytes,
        inputs=profiles[0],
        later=profiles[1:],
    )


def _load_current(job: _Job, part: Part, known: _Profiles) -> Sidecar | None:
    """Return what an earlier build of this very engine left behind; None if it must be built."""
    try:
        found = Sidecar.load(sidecar_path(job.folder, part.name))
    except (ArtifactError, UnsealedEngine):
        return None
    inputs = {name: known[0][name] for name in found.origin.inputs if name in known[0]}
    path = engine_path(job.folder, part.name)
    current = (
        found.origin == _origin(job, part, (inputs, *known[1:]))
        and path.is_file()
        and sha256_file(path) == found.engine_sha256
    )
    return found if current else None


def _build_part(job: _Job, part: Part, known: _Profiles) -> Sidecar:
    log, model = Log(job.module), job.bundle.model_path(part)
    with _Marker(job.folder, part.name):
        network = parse_part(job.module, model, job.target, log)
        profiles = (part_inputs(network, known[0], model), *known[1:])
        outputs = united([part_outputs(network, profile) for profile in profiles])
        config, cache = _configure(job, network, profiles)
        engine = _serialize(job, part, network, config, log)
    digest = hashlib.sha256(engine).hexdigest()
    layers, missing = _layers(job, engine)
    sidecar = Sidecar(
        origin=_origin(job, part, profiles),
        outputs=outputs,
        engine_sha256=digest,
        engine_bytes=engine.nbytes,
        weights_bytes=log.weights_bytes,
        power_mode=read_power_mode(),
        timing_cache_sha256=None if cache is None else cache.keep(config),
        layers=layers,
        layers_missing=missing,
    )
    # The sidecar comes last: it vouches for an engine that is wholly there.
    write_bytes(engine_path(job.folder, part.name), engine)
    sidecar.save(sidecar_path(job.folder, part.name))
    _LOGGER.debug("engine of %s: %d bytes, %s", part.name, engine.nbytes, log.weights_bytes)
    return sidecar


def _configure(
    job: _Job, network: Network, profiles: Sequence[Mapping[str, ShapeRange]]
) -> tuple[Any, TimingCache | None]:
    api, settings = job.module.api, job.settings
    config = network.builder.create_builder_config()
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.level
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    # On by default: it would round what the bundle leaves in float32 to 10 bits.
    config.clear_flag(api.BuilderFlag.TF32)
    if job.module.traits.ahead_of_time:
        capability = str(job.target.compute_capability).replace("sm_", "SM")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(api.ComputeCapability, capability), 0)
    for inputs in profiles if network.dynamic else ():
        profile = network.builder.create_optimization_profile()
        for name, shapes in inputs.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(profile)
    cache = None
    if settings.timing_cache is not None:
        cache = TimingCache.open(settings.timing_cache, job.module, job.gpu)
        cache.attach(config)
    return config, cache


def _serialize(job: _Job, part: Part, network: Network, config: Any, log: Log) -> memoryview:
    def on_phase(phase: str, done: int, steps: int) -> None:
        if job.on_progress is not None:
            job.on_progress(part.name, phase, done, steps)

    progress = Progress(job.module.api, on_phase)
    progress.attach(config)
    with log.native_errors():
        engine = network.builder.build_serialized_network(network.definition, config)
    progress.require_uninterrupted()
    if engine is None:
        what = f"building part {part.name!r} for target {job.target.name!r} failed"
        raise BuildError(explain(what, log.messages))
    return memoryview(engine)


def _layers(job: _Job, engine: memoryview) -> tuple[list[Any] | None, str | None]:
    """Layers after fusion by the inspector's account, or why there is none."""
    if job.gpu is None:
        return None, "no GPU: the inspector needs a deserialized engine"
    log, api = Log(job.module), job.module.api
    loaded = api.Runtime(log.logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return None, explain("the new engine does not load on this GPU", log.messages)
    inspector = loaded.create_engine_inspector()
    text = inspector.get_engine_information(api.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers")
    return (layers, None) if layers else (None, "the inspector lists no layers")


class _Marker:
    """A file that is there while a part is built, and after a build that was killed."""

    def __init__(self, folder: Path, part: str) -> None:
        self._path, self._part = folder / f".{part}.building", part

    def __enter__(self) -> None:
        if self._path.is_file() and not _is_alive(self._path):
            _LOGGER.warning("%s", explain_kill(self._part))
        write_json(self._path, {"pid": os.getpid()})

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)


def _is_alive(marker: Path) -> bool:
    try:
        os.kill(int(read_json(marker, "build marker")["pid"]), 0)
    except (ArtifactError, KeyError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
