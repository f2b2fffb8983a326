"""`qvla doctor` on a bundle: its files, its engines, and the runtime, GPU and memory they need."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import tensorrt
from good_boards import ORIN_GPU, board, to_mend
from trt_bundles import bundle_of_parts

from engines.targets import CPU
from engines.trt.builder import build_engines
from engines.trt.gpu import Gpu
from engines.trt.modules import TRAITS, TrtModule
from engines.trt.sidecar import Sidecar, engine_path, sidecar_path
from jetson.doctor.bundle_facts import BundleFacts, EngineFacts, read_bundle
from jetson.doctor.examination import DoctorRequest, Subject, examine, read_subject
from jetson.doctor.finding import BoardFinding
from jetson.doctor.memory import check_available, check_disk
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.bundle import Bundle

VERSION = "10.13.3.9"
PACKAGES = {"onnxruntime": "1.32.0", "pycuda": "2025.1"}


@pytest.fixture(scope="module")
def bundle(trt_home: Path, tiny_policy: OftPolicy, tiny_observations: Callable[..., Any]) -> Bundle:
    made = bundle_of_parts(tiny_policy, tiny_observations(1), trt_home / "bundle", "orin-jp7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", tensorrt(VERSION))
        build_engines(made, trt_home / "engines" / "orin-jp7", find=lambda: ORIN_GPU)
    return made


@pytest.fixture
def here(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """An AGX Orin with JetPack 7.2, and a bundle whose engines were built there."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(VERSION))
    machine = replace(board(tmp_path, "jetpack7"), python=(3, 12), packages=PACKAGES)
    return read_subject(DoctorRequest(bundle.path, port=0), machine)


def findings_of(subject: Subject, key: str | None = None) -> dict[str, BoardFinding]:
    return to_mend(examine(DoctorRequest(unnorm_key=key, port=0), subject))


def only(findings: dict[str, BoardFinding], what: str, severity: str = "error") -> BoardFinding:
    assert list(findings) == [what]
    assert findings[what].severity == severity
    return findings[what]


def changed(subject: Subject, **machine: Any) -> Subject:
    return replace(subject, machine=replace(subject.machine, **machine))


def facts_of(subject: Subject) -> BundleFacts:
    assert subject.bundle is not None
    return subject.bundle


def test_a_board_that_has_everything_has_nothing_to_mend(here: Subject) -> None:
    assert not findings_of(here)
    findings = {f.what: f for f in examine(DoctorRequest(port=0), here)}
    right = ("TensorRT", "GPU", "engines", "engines' TensorRT", "engines' GPU", "bundle", "Python")
    assert {findings[what].severity for what in right} == {"ok"}
    assert findings["ONNX Runtime"].severity == findings["disk space"].severity == "not applicable"


def test_engines_of_another_tensorrt_are_named(here: Subject) -> None:
    module = TrtModule("tensorrt", "11.4.1", TRAITS["tensorrt"], None)
    finding = only(
        findings_of(replace(here, bundle=replace(facts_of(here), module=module))),
        "engines' TensorRT",
    )
    assert (finding.observed, finding.wanted) == (f"tensorrt {VERSION}", "tensorrt 11.4.1")
    assert finding.remedy == f"qvla build {facts_of(here).path}"


def test_engines_of_another_gpu_are_named(here: Subject) -> None:
    other = changed(here, gpu=Gpu("Orin (nvgpu)", "sm_87"))
    finding = only(findings_of(other), "engines' GPU")
    assert finding.observed == "Orin (sm_87)"
    findings = findings_of(changed(here, gpu=Gpu("NVIDIA GeForce RTX 4070", "sm_89")))
    assert list(findings) == ["GPU", "engines' GPU"]
    assert "--target rtx4070" in findings["GPU"].remedy


def test_a_missing_driver_is_named(here: Subject) -> None:
    finding = only(findings_of(changed(here, gpu=None)), "GPU")
    assert "libcuda.so.1" in finding.observed and "nvidia-jetpack" in finding.remedy


