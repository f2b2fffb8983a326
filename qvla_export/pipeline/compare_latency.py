"""The step that says what changed between latencies, and whether it is more than noise."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jetson.latency.regression import LatencyChange


def compare_latency_files(
    base: Path,
    new: Path | None = None,
    base_name: str | None = None,
    new_name: str | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
    allow_different: bool = False,
) -> "tuple[LatencyChange, ...]":
    """Compare the profiles of two latency files, or the policies of one run in pairs.

    Args:
        base: latency JSON of what was, see `qvla_export.pipeline.profile`.
        new: latency JSON of what is; None compares the policies in `base`.
        base_name: the profile there; None for those of equal names, or the first of one run.
        new_name: the profile here.
        tolerance: share by which the new one may be slower.
        seed: of the bootstrap.
        allow_different: compare other machines, targets and transports all the same.

    Raises:
        QvlaError: a file cannot be read, or it is not clear which profiles belong together.
    """
    from jetson.latency.comparison import LatencyComparison
    from jetson.latency.regression import compare_latency, match_profiles, pair_profiles

    before = LatencyComparison.load(base)
    if new is None:
        pairs = pair_profiles(before, base_name, new_name)
    else:
        pairs = match_profiles(before, LatencyComparison.load(new), base_name, new_name)
    return tuple(
        compare_latency(old, young, new is None, tolerance, seed, allow_different)
        for old, young in pairs
    )
