"""Five tasks in a row, scored as CALVIN scores them, of the episodes that an evaluation has.

CALVIN tells a policy five tasks one after another and counts how many it solves before the first
that it does not; reported are the shares of chains with at least 1, 2, ... 5 solved and the
average length. There a link begins where the one before it ended; the tasks here have scenes of
their own, so a link is the episode of that task and the chain's seed, and no run is needed beyond
the evaluation's. Source: calvin `calvin_models/calvin_agent/evaluation/utils.py`, `count_success`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LINKS = 5


@dataclass(frozen=True)
class ChainScore:
    """How far chains of five tasks get."""

    chains: int
    # Share of the chains whose first 1, 2, ... 5 tasks are all solved.
    in_a_row: tuple[float, ...]
    # Tasks solved before the first that is not, 0 to 5, and its normal 95 % interval.
    average_length: float
    low: float
    high: float

    def __str__(self) -> str:
        shares = " / ".join(f"{100 * share:.1f}" for share in self.in_a_row)
        return (
            f"1 to {LINKS} in a row {shares} % of {self.chains} chains, average length "
            f"{self.average_length:.2f} [{self.low:.2f}, {self.high:.2f}]"
        )


def score_chains(lengths: Sequence[int]) -> ChainScore:
    """Score chains by how many of their tasks were solved in a row.

    Args:
        lengths: of each chain, 0 to 5; at least one.
    """
    counts = np.asarray(lengths)
    in_a_row = tuple(float((counts >= links).mean()) for links in range(1, LINKS + 1))
    mean = float(counts.mean())
    spread = float(counts.std(ddof=1)) if len(counts) > 1 else float(LINKS)
    reach = 1.96 * spread / math.sqrt(len(counts))
    low, high = max(mean - reach, 0.0), min(mean + reach, float(LINKS))
    return ChainScore(len(counts), in_a_row, mean, low, high)


def chain_lengths(
    solved: Mapping[tuple[str, int], bool], tasks: Sequence[str], seeds: Sequence[int]
) -> list[int]:
    """Return how far each seed's chain gets; none where there are fewer than five tasks.

    A seed draws five of the tasks and their order, the same for every policy; one that not every
    task was run with has no chain.

    Args:
        solved: of each (task, seed).
        tasks: to draw from.
        seeds: one chain each.
    """
    if len(tasks) < LINKS:
        return []
    whole = [seed for seed in seeds if all((task, seed) in solved for task in tasks)]
    return [_length([solved[task, seed] for task in _draw(tasks, seed)]) for seed in whole]


def _draw(tasks: Sequence[str], seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(tasks))[:LINKS]
    return [tasks[index] for index in order]


def _length(links: Sequence[bool]) -> int:
    return next((index for index, link in enumerate(links) if not link), len(links))
