"""Chains of five tasks: the scoring against a table worked by hand, and how chains are made."""

from collections import Counter
from pathlib import Path

import pytest

from calibration.benchmarks.chains import LINKS, chain_lengths, score_chains
from calibration.benchmarks.evaluation import EpisodeResult, Evaluation, RolloutConfig
from calibration.benchmarks.evaluation_lines import evaluation_lines
from calibration.benchmarks.metaworld.tasks import PRECISE_TASKS
from qvla_export.pipeline.paired_evaluations import pair_evaluations

TASKS = tuple(PRECISE_TASKS)


def evaluation_of(
    failed: set[tuple[str, int]], episodes: int, tasks: tuple[str, ...] = TASKS
) -> Evaluation:
    config = RolloutConfig(tasks, episodes, seed=0)
    pairs = [(task, seed) for seed in range(episodes) for task in tasks]
    rows = tuple(
        EpisodeResult(task, seed, (task, seed) not in failed, 9, ()) for task, seed in pairs
    )
    return Evaluation("p", "d", config, rows, {})


def test_a_table_worked_by_hand() -> None:
    # Ten chains: one of length 0, one of 1, two of 2, one of 3, two of 4, three of 5. At least one:
    # 9 of 10; two: 8; three: 6; four: 5; five: 3. Their sum, 31, over 10 is the average length.
    score = score_chains([5, 0, 4, 2, 5, 1, 3, 4, 2, 5])
    assert score.in_a_row == (0.9, 0.8, 0.6, 0.5, 0.3)
    assert score.average_length == pytest.approx(3.1) == pytest.approx(sum(score.in_a_row))
    # sd of the ten lengths is 1.7920, 1.96 x 1.7920 / sqrt(10) = 1.1107.
    assert (score.low, score.high) == pytest.approx((1.9893, 4.2107), abs=2e-4)
    assert str(score) == (
        "1 to 5 in a row 90.0 / 80.0 / 60.0 / 50.0 / 30.0 % of 10 chains, "
        "average length 3.10 [1.99, 4.21]"
    )


@pytest.mark.parametrize("length", range(LINKS + 1))
def test_chains_that_all_end_alike(length: int) -> None:
    score = score_chains([length] * 3)
    assert score.in_a_row == tuple(float(links <= length) for links in range(1, LINKS + 1))
    assert score.average_length == score.low == score.high == length


def test_a_chain_ends_at_the_first_task_that_is_not_solved() -> None:
    everything = {(task, seed): True for task in TASKS for seed in range(200)}
    assert set(chain_lengths(everything, TASKS, range(200))) == {5}
    assert chain_lengths(everything, TASKS[:4], range(200)) == []
    # One task in six is never solved: each chain leaves out one of six, and ends at it, wherever
    # it stands, each place as often.
    never = {key: key[0] != "push" for key in everything}
    lengths = Counter(chain_lengths(never, TASKS, range(200)))
    assert set(lengths) == {0, 1, 2, 3, 4, 5} and min(lengths.values()) > 15
    # A seed that a task was not run with has no chain.
    del never["push", 3]
    assert len(chain_lengths(never, TASKS, range(200))) == 199
    # What a policy solves does not change which tasks a seed draws.
    assert chain_lengths(never, TASKS, range(9)) == chain_lengths(never, TASKS, range(200))[:8]


def test_an_evaluation_says_how_far_its_chains_get(tmp_path: Path) -> None:
    whole = evaluation_of(set(), 4)
    score = whole.chains()
    assert score is not None and score.chains == 4 and score.average_length == 5
    assert any("1 to 5 in a row 100.0 /" in line for line in evaluation_lines(whole, tmp_path))
    few = evaluation_of(set(), 4, TASKS[:4])
    assert few.chains() is None
    assert not any("in a row" in line for line in evaluation_lines(few, tmp_path))
    whole.save(tmp_path / "evaluation.json")
    assert '"average_length": 5.0' in (tmp_path / "evaluation.json").read_text()


def test_two_policies_chains_are_paired_by_seed() -> None:
    worse = evaluation_of({(task, 2) for task in TASKS}, 4)
    pair = pair_evaluations(worse, evaluation_of(set(), 4))
    # Differences 0, 0, -5, 0: mean -1.25.
    assert pair.chain_length is not None and pair.chain_length.value == -1.25
    assert "tasks in a row" in str(pair)
    assert pair_evaluations(evaluation_of(set(), 1), evaluation_of(set(), 1)).chain_length is None