def test_a_missing_library_of_the_gpu_is_named(here: Subject) -> None:
    finding = only(findings_of(changed(here, packages={"onnxruntime": "1.32.0"})), "CUDA bindings")
    assert finding.remedy == "pip install 'cuda-bindings<13'"
    for package in ("cuda-bindings", "pycuda"):
        machine = changed(here, packages={"onnxruntime": "1.32.0", package: "12.9.10"})
        assert "CUDA bindings" not in findings_of(machine)


@pytest.mark.parametrize(
    ("installed", "imported", "remedy"),
    [
        ("", None, "sudo apt install nvidia-jetpack python3-libnvinfer"),
        (VERSION, None, "--system-site-packages"),
        ("10.3.0.30", "10.3.0", "qvla deploy --target orin-jp6"),
        ("8.5.2.2", "8.5.2", "l4t_initrd_flash.sh"),
    ],
)
def test_tensorrt_that_is_missing_or_another_is_named(
    here: Subject,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    imported: str | None,
    remedy: str,
) -> None:
    module = None if imported is None else tensorrt(imported)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    subject = replace(here, bundle=read_bundle(facts_of(here).path))
    state = replace(here.machine.board, tensorrt=installed)
    finding = only(findings_of(changed(subject, board=state)), "TensorRT")
    assert remedy in finding.remedy
    assert finding.wanted == "tensorrt >=10.13"


def test_the_python_of_jetpack_is_asked_for_where_tensorrt_is_not_found(here: Subject) -> None:
    assert not findings_of(changed(here, python=(3, 11)))
    facts = replace(facts_of(here), module=None, module_problem="No module named 'tensorrt'")
    findings = findings_of(changed(replace(here, bundle=facts), python=(3, 11)))
    assert list(findings) == ["Python", "TensorRT"]
    assert "python3.12 -m venv --system-site-packages" in findings["Python"].remedy


def with_power_mode(subject: Subject, mode: str) -> Subject:
    facts = facts_of(subject)
    parts = []
    for part in facts.parts:
        assert part.sidecar is not None
        parts.append(replace(part, sidecar=replace(part.sidecar, power_mode=mode)))
    return replace(subject, bundle=replace(facts, parts=tuple(parts)))


def test_engines_timed_in_another_power_mode_are_named(here: Subject) -> None:
    assert not findings_of(with_power_mode(here, "MAXN"))
    finding = only(findings_of(with_power_mode(here, "MODE_30W")), "power mode", "warning")
    assert finding.remedy.startswith("rm ") and finding.remedy.endswith(
        f"/*.json && qvla build {facts_of(here).path}"
    )


def test_engines_that_are_missing_cut_or_of_others_are_named(here: Subject, tmp_path: Path) -> None:
    path = facts_of(here).path
    folder = tmp_path / "engines"
    shutil.copytree(facts_of(here).engines, folder)

    def finding() -> BoardFinding:
        found = only(findings_of(replace(here, bundle=read_bundle(path, folder))), "engines")
        assert found.remedy == f"qvla build {path} --output {folder}"
        return found

    engine = engine_path(folder, "decoder")
    data = engine.read_bytes()
    engine.write_bytes(data[:-1])
    assert finding().observed == "decoder.engine is not what was built here"
    engine.unlink()
    assert "no engine of part 'decoder'" in finding().observed
    engine.write_bytes(data)
    sidecar = sidecar_path(folder, "decoder")
    write_json(sidecar, {**read_json(sidecar, "sidecar"), "engine_bytes": 1})
    assert "not made by this user on this machine" in finding().observed
    shutil.rmtree(folder)
    assert "(and 2 more parts)" in finding().observed


