"""The timing cache: measured kernel times, so that the next build makes the same choices.

It holds for one module, version and GPU only, and a changed one silently changes the engine. So a
sealed file beside it pins what it is for and its SHA-256; anything else is refused.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.base import EngineError
from engines.trt.gpu import Gpu
from engines.trt.modules import BuildError, TrtModule
from engines.trt.seal import read_sealed, write_sealed
from qvla_export.shared.artifacts import write_bytes

_FORMAT = "qvla-timing-cache-1"


class TimingCacheError(EngineError):
    """A timing cache is not what its pin says, or is for another device or version."""


@dataclass(frozen=True)
class TimingCache:
    """A cache file for one module, version and GPU."""

    path: Path
    key: dict[str, str]

    @staticmethod
    def open(path: Path, module: TrtModule, gpu: Gpu | None) -> "TimingCache":
        """Return the cache at a path, which need not exist yet.

        Raises:
            BuildError: the module has no timing cache.
        """
        if not module.traits.timing_cache or gpu is None:
            raise BuildError(
                f"{module.name} builds without timing kernels, so there is no timing cache to "
                "keep; leave --timing-cache out (its builds are reproducible as they are)"
            )
        device = f"{gpu.name}, {gpu.compute_capability}"
        key = {"module": module.name, "version": module.version, "device": device}
        return TimingCache(path, key)

    @property
    def pin(self) -> Path:
        """Path of the sealed file that says what the cache is."""
        return self.path.with_name(f"{self.path.name}.json")

    def read(self) -> bytes:
        """Return the cache's bytes; empty if there is none yet.

        Raises:
            TimingCacheError: it was changed, or is for another module, version or device.
            UnsealedEngine: another machine or user made it.
        """
        if not self.path.exists() and not self.pin.exists():
            return b""
        remedy = f"delete {self.path} and its pin to measure anew, or name another file"
        if not (self.path.is_file() and self.pin.is_file()):
            raise TimingCacheError(f"timing cache {self.path} needs its pin {self.pin}; {remedy}")
        pinned = read_sealed(self.pin, "timing cache pin", remedy)
        for field, expected in {"format": _FORMAT, **self.key}.items():
            if pinned.get(field) != expected:
                raise TimingCacheError(
                    f"timing cache {self.path} is for {field} {pinned.get(field)!r}, this build "
                    f"has {expected!r}; {remedy}"
                )
        data = self.path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != pinned.get("sha256"):
            raise TimingCacheError(
                f"timing cache {self.path} was changed: pinned SHA-256 {pinned.get('sha256')}, "
                f"found {found}; {remedy}"
            )
        return data

    def attach(self, config: Any) -> None:
        """Give the cache to a builder's configuration.

        Raises:
            TimingCacheError: see `read`; or TensorRT refuses it.
        """
        cache = config.create_timing_cache(self.read())
        if not config.set_timing_cache(cache, False):
            raise TimingCacheError(
                f"TensorRT refuses timing cache {self.path} for this version or device; delete it"
            )

    def keep(self, config: Any) -> str:
        """Store what the builder's cache now holds; return its SHA-256."""
        data = bytes(config.get_timing_cache().serialize())
        digest = hashlib.sha256(data).hexdigest()
        if not self.path.is_file() or self.path.read_bytes() != data:
            write_bytes(self.path, data)
            write_sealed(self.pin, {"format": _FORMAT, **self.key, "sha256": digest})
        return digest
