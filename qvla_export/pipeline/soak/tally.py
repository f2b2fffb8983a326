"""What became of requests: counts by phase, protocol and reason."""

import re
from collections import Counter
from dataclasses import dataclass, field

# Pattern of a reason -> what it counts as; the first that fits.
_KINDS = (
    (r"shutting down|are waiting|are connected|as many bytes|has not ended", "busy"),
    (r"policy (failed|returned|must return|put out)", "engine fault"),
    (r"\b413\b|too (large|long|big)|may have|at most|no camera|bytes", "too much"),
    (r"in time|arriving|trickl", "too slow"),
    (
        r"\b(400|422)\b|must|needs|missing|JSON|msgpack|unknown|not |damaged|a message is",
        "malformed",
    ),
)
NO_REPLY = "no reply"


@dataclass
class Tally:
    """Requests of one kind of peer in one protocol."""

    sent: int = 0
    answered: int = 0
    # Reason in a word or two -> how many requests were refused for it.
    refused: Counter[str] = field(default_factory=Counter)
    # Answers to another request than the one sent, and failures of the server's own.
    wrong: Counter[str] = field(default_factory=Counter)
    # Of those answered: round trip.
    times_ms: list[float] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Count a request that got a reason instead of an action."""
        if "the server failed" in reason:
            self.wrong[reason[:120]] += 1
        else:
            self.refused[kind_of(reason)] += 1

    def add(self, other: "Tally") -> None:
        """Count what another counted too."""
        self.sent += other.sent
        self.answered += other.answered
        self.refused += other.refused
        self.wrong += other.wrong


def kind_of(reason: str) -> str:
    """Return what a reason counts as."""
    for pattern, kind in _KINDS:
        if re.search(pattern, reason):
            return kind
    return "other"
