"""qvla build and qvla sizes, as they are typed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import qvla
from fake_gpu import FakeDevice, FakeTensorRt
from fake_tensorrt import tensorrt
from trt_bundles import bundle_of_parts

from engines.load import load_engine
from engines.trt.engine import TensorRtEngine
from engines.trt.sidecar import Sidecar
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

Make = Callable[..., Bundle]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    # These tests are about machines without a GPU, wherever they run.
    monkeypatch.setattr("engines.trt.gpu.DRIVER", "libno-driver.so")


@pytest.fixture
def make(tiny_policy: OftPolicy, tiny_observations: Callable[..., Any], tmp_path: Path) -> Make:
    def write(setting: str, target: str = "rtx4070", seed: int = 0) -> Bundle:
        path = tmp_path / "settings" / setting / "bundle"
        return bundle_of_parts(tiny_policy, tiny_observations(1), path, target, seed)

    return write


def test_build_puts_engines_beside_the_bundle(make: Make, tmp_path: Path) -> None:
    bundle = make("float")
    outcome = qvla("build", bundle.path, "--target", "rtx4070", "--prompt-max", 64, "--level", 2)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "settings" / "float" / "engines" / "rtx4070"
    assert str(folder) in outcome.out.replace("\n", "")
    for stage in bundle.parts:
        assert stage.name in outcome.out
        assert (folder / f"{stage.name}.engine").is_file()
    assert "not verified: this machine has no NVIDIA GPU" in outcome.out
    origin = Sidecar.load(folder / "decoder.json").origin
    assert (origin.inputs["input_ids"].max, origin.level) == ((1, 64), 2)


def test_the_best_prompt_stays_within_the_others(make: Make, tmp_path: Path) -> None:
    bundle = make("float")
    assert qvla("build", bundle.path, "--prompt-max", 16).code == 0
    folder = tmp_path / "settings" / "float" / "engines" / "rtx4070"
    built = Sidecar.load(folder / "decoder.json").origin.inputs["input_ids"]
    assert (built.min, built.opt, built.max) == ((1, 2), (1, 16), (1, 16))


@pytest.mark.parametrize("right", [True, False])
def test_where_the_gpu_is_a_build_is_verified(
    make: Make, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    bundle = make("float")
    other = bundle if right else make("other", seed=1)
    device = FakeDevice()

    def open_engine(given: Bundle, folder: Path) -> TensorRtEngine:
        sidecars = [Sidecar.load(folder / f"{stage.name}.json") for stage in given.parts]
        trt = FakeTensorRt(other, sidecars, device, "tensorrt_rtx")
        return TensorRtEngine(given, folder, lambda: device, trt.module())

    monkeypatch.setattr("engines.trt.gpu.find_gpu", lambda: device.gpu)
    monkeypatch.setattr("engines.trt.engine.TensorRtEngine", open_engine)
    outcome = qvla("build", bundle.path)
    if right:
        assert outcome.code == 0, outcome.err
        assert "verified: cosine 1.0" in outcome.out
    else:
        assert "differs from torch" in outcome.error
    assert device.closed and not device.memory


def test_build_elsewhere(make: Make, tmp_path: Path) -> None:
    bundle = make("float")
    assert qvla("build", bundle.path, "--output", tmp_path / "elsewhere").code == 0
    assert (tmp_path / "elsewhere" / "head.engine").is_file()
    assert not (bundle.path.parent / "engines").exists()


def test_a_bundle_of_another_target_is_refused(make: Make) -> None:
    error = qvla("build", make("float").path, "--target", "orin-jp7").error
    assert "bundle and target do not belong together" in error
    assert "qvla export --target orin-jp7" in error


def test_an_orin_engine_is_built_on_an_orin(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make("float", "orin-jp6")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    error = qvla("build", bundle.path).error
    assert "built on the device itself, by tensorrt >=10.3,<10.8 with its sm_87 GPU" in error
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt("10.3.0.26"))
    assert (
        "Copy the bundle to the device and run there: qvla build"
        in qvla("build", bundle.path).error
    )


def test_sizes_of_what_can_be_built_and_what_cannot(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bundles = [make("w8"), make("w4", "orin-jp7"), make("w2", "cuda")]
    report = tmp_path / "sizes.json"
    outcome = qvla("sizes", *(bundle.path for bundle in bundles), "--output", report)
    assert outcome.code == 0, outcome.err
    rtx, orin, cuda = json.loads(report.read_text())["bundles"]
    stored = sum(bundles[0].weight_bytes.values())
    assert rtx["planned_bytes"] == rtx["onnx_bytes"] == stored
    assert rtx["engine_bytes"] > rtx["engine_weight_bytes"] > 0
    assert rtx["engine_error"] == rtx["engine_weight_bytes"] / stored - 1
    assert rtx["built_by"].startswith("tensorrt_rtx ")
    assert "on the device itself" in orin["engine_missing"]
    assert orin["engine_bytes"] is None
    assert cuda["engine_missing"] == "ort-cuda runs the bundle itself"
    assert [entry["name"] for entry in (rtx, orin, cuda)] == ["w8", "w4", "w2"]
    for name in ("w8", "w4", "w2"):
        assert name in outcome.out


def test_a_bundle_for_tensorrt_runs_on_a_cpu_to_check_it(make: Make) -> None:
    bundle = make("float")
    golden = bundle.golden()
    with load_engine(bundle, threads=1, runtime="ort") as engine:
        actions = engine.infer(golden.feeds[0])["actions"]
        assert "CPUExecutionProvider" in engine.runtime
    assert actions.shape == (1, 4, 4)
    assert abs(actions - golden.reference[:1]).max() < 1e-5


def test_the_cuda_provider_is_not_replaced_silently(make: Make) -> None:
    outcome = qvla("verify", make("float", "cuda").path)
    assert "has no CUDAExecutionProvider" in outcome.error
    assert "pip install 'qvla[gpu]'" in outcome.error
