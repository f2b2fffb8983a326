"""`qvla verify`: exit codes, reports, and a bundle whose weights are wrong though vouched for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_runs import qvla
from tiny_bundles import make_bundle, mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.ort import OrtEngine
from engines.targets import CPU
from engines.trt.gpu import Gpu
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.graph.float_graph import export_float
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.artifacts import sha256_file, write_json
from qvla_export.shared.bundle import GOLDEN, MANIFEST, Bundle, manifest_digest
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def folder(
    tiny_policy: OftPolicy,
    tiny_checkpoint: Path,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A float bundle, a quantized one, both of a policy with wrong weights, and observations."""
    root, seen = tmp_path_factory.mktemp("verified"), tiny_observations(6)
    wrong = load_oft_policy(tiny_checkpoint)
    with torch.no_grad():
        next(layer for name, layer in wrong.layers().items() if "language" in name).weight.mul_(3)
    graph = export_float(wrong, CPU)
    for name, plan in (("float", None), ("mixed", mixed_plan(tiny_policy))):
        make_bundle(tiny_policy, plan, seen[:3], root / name)
        export_bundle(wrong, plan, CPU, seen[:3], root / f"wrong-{name}", ExportOptions(graph))
        take_golden(root / name, root / f"wrong-{name}")
    CalibrationSet(tuple(seen[:2]), tuple(seen[2:]), {"test": 1}).save(root / "calibration")
    return root


def take_golden(source: Path, bundle: Path) -> None:
    """Give a bundle another's golden actions, with every digest mended."""
    golden = Path(shutil.copy(source / GOLDEN, bundle / GOLDEN))
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    files[GOLDEN] = {"sha256": sha256_file(golden), "bytes": golden.stat().st_size}
    rewrite(bundle, files=files)


def rewrite(bundle: Path, **changes: object) -> None:
    """Change fields of a manifest and mend its digest."""
    manifest = {**json.loads((bundle / MANIFEST).read_text()), **changes}
    del manifest["digest"]
    write_json(bundle / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})


@pytest.mark.parametrize("name", ["float", "mixed"])
def test_a_good_bundle_passes_with_all_its_figures(folder: Path, name: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    outcome = qvla(
        *("verify", folder / name, "--float", folder / "float", "--output", output),
        *("--latency", "--samples", 3, "--target", "cpu"),
    )
    assert outcome.code == 0, outcome.err
    assert "floor: float engine against torch: cosine 1.0000" in outcome.out
    assert "latency on onnxruntime " in outcome.out
    report = json.loads(output.read_text())
    manifest = json.loads((folder / name / MANIFEST).read_text())
    assert report["passed"] is True
    assert report["engine"]["bundle_digest"] == manifest["digest"]
    assert report["engine"]["runtime"].startswith("onnxruntime ")
    assert report["drift"]["observations"] == 3
    assert len(report["thresholds"]["allowed"]["max_normalized"]) == 4
    assert (report["plan_error"]["rms"] > 0.01) == (name == "mixed")
    assert report["float_floor"]["max_normalized"] <= [1e-4] * 4
    assert len(report["latency"]["samples_ms"]["total"]) == 3
    motions = [report[name] for name in ("motion", "reference_motion")]
    assert "of full precision's; gripper (3) flips" in outcome.out
    change = motions[0]["jerk_rms"] / motions[1]["jerk_rms"] - 1
    assert (abs(change) > 1e-3) == (name == "mixed") and f"{change:+.1%}" in outcome.out


@pytest.mark.parametrize("name", ["float", "mixed"])
def test_wrong_weights_are_refused_however_well_vouched_for(
    folder: Path, name: str, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    outcome = qvla("verify", folder / f"wrong-{name}", "--output", output, "--latency")
    assert outcome.code == 2
    for part in ("differs from torch on 3 golden", "in dimension", "allowed are", "export the"):
        assert part in outcome.error
    report = json.loads(output.read_text())
    assert (report["passed"], "latency" in report) == (False, False)
    assert report["breaches"][0] in outcome.error


def test_against_another_bundle_and_a_checkpoint(folder: Path, tiny_checkpoint: Path) -> None:
    held_out = ("--observations", folder / "calibration")
    for other in (folder / "float", tiny_checkpoint):
        for seen in ((), held_out):
            outcome = qvla("verify", folder / "mixed", "--against", other, *seen)
            assert outcome.code == 0, outcome.err
            assert ("4 held-out" if seen else "3 golden") in outcome.out
    wrong = qvla("verify", folder / "wrong-float", "--against", tiny_checkpoint, *held_out)
    assert (wrong.code, "4 held-out" in wrong.error) == (2, True)
    wrong = qvla("verify", folder / "wrong-float", "--against", folder / "float", *held_out)
    assert (wrong.code, "differs from onnxruntime" in wrong.error) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--observations {0}/calibration", "name a checkpoint or another bundle with --against"),
        ("--observations {0}/nowhere --against {0}/float", "calibration set not found"),
        ("--against {0}/nowhere", "URL of a server not found"),
        ("--against {0}/calibration", "is neither a checkpoint folder"),
        ("--against http://localhost:1", "got a server"),
        ("--target rtx4070", "made for cpu, given rtx4070. Plan and export for it"),
        ("--target rtx4071", "Did you mean 'rtx4070'"),
        ("--float {0}/mixed", "is quantized"),
        (
            "--float {0}/float --against {0}/float --observations {0}/calibration",
            "compare with a checkpoint",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folder: Path, tmp_path: Path, options: str, message: str
) -> None:
    words = options.format(folder).split(" ")
    outcome = qvla("verify", folder / "mixed", *words, "--output", tmp_path / "report.json")
    assert outcome.code == 2
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rtx(folder: Path, tmp_path: Path) -> Path:
    """A bundle that says it is for a GPU."""
    bundle = shutil.copytree(folder / "float", tmp_path / "rtx")
    rewrite(bundle, target="rtx4070")
    return bundle


@pytest.mark.parametrize("gpu", [None, Gpu("Orin", "sm_87")])
def test_without_the_gpu_the_command_says_what_is_missing(
    rtx: Path, gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.trt.gpu.find_gpu", lambda: gpu)
    outcome = qvla("verify", rtx, "--target", "rtx4070", "--latency")
    assert outcome.code == 2
    for part in ("NVIDIA GPU of compute capability sm_89", "Orin" if gpu else "none", "--runtime"):
        assert part in outcome.error
    here = qvla("verify", rtx, "--target", "rtx4070", "--runtime", "ort")
    assert here.code == 0, here.err
    assert "rounding of float16" in here.out


def test_with_the_gpu_one_command_builds_verifies_and_profiles(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(bundle: Bundle, place: Path, *settings: object) -> None:
        built.append(place)

    def load(bundle: Bundle, *settings: object, runtime: object) -> OrtEngine:
        assert built, "loaded before it was built"
        return OrtEngine(bundle, 1)

    monkeypatch.setattr("engines.trt.gpu.find_gpu", lambda: Gpu("RTX", "sm_89"))
    monkeypatch.setattr("engines.trt.builder.build_engines", build)
    monkeypatch.setattr("engines.load.load_engine", load)
    output = tmp_path / "report.json"
    outcome = qvla(
        *("verify", rtx, "--target", "rtx4070", "--latency", "--samples", 2, "--output", output)
    )
    assert outcome.code == 0, outcome.err
    assert built == [tmp_path / "engines/rtx4070"]
    report = json.loads(output.read_text())
    assert (report["passed"], report["latency"]["target"]) == (True, "rtx4070")
