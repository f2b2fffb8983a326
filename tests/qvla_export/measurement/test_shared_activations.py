"""Processes that share the observations record the histograms of one, exactly."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.activation_statistics import ActivationStatistics
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


@dataclass
class Meeting:
    """Where threads that stand for processes add their arrays up."""

    size: int
    barrier: threading.Barrier = field(init=False)
    brought: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=120)


@dataclass
class Threads:
    rank: int
    meeting: Meeting
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce_sum(self, values: Any) -> Any:
        self.meeting.brought[self.rank] = values
        self.meeting.barrier.wait()
        sums = {n: sum(self.meeting.brought[r][n] for r in range(self.size)) for n in values}
        self.meeting.barrier.wait()
        return sums

    def broadcast(self, value: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("size", [2, 3])
def test_shares_make_the_histograms_of_the_whole(
    size: int, tiny_policy: OftPolicy, tiny_checkpoint: Path, tiny_observations: Make
) -> None:
    observations = tiny_observations(5)
    meeting = Meeting(size)

    def share(rank: int) -> ActivationStatistics:
        policy = load_oft_policy(tiny_checkpoint)
        return measure_activations(policy, observations, "c", None, Threads(rank, meeting))

    with ThreadPoolExecutor(size) as pool:
        shares = list(pool.map(share, range(size)))
    alone = measure_activations(tiny_policy, observations, "c")
    for found in shares:
        assert found.samples == alone.samples
        assert list(found.histograms) == list(alone.histograms)
        for name, histogram in alone.histograms.items():
            np.testing.assert_array_equal(found.histograms[name].counts, histogram.counts)
            assert found.histograms[name].exponent == histogram.exponent
            assert found.histograms[name].largest == histogram.largest


def test_more_processes_than_observations_are_refused(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    with pytest.raises(QvlaError, match="at least one observation a process, got 1 for 2"):
        measure_activations(tiny_policy, tiny_observations(1), "c", None, Threads(0, Meeting(2)))
