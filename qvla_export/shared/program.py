"""The noun `Program`: how a bundle's parts run for one action.

A policy that decodes token by token, or integrates a flow, runs some parts several times: what they
put out becomes what they read. All arithmetic is in the graphs; a program only says what is run how
often and which tensor goes where, so that engines know no family.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from qvla_export.shared.errors import ArtifactError

# More repetitions than any policy needs; a damaged number must not keep a robot busy.
MOST_TIMES = 1000
_Value = TypeVar("_Value")


class ProgramError(ArtifactError):
    """A program cannot be run; the message says where and why."""


@dataclass(frozen=True)
class PartRuns:
    """Parts that run one after the other, `times` times.

    A part reads each input under its own name: of the bundle's inputs, or what an earlier part, of
    this repetition or before, put out last.
    """

    # "prefill", "decode"; of a part that runs once by itself, the part's.
    name: str
    parts: tuple[str, ...]
    times: int = 1
    # Input of these parts -> the value it is at first, where that has another name.
    start: Mapping[str, str] = field(default_factory=dict)
    # Output of these parts -> input that it is from the next repetition on.
    carry: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """All runs of a bundle's parts, in order."""

    runs: tuple[PartRuns, ...]

    @staticmethod
    def straight(parts: Iterable[str]) -> "Program":
        """Return the program that runs every part once, in order."""
        return Program(tuple(PartRuns(name, (name,)) for name in parts))

    @property
    def calls(self) -> Mapping[str, int]:
        """Return how often each part is called for one action, by its name."""
        counts: Counter[str] = Counter()
        for run in self.runs:
            for part in run.parts:
                counts[part] += run.times
        return dict(counts)


def run_program(
    program: Program,
    reads: Mapping[str, Iterable[str]],
    feeds: Mapping[str, _Value],
    call: Callable[[PartRuns, str, dict[str, _Value]], Mapping[str, _Value]],
) -> dict[str, _Value]:
    """Run a program with any kind of value: arrays, a runtime's tensors, shapes.

    Args:
        program: what to run. What it carries on is let go once the last part that reads it has
            run: caches of a whole network are never there twice.
        reads: part name -> names of its inputs.
        feeds: the bundle's inputs by name.
        call: runs one part: the run it belongs to, its name, its inputs by name -> its outputs.

    Returns:
        Every value by name: the feeds, and what each part put out last.

    Raises:
        ProgramError: a part is unknown or reads what nothing has provided yet.
    """
    values = dict(feeds)
    for run in program.runs:
        renamed = {name: _look_up(values, source, run) for name, source in run.start.items()}
        spent = _last_reads(run, reads)
        for repetition in range(run.times):
            for number, part in enumerate(run.parts):
                if part not in reads:
                    raise ProgramError(f"run {run.name!r} names part {part!r}, there is no such")
                inputs = {
                    name: renamed[name] if name in renamed else _look_up(values, name, run)
                    for name in reads[part]
                }
                values |= call(run, part, inputs)
                for name in spent.get(number, ()):
                    renamed.pop(name, None)
            if repetition + 1 < run.times:
                renamed |= {name: _look_up(values, out, run) for out, name in run.carry.items()}
    return values


def _last_reads(run: PartRuns, reads: Mapping[str, Iterable[str]]) -> dict[int, list[str]]:
    """Return the number of a part in a run -> carried inputs that no later part of it reads."""
    last = {
        name: number
        for number, part in enumerate(run.parts)
        for name in reads.get(part, ())
        if name in run.carry.values()
    }
    spent: dict[int, list[str]] = {}
    for name, number in last.items():
        spent.setdefault(number, []).append(name)
    return spent


def _look_up(values: Mapping[str, _Value], name: str, run: PartRuns) -> _Value:
    if name not in values:
        raise ProgramError(
            f"run {run.name!r} reads {name!r} before anything provides it; there are "
            f"{sorted(values)}"
        )
    return values[name]


def program_to_json(program: Program) -> list[dict[str, Any]]:
    """Return what a manifest stores of a program."""
    return [asdict(run) for run in program.runs]


def program_from_json(value: Any) -> Program:
    """Rebuild a program from a manifest.

    Raises:
        ProgramError: it is not a list of runs with a name, parts, times, start and carry.
    """
    if not isinstance(value, list) or not value:
        raise ProgramError(f"a program must be a list of runs, got {value!r:.80}")
    return Program(tuple(_run_from_json(entry) for entry in value))


def _run_from_json(value: Any) -> PartRuns:
    fields = {"name", "parts", "times", "start", "carry"}
    if not isinstance(value, dict) or set(value) != fields:
        raise ProgramError(f"a run must have exactly {sorted(fields)}, got {value!r:.200}")
    name, parts, times = value["name"], value["parts"], value["times"]
    if not isinstance(name, str) or not name:
        raise ProgramError(f"a run needs a name, got {name!r:.80}")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ProgramError(f"run {name!r} needs a list of part names, got {parts!r:.80}")
    if type(times) is not int:
        raise ProgramError(f"run {name!r} needs a whole number of times, got {times!r:.80}")
    maps = (value["start"], value["carry"])
    if not all(isinstance(m, dict) and all(isinstance(v, str) for v in m.values()) for m in maps):
        raise ProgramError(f"start and carry of run {name!r} must map names to names")
    return PartRuns(name, tuple(parts), times, *maps)
