"""No engine is deserialized that this machine has not built, for this bundle, version and GPU."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import FakeDevice, FakeTensorRt
from hypothesis import given, settings
from hypothesis import strategies as st
from trt_bundles import bundle_of_parts

from engines.base import EngineError
from engines.load import load_engine
from engines.trt import seal
from engines.trt.builder import build_engines
from engines.trt.engine import TensorRtEngine
from engines.trt.gpu import Gpu
from engines.trt.modules import TrtModule
from engines.trt.seal import UnsealedEngine
from engines.trt.sidecar import Sidecar, engine_path, sidecar_path
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError


@pytest.fixture(scope="module")
def bundle(trt_home: Path, tiny_policy: OftPolicy, tiny_observations: Callable[..., Any]) -> Bundle:
    return bundle_of_parts(tiny_policy, tiny_observations(1), trt_home / "bundle")


@pytest.fixture(scope="module")
def engines(trt_home: Path, bundle: Bundle) -> Path:
    build_engines(bundle, trt_home / "engines", find=lambda: None)
    return trt_home / "engines"


@pytest.fixture
def folder(engines: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    return Path(shutil.copytree(engines, tmp_path / "engines"))


def sidecars_of(bundle: Bundle, folder: Path) -> list[Sidecar]:
    return [Sidecar.load(sidecar_path(folder, part.name)) for part in bundle.parts]


def open_engine(
    bundle: Bundle,
    folder: Path,
    known: list[Sidecar],
    gpu: Gpu | None = None,
    change: Callable[[TrtModule], TrtModule] = lambda module: module,
) -> tuple[FakeTensorRt, Callable[[], TensorRtEngine]]:
    """Return the runtime, which counts what it is given, and what loads the engine."""
    device = FakeDevice() if gpu is None else FakeDevice(gpu)
    trt = FakeTensorRt(bundle, known, device, "tensorrt_rtx")
    return trt, lambda: TensorRtEngine(bundle, folder, lambda: device, change(trt.module()))


def test_a_local_build_is_loaded(bundle: Bundle, folder: Path) -> None:
    trt, load = open_engine(bundle, folder, sidecars_of(bundle, folder))
    with load():
        assert len(trt.deserialized) == len(bundle.parts)


@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_a_missing_engine_names_the_command(bundle: Bundle, folder: Path, suffix: str) -> None:
    (folder / f"decoder{suffix}").unlink()
    with pytest.raises(EngineError, match=r"no engine of part 'decoder'.*qvla build"):
        load_engine(bundle, engines=folder)


def test_without_engines_the_command_is_named(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"engines.rtx4070; build it on this machine: qvla build"):
        load_engine(bundle)


@pytest.mark.parametrize("where", [0, 1000, -1])
def test_a_changed_engine_is_never_deserialized(bundle: Bundle, folder: Path, where: int) -> None:
    known = sidecars_of(bundle, folder)
    path = engine_path(folder, "vision")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    trt, load = open_engine(bundle, folder, known)
    with pytest.raises(UnsealedEngine, match=r"not the engine that was built here.*qvla build"):
        load()
    assert not trt.deserialized


def test_an_engine_copied_in_with_its_sidecar_is_refused(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = sidecars_of(bundle, folder)
    trt, load = open_engine(bundle, folder, known)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "no builds here"))
    with pytest.raises(UnsealedEngine, match=r"not made by this user on this machine.*qvla build"):
        load()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    seal.write_sealed(tmp_path / "own.json", {"this machine": "builds too"})
    with pytest.raises(UnsealedEngine, match=r"not made by this user on this machine.*qvla build"):
        load()
    assert not trt.deserialized


def test_a_forged_digest_is_refused(bundle: Bundle, folder: Path) -> None:
    """Whoever swaps the engine cannot make the sidecar agree."""
    known = sidecars_of(bundle, folder)
    evil = b"native code of somebody else"
    engine_path(folder, "head").write_bytes(evil)
    path = sidecar_path(folder, "head")
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "engine_sha256": hashlib.sha256(evil).hexdigest()}))
    trt, load = open_engine(bundle, folder, known)
    with pytest.raises(UnsealedEngine, match="changed since"):
        load()
    assert not trt.deserialized


@settings(max_examples=50)
@given(data=st.data())
def test_no_field_of_a_sidecar_can_be_changed(data: st.DataObject, engines: Path) -> None:
    value = json.loads(sidecar_path(engines, "decoder").read_text())
    own = value.pop(seal.SEAL)
    field = data.draw(st.sampled_from(sorted(value)))
    other = data.draw(
        st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
    )
    changed = {**value, field: other}
    changed_path = engines.parent / "changed.json"
    changed_path.write_text(json.dumps({**changed, seal.SEAL: own}))
    if changed == value:
        Sidecar.load(changed_path)
        return
    with pytest.raises(UnsealedEngine):
        Sidecar.load(changed_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        '{"seal": null}',
        '{"seal": 3}',
        "{",
        "\0",
        '{"a": NaN, "seal": "0"}',
        '{"seal": "\\ud800"}',
    ],
)
def test_hostile_sidecars(engines: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "decoder.json"
    path.write_text(text)
    with pytest.raises((ArtifactError, UnsealedEngine), match="sidecar"):
        Sidecar.load(path)


def test_a_sealed_statement_of_another_kind_is_no_sidecar(engines: Path, tmp_path: Path) -> None:
    seal.write_sealed(tmp_path / "decoder.json", {"format": "qvla-timing-cache-1"})
    with pytest.raises(UnsealedEngine, match="must be of format"):
        Sidecar.load(tmp_path / "decoder.json")


def test_an_engine_of_another_bundle_is_refused(
    bundle: Bundle,
    folder: Path,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path: Path,
) -> None:
    other = bundle_of_parts(tiny_policy, tiny_observations(1), tmp_path / "other", seed=1)
    trt, load = open_engine(other, folder, sidecars_of(bundle, folder))
    with pytest.raises(ArtifactMismatch, match="bundle and engine do not belong together"):
        load()
    assert not trt.deserialized


def test_stages_cannot_be_exchanged(bundle: Bundle, folder: Path) -> None:
    known = sidecars_of(bundle, folder)
    for suffix in (".engine", ".json"):
        shutil.copy(folder / f"vision{suffix}", folder / f"head{suffix}")
    trt, load = open_engine(bundle, folder, known)
    with pytest.raises(ArtifactMismatch, match="part and engine"):
        load()
    assert not trt.deserialized


def test_another_version_is_refused(bundle: Bundle, folder: Path) -> None:
    known = sidecars_of(bundle, folder)
    trt, load = open_engine(
        bundle, folder, known, change=lambda module: replace(module, version="1.8.0.1")
    )
    with pytest.raises(
        EngineError, match=r"built by tensorrt_rtx 1\.7\.1\.116, this is tensorrt_rtx 1\.8"
    ):
        load()
    assert not trt.deserialized


def test_another_gpu_is_refused(bundle: Bundle, folder: Path) -> None:
    known = sidecars_of(bundle, folder)
    trt, load = open_engine(bundle, folder, known, gpu=Gpu("Orin", "sm_87"))
    with pytest.raises(EngineError, match=r"is for sm_89 .*GPU here is Orin \(sm_87\)"):
        load()
    assert not trt.deserialized
    assert trt.device.closed


def test_what_the_runtime_refuses_is_explained(bundle: Bundle, folder: Path) -> None:
    _, load = open_engine(bundle, folder, [])
    with pytest.raises(EngineError, match=r"built for another GPU[\s\S]*incompatible device"):
        load()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda key: key.chmod(0o644), "mode 644"),
        (lambda key: key.write_bytes(b"short"), "5 bytes"),
        (lambda key: (key.rename(key.with_name("k")), key.symlink_to(key.with_name("k"))), ""),
    ],
)
def test_a_key_that_others_can_read_or_choose_is_refused(
    spoil: Callable[[Path], object],
    why: str,
    engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    seal.write_sealed(tmp_path / "a.json", {"a": 1})
    key = seal.key_path()
    assert key.stat().st_mode & 0o777 == 0o600
    spoil(key)
    with pytest.raises(QvlaError, match=f"only you can read.*{why}"):
        seal.read_sealed(tmp_path / "a.json", "statement", "make it again")


@settings(max_examples=30)
@given(
    value=st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(0, 1)
    ).filter(lambda value: seal.SEAL not in value)
)
def test_sealed_statements_round_trip(value: dict[str, Any], trt_home: Path) -> None:
    path = trt_home / "statement.json"
    seal.write_sealed(path, value)
    assert seal.read_sealed(path, "statement", "") == value
    write_json(path, {**value, seal.SEAL: "0" * 64})
    with pytest.raises(UnsealedEngine):
        seal.read_sealed(path, "statement", "")
