"""The noun `LayerTimes`: what each node of the runtime's own graph took, pass by pass.

Taken in passes of their own: reporting costs time, and the sum of layers is not an action's time.
Names are the runtime's; where they say so (`shared.node_names`) also the policy's layer and
width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.node_names import parse_node_name

# Field -> key on disk.
_TEXTS = {"part": "stage", "name": "name", "op_type": "op_type", "layer": "layer"}
_LONGEST_MS = 1e9


@dataclass(frozen=True)
class LayerTime:
    """One node as the runtime runs it; it may be several of the graph's, fused."""

    # Of the bundle, by its name.
    part: str
    # The runtime's name and kind of the node.
    name: str
    op_type: str
    # The policy's layer; empty where the node serves none, or several.
    layer: str
    # Width of the channels it multiplies; None where it serves all, or is not quantized.
    bits: int | None
    # float64 [passes]
    samples_ms: NDArray[np.float64]

    @staticmethod
    def of_node(part: str, name: str, op_type: str, samples_ms: NDArray[np.float64]) -> "LayerTime":
        """Return the time of a node whose name says which layer and width it serves, or none."""
        named = parse_node_name(name)
        layer, bits = ("", None) if named is None else (named.layer, named.bits)
        return LayerTime(part, name, op_type, layer, bits, samples_ms)

    @property
    def median_ms(self) -> float:
        """Median over the passes."""
        return float(np.median(self.samples_ms))


@dataclass(frozen=True)
class TimeShare:
    """What one group of nodes took of a pass."""

    name: str
    nodes: int
    # Sum of the nodes' medians: what interrupts single passes counts nowhere, and shares add up.
    ms: float
    # Of all nodes' sum.
    share: float


@dataclass(frozen=True)
class LayerTimes:
    """All nodes in the order they ran.

    Raises:
        ArtifactError: there are none, or passes differ in number, or a time is not finite.
    """

    # Runtime with its version, and how it was asked.
    runtime: str
    rows: tuple[LayerTime, ...]

    def __post_init__(self) -> None:
        shapes = {row.samples_ms.shape for row in self.rows}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not self.passes:
            raise ArtifactError(
                f"layer times need equally many passes of every node, got {sorted(shapes)[:4]}"
            )
        times = np.stack([row.samples_ms for row in self.rows])
        if not ((times >= 0) & (times <= _LONGEST_MS)).all():
            raise ArtifactError("layer times must be finite times >= 0 ms")

    @property
    def passes(self) -> int:
        """How often every node was timed."""
        return int(self.rows[0].samples_ms.size)

    @property
    def total_ms(self) -> float:
        """Sum of all nodes' medians."""
        return sum(row.median_ms for row in self.rows)

    def by_layer(self) -> tuple[TimeShare, ...]:
        """Return the time by policy layer, slowest first; what serves none is by its own name."""
        return self._group(lambda row: row.layer or row.name)

    def by_width(self) -> tuple[TimeShare, ...]:
        """Return the time of the products of each width, of the layers' other nodes, the rest."""
        return self._group(_width)

    def by_op_type(self) -> tuple[TimeShare, ...]:
        """Return the time by the runtime's kinds of node, slowest first."""
        return self._group(lambda row: row.op_type)

    def to_json(self) -> dict[str, Any]:
        """Return all samples as JSON values."""
        rows = [
            {
                **{key: getattr(row, name) for name, key in _TEXTS.items()},
                "bits": row.bits,
                "samples_ms": np.round(row.samples_ms, 6).tolist(),
            }
            for row in self.rows
        ]
        return {"runtime": self.runtime, "rows": rows}

    @classmethod
    def from_json(cls, value: Any) -> "LayerTimes":
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
            raise ArtifactError(f"layer times must be an object with rows, got {value!r:.100}")
        require_fields(value, ["runtime"], "layer times")
        return cls(str(value["runtime"]), tuple(_row(row) for row in value["rows"]))

    def _group(self, key: Callable[[LayerTime], str]) -> tuple[TimeShare, ...]:
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row.median_ms)
        total = self.total_ms
        shares = [
            TimeShare(name, len(ms), sum(ms), sum(ms) / total if total else 0.0)
            for name, ms in groups.items()
        ]
        return tuple(sorted(shares, key=lambda share: -share.ms))


def _width(row: LayerTime) -> str:
    if row.bits is not None:
        return f"{row.bits} bits"
    return "layers: order, bias, float" if row.layer else "no layer"


def _row(value: Any) -> LayerTime:
    if not isinstance(value, Mapping):
        raise ArtifactError(f"a row of layer times must be an object, got {value!r:.100}")
    require_fields(value, [*_TEXTS.values(), "bits", "samples_ms"], "row of layer times")
    bits = value["bits"]
    if bits is not None and type(bits) is not int:
        raise ArtifactError(f"bits of a layer must be an integer or null, got {bits!r:.60}")
    try:
        samples_ms = np.asarray(value["samples_ms"], np.float64)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"times of a layer must be a list of numbers: {error}") from None
    part, name, op_type, layer = (str(value[key]) for key in _TEXTS.values())
    return LayerTime(part, name, op_type, layer, bits, samples_ms)
