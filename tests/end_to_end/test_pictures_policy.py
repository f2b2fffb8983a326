"""The shipped policy of precise tasks in pictures: it solves them, and only with what it sees."""

from pathlib import Path

import pytest
from places import ROOT

from calibration.benchmarks.evaluation import Control, RolloutConfig
from calibration.benchmarks.rollouts import RolloutJob, evaluate
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.policies.prismatic.pretrained import DINOV2_SMALL
from qvla_export.shared.errors import CheckpointError

CHECKPOINT = ROOT / "checkpoints/precise-pictures"
# Every one of 15 episodes was solved of this task.
TASKS = ("peg-insert-side-pictures",)


def tower_is_installed() -> bool:
    try:
        return DINOV2_SMALL.path().exists()
    except CheckpointError:
        return False


def solved(output: Path, control: Control, episodes: int) -> float:
    config = RolloutConfig(TASKS, episodes=episodes, seed=1_000_000, control=control)
    source = PolicySource(str(CHECKPOINT), threads=1)
    return evaluate(RolloutJob("pictures", "digest", source, config), output, workers=1).success()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 5_000_000


@pytest.mark.skipif(not tower_is_installed(), reason="qvla[pretrained] is not installed")
def test_it_solves_its_task_and_needs_its_pictures(tmp_path: Path) -> None:
    assert solved(tmp_path / "float.json", "none", 2) >= 1 / 2
    assert solved(tmp_path / "blank.json", "blank-image", 1) == 0
