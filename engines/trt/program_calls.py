"""The noun `RunCalls`: one run of a program as engines carry it out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qvla_export.shared.bundle import Bundle
from qvla_export.shared.program import PartRuns


@dataclass(frozen=True)
class RunCalls:
    """Which engines a run calls, and how its tensors come from one repetition to the next."""

    run: PartRuns
    # Part, and which of its engine's profiles holds this run's shapes.
    parts: tuple[tuple[str, int], ...]
    # Output -> input: they change memory before a repetition, and nothing is copied.
    exchanged: Mapping[str, str]
    # Output -> input that it is copied into.
    copied: Mapping[str, str]

    @property
    def sides(self) -> int:
        """Return how many sets of addresses its parts are called with, at most."""
        return 2 if self.exchanged and self.run.times > 1 else 1


def program_calls(bundle: Bundle, profiles: Mapping[str, int]) -> tuple[RunCalls, ...]:
    """Return all runs of a bundle's program.

    Args:
        bundle: whose program; see `require_fillable`.
        profiles: part -> profiles that its engine has: one where all runs call it with equal,
            fixed shapes.
    """
    before: Counter[str] = Counter()
    found = []
    for run in bundle.program.runs:
        parts = tuple((name, min(before[name], profiles[name] - 1)) for name in run.parts)
        exchanged = _exchanged(bundle, run)
        copied = {output: name for output, name in run.carry.items() if output not in exchanged}
        found.append(RunCalls(run, parts, exchanged, copied))
        before.update(run.parts)
    return tuple(found)


def _exchanged(bundle: Bundle, run: PartRuns) -> dict[str, str]:
    """Return what is carried on and can change places with what it is carried into.

    The output must be new in every repetition, no part of the run may read it under its own name
    before it is, and the input must be carried into once.
    """
    parts = [part for part in bundle.parts if part.name in run.parts]
    written = {spec.name for part in parts for spec in part.outputs}
    read = {spec.name for part in parts for spec in part.inputs}
    into = Counter(run.carry.values())
    return {
        output: name
        for output, name in run.carry.items()
        if output in written - read and into[name] == 1
    }
