"""The one interface of all estimators: what they are asked, and what they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.distributed import Alone, World
from qvla_export.measurement.moment_bounds import MomentSettings
from qvla_export.measurement.sharded_sums import OnProgress, remove_journals
from qvla_export.policies.base import Policy
from qvla_export.quantizer.moments import SHARES, Moments
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# Steps of an estimator that keep a journal of their own; "" is the main one.
_STEPS = ("", "proxy", "exact")


@dataclass(frozen=True)
class ChannelWidth:
    """One channel at one width: a pair, what an exact measurement is of."""

    layer: str
    channel: int
    bits: int


@dataclass(frozen=True)
class Question:
    """Whose sensitivities are asked for, on which observations, at which widths."""

    # Float32; its weights stay as they are.
    policy: Policy
    # At least one.
    observations: Sequence[Observation]
    # Digest of the set that the observations came from.
    calibration_digest: str
    quantizer: QuantizerSpec
    widths: tuple[int, ...] = (0, 2, 4, 8)
    # Observations of each episode, one after the other; empty where not known.
    episode_lengths: tuple[int, ...] = ()
    # Of random probes.
    seed: int = 0
    # Observations that run together; memory grows with it.
    batch_size: int = 8
    # Where the quantizer needs them; estimators of first order take them.
    moments: Moments | None = None
    # Or how they measure them on the way: of a policy whose weights were left on disk.
    span_moments: MomentSettings | None = None
    # Whether each step of a flow is looked at by itself, instead of the action that they make.
    per_step: bool = False

    def __post_init__(self) -> None:
        if not self.observations or self.batch_size < 1:
            raise QvlaError(
                "sensitivities need at least one observation and a batch_size of at least 1, got "
                f"{len(self.observations)} and {self.batch_size}"
            )
        if self.episode_lengths and sum(self.episode_lengths) != len(self.observations):
            raise QvlaError(
                f"episodes of {sum(self.episode_lengths)} observations in all do not make up "
                f"{len(self.observations)} observations; give the length of every episode"
            )

    @property
    def shares(self) -> NDArray[np.float64] | None:
        """Return what each observation counts, see `Moments.shares`; None for all alike."""
        return None if self.moments is None else self.moments.shares(len(self.observations))

    @property
    def stated_shares(self) -> Mapping[str, Any]:
        """Return what `Sensitivities.settings` say of them; nothing where all count alike.

        With moments that are measured on the way, shares are as well.
        """
        alike = self.shares is None and self.span_moments is None
        return {} if alike else {"shares": SHARES}


@dataclass(frozen=True)
class Work:
    """How a measurement is kept, shown and shared; changes no number."""

    # Progress is saved here; a killed measurement that finds it goes on. None keeps nothing.
    progress_file: Path | None = None
    # Called with (work done, work in all).
    on_progress: OnProgress | None = None
    world: World = field(default_factory=Alone)

    def step(self, name: str) -> "Work":
        """Return the work of one step of the measurement, with a journal of its own."""
        assert name in _STEPS
        journal = self.progress_file
        return (
            self if journal is None else replace(self, progress_file=_step_journal(journal, name))
        )


# Nothing kept, nothing shown, one process.
QUIETLY = Work()


class Estimator(Protocol):
    """A way to tell what quantizing each channel to each width does to the action."""

    # What `Sensitivities.method` says.
    @property
    def method(self) -> str: ...

    # What else tells one measurement of this method from another; JSON.
    @property
    def settings(self) -> Mapping[str, Any]: ...

    # Share of all (channel, width) pairs that are measured one by one, each at the cost of a pass.
    @property
    def exact_share(self) -> float: ...

    def table(self, question: Question, work: Work = ...) -> Sensitivities:
        """Estimate every channel at every width.

        Raises:
            QvlaError: the question lacks what the method needs.
        """
        ...

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = ...
    ) -> NDArray[np.float64]:
        """Estimate some pairs, as `table` would, with no more work than they need.

        float64 [pairs]

        Raises:
            QvlaError: the question lacks what the method needs, the policy a layer or channel.
        """
        ...


def all_pairs(shapes: Mapping[str, tuple[int, int]], widths: Sequence[int]) -> list[ChannelWidth]:
    """Return every channel at every width: by layer, then width, then channel."""
    return [
        ChannelWidth(name, channel, bits)
        for name, (channels, _) in shapes.items()
        for bits in widths
        for channel in range(channels)
    ]


def looked_up(table: Sensitivities, pairs: Sequence[ChannelWidth]) -> NDArray[np.float64]:
    """Return a table's values of some pairs.  float64 [pairs]

    Raises:
        QvlaError: the table has no such channel or width.
    """
    for pair in pairs:
        if not 0 <= pair.channel < table.values.get(pair.layer, np.zeros((1, 0))).shape[1]:
            raise QvlaError(f"the policy has no channel {pair.channel} of layer {pair.layer!r}")
    return np.array([table.at(p.layer, p.bits)[p.channel] for p in pairs], np.float64)


def remove_progress(journal: Path) -> None:
    """Remove the journals of all steps and processes, once the result is safe."""
    for name in _STEPS:
        remove_journals(_step_journal(journal, name))


def _step_journal(journal: Path, name: str) -> Path:
    return journal.with_name(f"{journal.name}-{name}") if name else journal
