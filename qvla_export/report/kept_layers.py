"""The table of layers that no plan quantizes: what they would do to the action, and why not."""

import re
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.layer_names import WHY_KEPT, kept_kind_of
from qvla_export.report.cells import Cell, Table
from qvla_export.report.run_data import RunData
from qvla_export.sensitivity.sensitivities import Sensitivities

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Width that rows are sorted by: the one that plans are usually near.
_USUAL = 4


def kept_table(measured: Sensitivities | None) -> Table:
    """Return a row for each layer, like ones of several blocks together; the most sensitive first.

    No rows where nothing was measured.
    """
    widths = () if measured is None else measured.widths
    names = ("Stays in 16 bits", "Kind", "Weights", *(f"{b} bits would do" for b in widths), "Why")
    if measured is None:
        return Table(names, ())
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in measured.values:
        groups[_NUMBER.sub("*", layer)].append(layer)
    usual = widths.index(_USUAL)
    rows = {name: _sums(measured, layers) for name, layers in groups.items()}
    order = sorted(rows, key=lambda name: -float(rows[name][usual].sum()))
    return Table(names, tuple(_row(measured, n, groups[n], rows[n]) for n in order))


def kept_caption(data: RunData) -> str:
    """Return what the table was measured on, and what quantized layers come to beside it."""
    measured, kept = data.sensitivities, data.kept_layers
    assert kept is not None
    text = (
        "Expected squared deviation of the normalized action chunk if all channels of a layer had "
        f"one width: {kept.method}, nearest codes, {kept.samples} observations. No plan quantizes "
        "these layers."
    )
    if _USUAL not in measured.widths:
        return text
    whole = sum(float(measured.at(name, _USUAL).sum()) for name in measured.values)
    codes = "compensated" if measured.quantizer.needs_moments else "nearest"
    return f"{text} All quantized layers at {_USUAL} bits, {codes} codes: {whole:.3g}."


def _sums(measured: Sensitivities, layers: list[str]) -> NDArray[np.float64]:
    """Sums over channels.  float64 [widths, layers]"""
    return np.stack([measured.values[name].sum(axis=1, dtype=np.float64) for name in layers], 1)


def _row(
    measured: Sensitivities, name: str, layers: list[str], sums: NDArray[np.float64]
) -> tuple[Cell, ...]:
    weights = sum(measured.values[n].shape[1] * measured.weights_per_channel[n] for n in layers)
    kind, several = kept_kind_of(layers[0]), len(layers) > 1
    return (
        Cell(name, f"{len(layers)} layers" if several else ""),
        Cell(kind),
        Cell(f"{weights:,}"),
        *(
            Cell(f"{row.sum():.3g}", f"at most {row.max():.3g} of one" if several else "")
            for row in sums
        ),
        Cell(WHY_KEPT[kind]),
    )
