"""The noun `SoakReport`: what happened in hours of attacks, and which promises held."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jetson.clients.protocol_clients import ProtocolName
from qvla_export.pipeline.soak.driver import CommandCounts
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.artifacts import versions, write_json

_FORMAT = "qvla.soak/1"
QUIET, QUIET_AGAIN, ENGINE_FAULTS = "quiet", "quiet again", "engine faults"
STOPPED = "server stopped"
# Their replies take as long as the soak itself makes the engine or the server wait.
DELAYED = (ENGINE_FAULTS, STOPPED)
# A good client's p99 under attack over its quiet one.
MOST_SLOWER = 3.0
# Replies of the quiet phase from which on p99 is judged, in all phases: none is shorter than the
# quiet one of a single round, so that fewer replies are those of a slow server.
LEAST_REPLIES = 500
# Of memory, after all attacks over before them; and the shortest soak that is judged by it.
MOST_MEMORY = 1.10
LEAST_HOURS = 0.1
# Sockets that the kernel has not yet told the server about.
MOST_DESCRIPTORS = 8

Tallies = Mapping[tuple[str, ProtocolName], Tally]


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    # Since the start.
    seconds: float
    resident_bytes: int
    descriptors: int


@dataclass(frozen=True)
class Promise:
    """One of what docs/security.md promises, and whether it held; None where it was not judged."""

    text: str
    holds: bool | None
    figure: str


@dataclass(frozen=True)
class SoakReport:
    """All counts of a soak."""

    hours: float
    seed: int
    # Where the attacker ran, in words.
    attacker: str
    encrypted: bool
    # Phase and protocol -> good clients' requests, attackers' requests.
    good: Tallies
    attacks: Tallies
    # First of them after the quiet phase, last after everything.
    samples: Sequence[Sample]
    commands: CommandCounts
    # What went wrong beside requests and commands.
    faults: Sequence[str]
    has_own_core: bool = False
    made_with: Mapping[str, str] = field(default_factory=versions)

    @property
    def promises(self) -> list[Promise]:
        """Return what was promised."""
        wrong = sum(t.wrong.total() for t in (*self.good.values(), *self.attacks.values()))
        refused = sum(
            tally.refused.total() - (tally.refused["engine fault"] if phase == ENGINE_FAULTS else 0)
            for (phase, _), tally in self.good.items()
        )
        answered = min((t.answered for t in self.good.values()), default=0)
        commands = self.commands
        return [
            Promise(
                "no wrong answer, and an answer to every request", wrong == 0, f"{wrong} wrong"
            ),
            Promise("no good client refused because of others", refused == 0, f"{refused} refused"),
            Promise(
                "every good client answered in every phase",
                answered > 0,
                f"at least {answered} answers",
            ),
            self._latency(),
            self._memory(),
            self._descriptors(),
            Promise(
                "no command older than its bound, not finite, out of limits or in a burst",
                commands.taken > 0 and commands.broken == 0,
                f"{commands.taken} commands, {commands.broken} wrong",
            ),
            Promise("nothing died", not self.faults, "; ".join(self.faults) or "nothing did"),
        ]

    @property
    def ok(self) -> bool:
        """Whether no promise was broken."""
        return all(promise.holds is not False for promise in self.promises)

    def slower(self) -> dict[tuple[str, ProtocolName], float]:
        """Return each phase's p99 of good clients over that of the quiet phase."""
        return {
            key: _p99(tally) / _p99(self.good[QUIET, key[1]])
            for key, tally in self.good.items()
            if key[0] not in (QUIET, STOPPED)
            and tally.times_ms
            and self.good[QUIET, key[1]].times_ms
        }

    def slope(self, name: str) -> float:
        """Return by how much a field of the samples grows an hour, over their second half."""
        half = self.samples[len(self.samples) // 2 :]
        if len(half) < 2:
            return 0.0
        hours = [sample.seconds / 3600.0 for sample in half]
        return float(np.polyfit(hours, [getattr(sample, name) for sample in half], 1)[0])

    def _latency(self) -> Promise:
        text = f"a good client's p99 under attack at most {MOST_SLOWER:g} times the quiet one"
        slower = {key: value for key, value in self.slower().items() if key[0] not in DELAYED}
        if not slower:
            return Promise(text, None, "nothing to compare")
        (phase, protocol), worst = max(slower.items(), key=lambda item: item[1])
        judged = ", ".join(dict.fromkeys(phase for phase, _ in slower))
        left_out = ", ".join(
            phase for phase in DELAYED if any(phase == key[0] for key in self.good)
        )
        figure = f"{worst:.2f} times ({phase}, {protocol}) of {judged}"
        if left_out:
            figure += f"; left out, since the soak itself delays replies: {left_out}"
        fewest = min(len(self.good[QUIET, name].times_ms) for _, name in slower)
        if not self.has_own_core or fewest < LEAST_REPLIES:
            why = "attacker and server share a core" if not self.has_own_core else "too few replies"
            return Promise(text, None, f"{figure}; not judged: {why}")
        return Promise(text, worst <= MOST_SLOWER, figure)

    def _memory(self) -> Promise:
        text = "memory comes back to within 10 %"
        before, after = (self.samples[i].resident_bytes / 1e6 for i in (0, -1))
        figure = f"{before:.1f} MB, then {after:.1f} MB{self._hourly('resident_bytes', 1e6)}"
        if self.hours < LEAST_HOURS:
            # An allocator's heap settles in minutes: what it holds says nothing yet.
            return Promise(text, None, f"{figure}; not judged: shorter than {LEAST_HOURS:g} hours")
        return Promise(text, after <= MOST_MEMORY * before, figure)

    def _descriptors(self) -> Promise:
        before, after = (self.samples[i].descriptors for i in (0, -1))
        return Promise(
            "descriptors come back",
            after <= before + MOST_DESCRIPTORS,
            f"{before}, then {after}{self._hourly('descriptors', 1.0)}",
        )

    def _hourly(self, name: str, unit: float) -> str:
        """Return a slope in words; nothing where seconds would have to stand for an hour."""
        return "" if self.hours < LEAST_HOURS else f", {self.slope(name) / unit:+.1f} an hour"

    def to_json(self) -> dict[str, Any]:
        """Return everything, without the single times."""
        return {
            "format": _FORMAT,
            "hours": self.hours,
            "seed": self.seed,
            "attacker": self.attacker,
            "encrypted": self.encrypted,
            "ok": self.ok,
            "promises": [asdict(promise) for promise in self.promises],
            "good_clients": _tallies_json(self.good),
            "attackers": _tallies_json(self.attacks),
            "p99_over_quiet": {f"{a}, {b}": round(v, 3) for (a, b), v in self.slower().items()},
            "server": {
                "samples": [asdict(sample) for sample in self.samples],
                "resident_bytes_per_hour": self.slope("resident_bytes"),
                "descriptors_per_hour": self.slope("descriptors"),
            },
            "commands": asdict(self.commands),
            "faults": list(self.faults),
            "versions": dict(self.made_with),
        }

    def save(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_json())


def percentiles_ms(tally: Tally) -> tuple[float, float] | None:
    """Return p50 and p99 of the round trips; None without any."""
    if not tally.times_ms:
        return None
    return float(np.percentile(tally.times_ms, 50)), _p99(tally)


def _p99(tally: Tally) -> float:
    return float(np.percentile(tally.times_ms, 99))


def _tallies_json(tallies: Tallies) -> list[dict[str, Any]]:
    rows = []
    for (phase, protocol), tally in tallies.items():
        found = percentiles_ms(tally)
        times = {} if found is None else {"p50_ms": found[0], "p99_ms": found[1]}
        rows.append(
            {
                "phase": phase,
                "protocol": protocol,
                "sent": tally.sent,
                "answered": tally.answered,
                "refused": dict(tally.refused),
                "wrong": dict(tally.wrong),
                **times,
            }
        )
    return rows
