"""The widths of a plan's channels as an HTML table, by module."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.layer_names import module_of
from qvla_export.shared.tables.html_table import html_table
from qvla_export.shared.target import WIDTHS


def width_table(
    title: str, widths: Mapping[str, NDArray[np.int8]], provenance: Mapping[str, str]
) -> str:
    """Return how many channels of each module have each width, and their mean; HTML.

    Args:
        title: one line.
        widths: layer name -> width of each channel.  int8 [channels]
        provenance: what the widths were chosen from, by name.
    """
    modules: dict[str, list[NDArray[np.int8]]] = {}
    for layer, layer_widths in widths.items():
        modules.setdefault(module_of(layer), []).append(layer_widths)
    rows = [_row(module, layers) for module, layers in modules.items()]
    rows.append(_row("All", list(widths.values())))
    columns = ("Module", "Channels", *(f"{bits} bits" for bits in WIDTHS), "Mean bits")
    return html_table(title, columns, rows, provenance)


def _row(name: str, layers: Sequence[NDArray[np.int8]]) -> tuple[str, ...]:
    widths = np.concatenate(layers)
    counts = (f"{int((widths == bits).sum()):,}" for bits in WIDTHS)
    return (name, f"{len(widths):,}", *counts, f"{widths.mean():.2f}")
