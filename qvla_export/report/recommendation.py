"""What `qvla deploy` recommends, as the page shows it: words, errors by group, traces."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.report.cells import NONE, Cell, Table
from qvla_export.report.measured import damage_named, finite, read_object

_FORMAT = "qvla.recommendation/1"
# Names that `recommendation.json` gives to what is no setting.
FLOAT_POLICY = "float policy"
DEMONSTRATED = "demonstrated"
_FIELDS = (
    *("format", "calibration_digest", "setting", "sentences", "warnings", "commands"),
    *("action", "float_policy", "bounds", "settings", "traces"),
)


@dataclass(frozen=True)
class GroupFigures:
    """One group of the action's numbers: median and nine in ten."""

    unit: str
    # Distance from the float policy's actions.
    shift: tuple[float, float]
    # From the demonstrated ones; None where none were recorded.
    error: tuple[float, float] | None
    # What quantization adds, and the bound on it; None for the float policy, and where there is
    # no bound.
    added: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class NextLine:
    """One command to type."""

    where: str
    line: str
    purpose: str


@dataclass(frozen=True)
class Traces:
    """Action chunks of a few held-out observations, in the units of the labels."""

    # Of each number of an action: its name and unit.
    labels: tuple[str, ...]
    # Policy, setting or "demonstrated" -> NaN where nothing was.  float64 [chunks, horizon, dim]
    actions: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Recommended:
    """What is recommended, and what it was chosen by."""

    calibration_digest: str
    # None where nothing is recommended.
    setting: str | None
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    bounds: tuple[str, ...]
    commands: tuple[NextLine, ...]
    # Of an action's numbers, and where the names and units are from.
    names: tuple[str, ...]
    named_by: str
    # Setting -> its bundle's digest.
    bundles: Mapping[str, str]
    # Float policy and settings -> group -> figures.
    errors: Mapping[str, Mapping[str, GroupFigures]]
    traces: Traces


def read_recommendation(path: Path) -> Recommended:
    """Read what `pipeline.recommend` wrote.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    what = "recommendation"
    value = read_object(path, what, _FIELDS)
    with damage_named(path, what):
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']!r:.60}, not {_FORMAT!r}")
        action, rows = value["action"], value["settings"]
        if value["setting"] not in (None, *(row["setting"] for row in rows)):
            raise ValueError(f"{value['setting']!r:.60} is recommended and not among its settings")
        errors = {FLOAT_POLICY: _figures(value["float_policy"], {}, {})}
        bounds = {str(b["group"]): b["value"] for b in value["bounds"]}
        for row in rows:
            errors[str(row["setting"])] = _figures(row["open_loop"], row["added"], bounds)
        return Recommended(
            calibration_digest=str(value["calibration_digest"]),
            setting=None if value["setting"] is None else str(value["setting"]),
            sentences=_texts(value["sentences"]),
            warnings=_texts(value["warnings"]),
            bounds=_texts([bound["text"] for bound in value["bounds"]]),
            commands=tuple(
                NextLine(str(c["where"]), str(c["line"]), str(c["purpose"]))
                for c in value["commands"]
            ),
            names=_texts(action["names"]),
            named_by=f"names: {action['names_source']}; units: {action['units_source']}",
            bundles={str(row["setting"]): str(row["bundle_digest"]) for row in rows},
            errors=errors,
            traces=_traces(value["traces"], action),
        )


def open_loop_table(found: Recommended) -> Table:
    """Return errors against the demonstrations and what quantization adds, group by group."""
    first = next(iter(found.errors.values()))
    columns = ["Policy"]
    for group, figures in first.items():
        columns += [f"{group}: error, {figures.unit}", f"{group}: added, {figures.unit}"]
    rows = (
        (Cell(name), *(cell for figures in groups.values() for cell in _cells(figures)))
        for name, groups in found.errors.items()
    )
    return Table(tuple(columns), tuple(rows))


def _cells(figures: GroupFigures) -> Iterator[Cell]:
    if figures.error is None:
        yield Cell(NONE)
    else:
        yield Cell(f"{figures.error[0]:.3g}", f"9 in 10: {figures.error[1]:.3g}")
    if figures.added is None:
        yield Cell(NONE)
        return
    share = "no bound"
    if figures.bound is not None:
        share = "over the bound" if figures.added > figures.bound else "under the bound"
        if figures.bound:
            share += f" ({100 * figures.added / figures.bound:.0f} %)"
    moved = f"from float {figures.shift[0]:.2g}, 9 in 10 {figures.shift[1]:.2g}"
    yield Cell(f"{figures.added:.2g}", f"{share}; {moved}")


def _figures(
    value: Mapping[str, Any], added: Mapping[str, Any], bounds: Mapping[str, Any]
) -> dict[str, GroupFigures]:
    groups = {}
    for name, group in value["groups"].items():
        error = group["error"]
        groups[str(name)] = GroupFigures(
            unit=str(group["unit"]),
            shift=_pair(group["shift"]),
            error=None if error is None else _pair(error),
            added=float(finite(added[name])) if name in added else None,
            bound=None if bounds.get(name) is None else float(finite(bounds[name])),
        )
    if not groups:
        raise ValueError("no groups of numbers")
    return groups


def _pair(value: Mapping[str, Any]) -> tuple[float, float]:
    return float(finite(value["median"])), float(finite(value["p90"]))


def _traces(value: Mapping[str, Any], action: Mapping[str, Any]) -> Traces:
    units = action["units"]
    scale = finite([unit["scale"] for unit in units])
    labels = tuple(
        f"{name}, {unit['unit']}" for name, unit in zip(action["names"], units, strict=True)
    )
    chunks = {
        str(name): scale * np.array(values, np.float64)  # null becomes NaN
        for name, values in value["actions"].items()
    }
    shapes = {array.shape for array in chunks.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[-1] != len(labels):
        raise ValueError("traces differ in shape")
    return Traces(labels, chunks)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values))
