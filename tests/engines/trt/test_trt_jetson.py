"""The module `tensorrt` of a Jetson: names that 10.3 has, timing caches that are pinned."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import tensorrt
from trt_bundles import bundle_of_parts

from engines.trt.builder import BuildSettings, build_engines
from engines.trt.gpu import Gpu
from engines.trt.modules import BuildError
from engines.trt.sidecar import Sidecar
from engines.trt.timing_cache import TimingCacheError
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

Observations = Callable[..., Any]
ORIN = Gpu("Orin", "sm_87")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def orin_bundle(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path_factory: Any
) -> Bundle:
    path = tmp_path_factory.mktemp("b") / "orin"
    return bundle_of_parts(tiny_policy, tiny_observations(1), path, "orin-jp7")


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt())


def test_the_device_is_asked_for_where_kernels_are_timed(
    orin_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BuildError, match=r"built on the device itself.*lacks tensorrt"):
        build_engines(orin_bundle, tmp_path, find=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt())
    with pytest.raises(BuildError, match=r"lacks an NVIDIA GPU. Copy the bundle .*qvla build"):
        build_engines(orin_bundle, tmp_path, find=lambda: None)
    other = Gpu("NVIDIA GeForce RTX 4070", "sm_89")
    with pytest.raises(BuildError, match=r"found NVIDIA GeForce RTX 4070, sm_89"):
        build_engines(orin_bundle, tmp_path, find=lambda: other)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt("10.3.0.26"))
    with pytest.raises(BuildError, match=r"needs tensorrt >=10.13, installed is 10.3.0.26"):
        build_engines(orin_bundle, tmp_path, find=lambda: None)


def on_orin(bundle: Bundle, folder: Path, **settings: Any) -> tuple[Sidecar, ...]:
    return build_engines(bundle, folder, BuildSettings(**settings), find=lambda: ORIN)


def test_tensorrt_10_3_has_every_name_the_builder_uses(
    orin_bundle: Bundle, tmp_path: Path, jetson: None
) -> None:
    sidecars = on_orin(orin_bundle, tmp_path)
    for sidecar in sidecars:
        origin = sidecar.origin
        assert (origin.module, origin.module_version) == ("tensorrt", "10.13.3.9")
        assert (origin.gpu, origin.compute_capability) == ("Orin", "sm_87")
        assert sidecar.layers == [{"Name": "fused", "LayerType": "kgen"}]
        assert sidecar.layers_missing is None


class TestTimingCache:
    @pytest.fixture
    def cache(self, orin_bundle: Bundle, tmp_path: Path, jetson: None) -> Path:
        on_orin(orin_bundle, tmp_path / "first", timing_cache=tmp_path / "timing.cache")
        return tmp_path / "timing.cache"

    def test_it_is_filled_once_and_recorded(
        self, cache: Path, orin_bundle: Bundle, tmp_path: Path
    ) -> None:
        data = cache.read_bytes()
        assert data == b"patches;hidden;actions;"
        sidecars = on_orin(orin_bundle, tmp_path / "second", timing_cache=cache)
        assert cache.read_bytes() == data
        digest = hashlib.sha256(data).hexdigest()
        assert {s.timing_cache_sha256 for s in sidecars} == {digest}

    def test_a_changed_one_is_refused(
        self, cache: Path, orin_bundle: Bundle, tmp_path: Path
    ) -> None:
        cache.write_bytes(cache.read_bytes() + b"x")
        with pytest.raises(TimingCacheError, match=r"was changed: pinned SHA-256 .*delete"):
            on_orin(orin_bundle, tmp_path / "second", timing_cache=cache)
        assert not (tmp_path / "second").exists()

    def test_one_without_a_pin_is_refused(
        self, cache: Path, orin_bundle: Bundle, tmp_path: Path
    ) -> None:
        cache.with_name("timing.cache.json").unlink()
        with pytest.raises(TimingCacheError, match="needs its pin"):
            on_orin(orin_bundle, tmp_path / "second", timing_cache=cache)

    def test_one_of_another_version_is_refused(
        self, cache: Path, orin_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt("11.4.1"))
        with pytest.raises(TimingCacheError, match=r"is for version '10.13.3.9'.*'11.4.1'"):
            on_orin(orin_bundle, tmp_path / "second", timing_cache=cache)

    def test_one_of_another_device_is_refused(
        self, cache: Path, orin_bundle: Bundle, tmp_path: Path
    ) -> None:
        other = Gpu("Orin NX", "sm_87")
        with pytest.raises(TimingCacheError, match=r"is for device 'Orin, sm_87'"):
            build_engines(
                orin_bundle, tmp_path / "e", BuildSettings(timing_cache=cache), find=lambda: other
            )

    def test_rtx_has_none(
        self, tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
    ) -> None:
        bundle = bundle_of_parts(tiny_policy, tiny_observations(1), tmp_path / "rtx")
        settings = BuildSettings(timing_cache=tmp_path / "cache")
        with pytest.raises(BuildError, match=r"no timing cache.*leave --timing-cache out"):
            build_engines(bundle, tmp_path / "e", settings, find=lambda: None)