def test_memory_and_disk_are_compared_with_the_bundle_s_needs(here: Subject) -> None:
    facts, state = facts_of(here), here.machine.board
    building = replace(facts, parts=(EngineFacts("vision", None, "missing"),))
    assert building.must_build and building.memory_needed_bytes > 4 << 30
    for free, severity in ((4 << 30, "error"), (8 << 30, "ok")):
        there = replace(state, memory_available_bytes=free)
        assert check_available(there, building).severity == severity
        # Its engines are a few hundred kilobytes.
        assert check_available(there, facts).severity == "ok"
    poor = check_available(replace(state, memory_available_bytes=1), building)
    assert "--workspace-mb 1024" in poor.remedy
    for nbytes, severity in ((1000, "error"), (10**12, "ok"), (None, "unknown")):
        assert check_disk(state, replace(building, free_disk_bytes=nbytes)).severity == severity
    assert check_disk(state, facts).severity == "not applicable"


def test_a_damaged_bundle_is_named(here: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(facts_of(here).path, folder)
    data = (folder / "head.onnx").read_bytes()
    (folder / "head.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    finding = only(findings_of(replace(here, bundle=read_bundle(folder))), "bundle")
    assert "head.onnx is damaged: expected SHA-256" in finding.observed
    assert finding.remedy.startswith("rsync -a --checksum")
    for name, data in {"manifest.json": b"\xff\x00", "nothing": b""}.items():
        (folder / name).write_bytes(data)
        assert read_bundle(folder).problem
    assert read_bundle(tmp_path / "nowhere").problem


def test_a_bundle_for_the_cpu_asks_for_onnx_runtime(here: Subject) -> None:
    cpu = replace(here, bundle=replace(facts_of(here), target=CPU, parts=(), module=None))
    assert not findings_of(cpu)
    for packages in ({"onnxruntime": "1.23.2"}, {}):
        finding = only(findings_of(changed(cpu, packages=packages)), "ONNX Runtime")
        assert finding.remedy == "pip install 'onnxruntime>=1.32'"
        assert finding.wanted == ">=1.32 for opset 25"
    finding = only(findings_of(changed(cpu, python=(3, 10))), "Python")
    assert "python3.11 -m venv" in finding.remedy


def test_the_bundle_s_unnorm_key_is_compared(here: Subject) -> None:
    assert not findings_of(here, "tiny")
    finding = only(findings_of(here, "libero_spatial"), "unnorm key of the bundle")
    assert (finding.observed, finding.wanted) == ("tiny", "libero_spatial")
    assert "--unnorm-key tiny" in finding.remedy


def test_a_sidecar_of_another_bundle_is_no_engine(
    here: Subject, bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(facts_of(here).engines, folder)
    path = sidecar_path(folder, "vision")
    sidecar = Sidecar.load(path)
    replace(sidecar, origin=replace(sidecar.origin, bundle_digest="1" * 64)).save(path)
    facts = read_bundle(bundle.path, folder)
    assert "do not belong together" in facts.parts[0].problem


@pytest.mark.parametrize("gpu", [None, Gpu("NVIDIA GeForce RTX 4070", "sm_89")])
@pytest.mark.parametrize("built", [True, False])
def test_a_bundle_for_an_orin_is_copied_there(here: Subject, gpu: Gpu | None, built: bool) -> None:
    """A PC is neither flashed nor given drivers, and builds nothing that only an Orin builds."""
    facts = replace(facts_of(here), module=None, module_problem="no module", free_disk_bytes=1)
    if not built:
        facts = replace(facts, parts=(EngineFacts("decoder", None, "there is no engine"),))
    pc = replace(here.machine.board, l4t="", module="", model="ThinkStation", tensorrt="11.2.0")
    pc = replace(pc, memory_available_bytes=1)
    subject = replace(changed(here, board=pc, gpu=gpu, packages={}, python=(3, 13)), bundle=facts)
    finding = findings_of(subject)["GPU"]
    assert finding.remedy.startswith("this is no Orin: copy the bundle there: rsync -a ")
    remedies = "; ".join(f.remedy for f in findings_of(subject).values())
    for wrong in ("flash", "ubuntu-drivers", "apt", "reboot", "pip install", "qvla build"):
        assert wrong not in remedies
    others = set(findings_of(subject)) - {"GPU"}
    assert others <= {"CPU governor"}
