"""The nouns `Check` and `BoardFinding`: a setting that was looked at, and what was found."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

# "error": the policy does not run or acts wrongly. "warning": it runs, later than it could, or may
# fail. "unknown": it cannot be told here. "not applicable": there is nothing to look at.
Severity = Literal["error", "warning", "unknown", "ok", "not applicable"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "unknown", "ok", "not applicable")
# A finding of these needs somebody to do something.
_TO_MEND: tuple[Severity, ...] = ("error", "warning", "unknown")


@dataclass(frozen=True)
class BoardFinding:
    """What was found of one setting.

    Raises:
        ValueError: something is to be mended and nothing says how.
    """

    # Which setting: "clocks locked".
    what: str
    severity: Severity
    # Its value here; for "not applicable" the reason.
    observed: str
    # The value it should have; empty where nothing is asked for.
    wanted: str
    # What goes wrong otherwise.
    why: str
    # Command or exact edit that mends it, or that makes it known; empty where nothing is wrong.
    remedy: str

    def __post_init__(self) -> None:
        if self.severity in _TO_MEND and not (self.remedy and self.observed):
            raise ValueError(f"a finding that is {self.severity} needs a remedy, got {self}")

    @property
    def is_wrong(self) -> bool:
        """Whether the setting is known to be wrong."""
        return self.severity in ("error", "warning")

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """A setting, why it matters, and what it should be; its verbs make findings."""

    what: str
    why: str
    wanted: str = ""

    def ok(self, observed: str) -> BoardFinding:
        """Return that nothing is wrong."""
        return BoardFinding(self.what, "ok", observed, self.wanted, self.why, "")

    def inapplicable(self, reason: str) -> BoardFinding:
        """Return that there is nothing to look at, and why."""
        return BoardFinding(self.what, "not applicable", reason, self.wanted, self.why, "")

    def unknown(self, observed: str, remedy: str) -> BoardFinding:
        """Return that it cannot be told here, and what would tell."""
        return BoardFinding(self.what, "unknown", observed, self.wanted, self.why, remedy)

    def warning(self, observed: str, remedy: str, wanted: str = "") -> BoardFinding:
        """Return that the policy runs later than it could, or may fail."""
        return BoardFinding(self.what, "warning", observed, wanted or self.wanted, self.why, remedy)

    def error(self, observed: str, remedy: str, wanted: str = "") -> BoardFinding:
        """Return that the policy does not run or acts wrongly."""
        return BoardFinding(self.what, "error", observed, wanted or self.wanted, self.why, remedy)


def sort_findings(findings: Iterable[BoardFinding]) -> tuple[BoardFinding, ...]:
    """Return findings, the worst first, otherwise in their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def count(findings: Iterable[BoardFinding], severity: Severity) -> int:
    """Return how many findings are of a severity."""
    return sum(finding.severity == severity for finding in findings)


def summary(findings: Iterable[BoardFinding]) -> str:
    """Return one line that names what is wrong and mends it; empty if nothing is."""
    return "; ".join(
        f"{finding.what}: {finding.observed} ({finding.remedy})"
        for finding in sort_findings(findings)
        if finding.is_wrong
    )
