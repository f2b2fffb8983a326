"""A stage killed at any moment and run again gives the same artifact and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS, ROOT
from small_datasets import write_small_dataset

from calibration.benchmarks.evaluation import load_evaluation
from calibration.sources.lerobot import LeRobotDataset
from engines.targets import CPU
from jetson.latency.comparison import LatencyComparison
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import new_folder, sha256_tree, write_bytes

STAGES = (
    "calibrate",
    "sensitivities",
    "plan",
    "export",
    "export anew",
    "action error",
    "evaluate",
    "latency",
    "report",
)


@pytest.fixture(scope="module")
def work(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of every stage's undisturbed run, and results.json of all that were killed."""
    folder = tmp_path_factory.mktemp("kill")
    dataset = write_small_dataset(folder / "demos", [6] * 10)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "1",
    }
    script = HELPERS / "kill_stages.py"
    subprocess.run(
        [sys.executable, "-W", "ignore", script, tiny_checkpoint, dataset, folder / "work"],
        env=environment,
        check=True,
    )
    return folder / "work"


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "results.json").read_text())
    assert tuple(found) == STAGES
    return found


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_run_again_gives_the_same(results: dict[str, Any], name: str) -> None:
    stage = results[name]
    assert stage["code"] == 0
    assert stage["operations"] >= 3
    assert stage["artifacts"] or name == "latency"
    assert stage["attempts"]
    for attempt in stage["attempts"]:
        assert attempt["killed"] == -9, attempt
        assert attempt["again"] == 0, attempt
        assert attempt["same"], attempt
        assert attempt["leftovers"] == [], attempt


def test_what_came_out_is_valid(work: Path, results: dict[str, Any]) -> None:
    run = RunFolder(work / "report")
    setting = parse_setting("w4")
    assert len(load_evaluation(run.evaluation(setting)).results) == 2
    compared = LatencyComparison.load(run.latency)
    assert [p.name for p in compared.profiles] == ["float", "w4", "w4 unpacked", "w4 served"]
    assert results["report"]["artifacts"] == ["report.html"]


def test_another_process_makes_the_same_bytes(
    work: Path, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    run, setting = RunFolder(tmp_path / "run"), parse_setting("w4")
    calibrate(run, CalibrationRequest(LeRobotDataset(work.parent / "demos"), (), 12, 8))
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(quantizer="nearest", probes=2))
    plan_setting(run, setting, CPU, tiny_policy.digest)
    exporting.export(run, setting, tiny_policy, CPU)
    theirs = work / "export"
    assert run.sensitivities.read_bytes() == (theirs / "sensitivities.safetensors").read_bytes()
    for path in (run.calibration, run.bundle(setting)):
        assert sha256_tree(path) == sha256_tree(theirs / path.relative_to(run.root))


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from qvla_export.shared.artifacts import new_folder, write_bytes
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    write_bytes(Path(sys.argv[1]), b"half")
else:
    with new_folder(Path(sys.argv[1])) as folder:
        (folder / "part").write_bytes(b"half")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_go_with_the_next_write_and_nothing_else_does(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "artifact"
    bystanders = [".artifact.backup", ".artifact", ".other.host.1.abc", "artifact.host.1.abc"]
    for name in bystanders:
        (tmp_path / name).write_text("mine")
    # A writer that is still running keeps its temporary file.
    with new_folder(path) as running:
        command = [sys.executable, "-c", WRITE_AND_DIE, str(path), kind]
        killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert killed.returncode == -9
        assert len(list(tmp_path.iterdir())) == len(bystanders) + 2
        write_bytes(tmp_path / "unrelated", b"")
        assert len(list(tmp_path.iterdir())) == len(bystanders) + 3
        with new_folder(path) as folder:
            (folder / "whole").write_text("whole")
        assert running.is_dir()
        found = {p.name for p in tmp_path.iterdir()}
        assert found == {*bystanders, "artifact", "unrelated", running.name}
