"""The module `tensorrt` as it is on a Jetson: the builder of `tensorrt_rtx` behind the names that
TensorRT 10.3's Python API has, and no others. Anything newer is an AttributeError."""

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import tensorrt_rtx as rtx

_CONFIG = {
    "add_optimization_profile",
    "builder_optimization_level",
    "clear_flag",
    "create_timing_cache",
    "get_timing_cache",
    "profiling_verbosity",
    "progress_monitor",
    "set_flag",
    "set_memory_pool_limit",
    "set_timing_cache",
}
_SHARED = (
    "ILogger",
    "IProgressMonitor",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ProfilingVerbosity",
)


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Config:
    def __init__(self, real: Any) -> None:
        real.num_compute_capabilities = 1
        real.set_compute_capability(rtx.ComputeCapability.SM89, 0)
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_cache", None)

    def __getattr__(self, name: str) -> Any:
        if name not in _CONFIG:
            raise AttributeError(f"TensorRT 10.3 has no IBuilderConfig.{name}")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CONFIG:
            raise AttributeError(f"TensorRT 10.3 has no IBuilderConfig.{name}")
        setattr(self._real, name, value)

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        object.__setattr__(self, "_cache", cache)
        return not cache.data.startswith(b"foreign")

    def get_timing_cache(self) -> TimingCache:
        return self._cache


class Builder:
    """Times every kernel once: the first build with a cache adds to it, later ones do not."""

    def __init__(self, logger: Any) -> None:
        self._real = rtx.Builder(logger)

    def create_network(self, flags: int) -> Any:
        typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags & typed, "10.x builds weakly typed networks without the flag"
        return self._real.create_network(flags)

    def create_builder_config(self) -> Config:
        return Config(self._real.create_builder_config())

    def create_optimization_profile(self) -> Any:
        return self._real.create_optimization_profile()

    def build_serialized_network(self, network: Any, config: Config) -> Any:
        key = network.get_output(0).name.encode() + b";"
        cache = config.get_timing_cache()
        if cache is not None and key not in cache.data:
            cache.data += key
        return self._real.build_serialized_network(network, config._real)


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, data: Any) -> Any:
        layers = json.dumps({"Layers": [{"Name": "fused", "LayerType": "kgen"}]})
        inspector = SimpleNamespace(get_engine_information=lambda kind: layers)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)


def tensorrt(version: str = "10.13.3.9") -> ModuleType:
    """Return the module; put it into sys.modules."""
    module = ModuleType("tensorrt")
    flags = SimpleNamespace(TF32=rtx.BuilderFlag.TF32)
    shared = {name: getattr(rtx, name) for name in _SHARED}
    own = {"Builder": Builder, "Runtime": Runtime, "BuilderFlag": flags, "__version__": version}
    vars(module).update(shared | own)
    return module
