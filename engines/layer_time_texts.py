"""Layers' times for a terminal: the slowest, and the time by width and by kind of node."""

from collections.abc import Iterator

from engines.layer_times import LayerTimes, TimeShare
from qvla_export.shared.tables.text_table import TextTable

_SLOWEST = 15


def layer_texts(name: str, times: LayerTimes) -> Iterator[str | TextTable]:
    """Yield what the times of a bundle's layers are of, then their tables."""
    text = (
        f"{name}: layers on {times.runtime}, medians of {times.passes} passes, "
        f"{times.total_ms:.2f} ms in all"
    )
    if all(not row.layer for row in times.rows):
        text += "; export the bundle anew: its nodes do not name the policy's layers"
    yield text
    slowest = times.by_layer()
    yield _shares(f"layer, {_SLOWEST} slowest of {len(slowest)}", slowest[:_SLOWEST])
    yield _shares("channels by width", times.by_width())
    yield _shares("kind of node", times.by_op_type())


def _shares(first: str, shares: tuple[TimeShare, ...]) -> TextTable:
    return TextTable((first, "nodes", "ms", "share")).with_rows(
        (share.name, str(share.nodes), f"{share.ms:.3f}", f"{share.share:.1%}") for share in shares
    )
