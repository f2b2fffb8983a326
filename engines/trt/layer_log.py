"""What TensorRT's profiler says of every layer of one part."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.base import EngineError
from engines.layer_times import LayerTime
from engines.trt.modules import TrtModule
from qvla_export.shared.node_names import LayerNode, parse_node_name

# In the engine inspector's "Metadata", between control characters.
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class LayerLog:
    """Collects an `IProfiler`'s reports, pass by pass."""

    def __init__(self, module: TrtModule, part: str, layers: Sequence[Any] | None) -> None:
        """Make the `profiler` that a context takes.

        Args:
            module: of the context.
            part: whose layers are reported.
            layers: what the engine inspector listed at the build (`Sidecar.layers`); tells the
                nodes of the graph, which Myelin's own names do not.
        """
        self._part = part
        self._known = {str(v.get("Name")): v for v in layers or () if isinstance(v, dict)}
        self._passes: list[list[tuple[str, float]]] = []
        self.profiler: Any = _profiler_class(module.api)(self)

    def begin_pass(self) -> None:
        """Say that what is reported from now on is the next pass's."""
        self._passes.append([])

    def add(self, name: str, ms: float) -> None:
        """Keep one report."""
        self._passes[-1].append((name, ms))

    def rows(self, dropped: int, calls: int = 1) -> tuple[LayerTime, ...]:
        """Return the layers in order, without the first passes.

        Args:
            dropped: passes that are left out.
            calls: of the part in an action, of which one is reported.

        Raises:
            EngineError: TensorRT reports nothing, or other layers from pass to pass.
        """
        kept = self._passes[dropped:]
        orders = {tuple(name for name, _ in reports) for reports in kept}
        if len(orders) != 1 or not kept[0]:
            raise EngineError(
                f"TensorRT's profiler reports {sorted(map(len, orders))} layers of part "
                f"{self._part!r} in {len(kept)} passes; they must be the same in each"
            )
        return tuple(
            self._row(name, calls * np.array([reports[index][1] for reports in kept]))
            for index, (name, _) in enumerate(kept[0])
        )

    def _row(self, name: str, samples_ms: Any) -> LayerTime:
        known = self._known.get(name, {})
        nodes = [parse_node_name(n) for n in _ONNX_NODE.findall(str(known.get("Metadata", "")))]
        found = {node for node in (*nodes, parse_node_name(name)) if node is not None}
        layer, bits = _one_layer(found)
        op_type = str(known.get("LayerType") or next(iter(sorted(n.op_type for n in found)), ""))
        return LayerTime(self._part, name, op_type or "unknown", layer, bits, samples_ms)


def _one_layer(nodes: set[LayerNode]) -> tuple[str, int | None]:
    """Return the layer and width that all named nodes share; what is fused of several has none."""
    layers, widths = {node.layer for node in nodes}, {node.bits for node in nodes} - {None}
    if len(layers) != 1:
        return "", None
    return layers.pop(), widths.pop() if len(widths) == 1 else None


def _profiler_class(api: Any) -> type:
    class Profiler(api.IProfiler):  # type: ignore[misc]  # a class only known at run time
        def __init__(self, log: LayerLog) -> None:
            api.IProfiler.__init__(self)
            self._log = log

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self._log.add(layer_name, ms)

    return Profiler
