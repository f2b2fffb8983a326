"""The bars that a comparison is held against, and what was result of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qvla_export.comparison.comparison import FLOAT, Comparison
from qvla_export.comparison.contestants import Contestant, parse_contestant
from qvla_export.comparison.rows import Row

# Mean bits -> points by which success may be below float's.
_POINTS = {8.0: 1.0, 4.0: 2.0, 3.0: 5.0}
# Mean bits -> share of float's success to keep.
_KEPT = {2.5: 0.85}
# Of the best baseline's action error, at equal or fewer bytes; at these mean bits.
_ERROR_SHARE = 0.6
_ERROR_BITS = (4, 3, 2)
# Paired episodes a setting needs.
_EPISODES = 200


@dataclass(frozen=True)
class Bar:
    """One bar."""

    # What is to be reached, and what was measured, in words with numbers.
    requirement: str
    result: str
    # None where what it needs was not measured.
    met: bool | None

    @property
    def verdict(self) -> str:
        """Return the verdict in one word or two."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def bars(comparison: Comparison) -> tuple[Bar, ...]:
    """Return all bars, in the order they are stated."""
    return tuple(_all(comparison))


def rivals(comparison: Comparison, bits: float) -> list[Row]:
    """Return the baselines of so many bits with float inputs: libraries' and round to nearest."""
    return _rows(
        comparison,
        bits,
        lambda c: c.kind == "library" or c.of_run.kind == "uniform",
    )


def ours(comparison: Comparison, bits: float) -> list[Row]:
    """Return what is planned by sensitivities with so many mean bits and float inputs."""
    return _rows(comparison, bits, lambda c: c.ours and c.observations is None)


def best_of_ours(comparison: Comparison, bits: float, most_bytes: float) -> Row | None:
    """Return the one of least action error within so many bytes."""
    fitting = [row for row in ours(comparison, bits) if row.weight_bytes <= most_bytes]
    return min(fitting, key=lambda row: row.rms, default=None)


def _rows(comparison: Comparison, bits: float, chosen: Callable[[Contestant], bool]) -> list[Row]:
    named = [(parse_contestant(row.name), row) for row in comparison.rows]
    return [row for c, row in named if c.bits == bits and c.activation_bits is None and chosen(c)]


def _all(comparison: Comparison) -> Iterator[Bar]:
    reference = comparison.row(FLOAT)
    for bits, points in _POINTS.items():
        requirement = f"{bits:g} mean bits: success within {points:g} points of float"
        yield _success_bar(comparison, reference, bits, requirement, -points / 100)
    for bits, share in _KEPT.items():
        requirement = f"{bits:g} mean bits: at least {share:.0%} of float's success"
        success = None if reference is None else reference.success
        least = 0.0 if success is None else (share - 1) * success
        yield _success_bar(comparison, reference, bits, requirement, least)
    for bits in _ERROR_BITS:
        yield _error_bar(comparison, bits)


def _success_bar(
    comparison: Comparison, reference: Row | None, bits: float, requirement: str, least: float
) -> Bar:
    # Of several ways to store so many bits: the one that is chosen without episodes.
    played = [r for r in ours(comparison, bits) if r.episodes and parse_contestant(r.name).main]
    row = min(played, key=lambda r: r.rms, default=None)
    paired = None if row is None or reference is None else row.against(reference)
    if paired is None or row is None:
        return Bar(requirement, "no paired episodes", None)
    result = (
        f"{row.name} {100 * paired.value:+.1f} points [{100 * paired.low:+.1f}, "
        f"{100 * paired.high:+.1f}] on {paired.episodes} paired episodes"
    )
    if paired.episodes < _EPISODES:
        return Bar(requirement, f"{result}, fewer than {_EPISODES}", None)
    # Shares of whole episodes: no rounding may decide.
    return Bar(requirement, result, paired.value >= least - 1e-9)


def _error_bar(comparison: Comparison, bits: float) -> Bar:
    requirement = (
        f"{bits:g} bits: action error at most {_ERROR_SHARE:g} of the best baseline's at equal or "
        "fewer bytes"
    )
    best = min(rivals(comparison, bits), key=lambda row: row.rms, default=None)
    if best is None:
        return Bar(requirement, "no baseline", None)
    mine = best_of_ours(comparison, bits, best.weight_bytes)
    if mine is None:
        return Bar(requirement, f"none of ours within {best.weight_bytes:,.0f} bytes", None)
    share = mine.rms / best.rms
    result = (
        f"{share:.2f}: {mine.name} {mine.rms:.4g} RMS in {mine.weight_bytes:,.0f} bytes, "
        f"{best.name} {best.rms:.4g} in {best.weight_bytes:,.0f}"
    )
    return Bar(requirement, result, share <= _ERROR_SHARE)
