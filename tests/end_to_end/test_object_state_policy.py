"""The shipped object-state policy: it solves the precise tasks, and only with what it is shown."""

from functools import partial
from pathlib import Path

from places import ROOT

from calibration.benchmarks.evaluation import Control, Evaluation, RolloutConfig
from calibration.benchmarks.metaworld.tasks import PRECISE_TASKS
from calibration.benchmarks.rollouts import RolloutJob, evaluate
from engines.targets import CPU
from qvla_export.pipeline.fake_quantized import FakeQuantizedPolicy
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import load_oft_policy
from qvla_export.quantizer.uniform_plan import uniform_plan

# Three scenes, for what need not be seen in all of them.
SOME = ("pick-place", "assembly", "hand-insert")
CHECKPOINT = ROOT / "checkpoints/object-state"


def play(output: Path, tasks: tuple[str, ...], control: Control = "none") -> Evaluation:
    config = RolloutConfig(tasks, episodes=1, seed=1_000_000, control=control)
    source = PolicySource(str(CHECKPOINT), threads=1)
    return evaluate(RolloutJob("object state", "digest", source, config), output, workers=1)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 1_000_000


def test_it_solves_the_precise_tasks(tmp_path: Path) -> None:
    evaluation = play(tmp_path / "float.json", tuple(PRECISE_TASKS))
    assert evaluation.success() >= 5 / 6
    motion = evaluation.motion()
    assert motion is not None and motion.gripper_flips < 6


def test_it_needs_the_object_state_and_the_words(tmp_path: Path) -> None:
    blank = play(tmp_path / "blank.json", SOME, "blank-image")
    assert blank.success() == 0
    wrong = play(tmp_path / "wrong.json", ("pick-place", "push"), "wrong-instruction")
    assert wrong.success() == 0


def test_two_bits_round_to_nearest_cost_it_most_of_its_success(tmp_path: Path) -> None:
    policy = load_oft_policy(CHECKPOINT)
    plan = uniform_plan(layer_shapes(policy.layers()), 2, CPU, policy.digest)
    rough = partial(FakeQuantizedPolicy, policy, plan)
    config = RolloutConfig(SOME, episodes=1, seed=1_000_000)
    job = RolloutJob("2 bits", "digest", rough, config)
    assert evaluate(job, tmp_path / "rough.json", workers=1).success() <= 1 / 3
