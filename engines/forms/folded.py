"""What ONNX Runtime makes of a graph when it loads it: expanded weights on disk, bytes in memory.

Other runtimes read the first: constants that are computed from packed codes are int8 or float32
then, and the graph holds operators of ONNX alone.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from engines.base import EngineError
from engines.forms.graph_file import NARROW, GraphFile
from engines.ort import open_session, session_options
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.node_names import parse_node_name
from qvla_export.shared.part import Part

_WEIGHTS_FILE = "session.optimized_model_external_initializers_file_name"
_WEIGHTS_LEAST = "session.optimized_model_external_initializers_min_size_in_bytes"
# Computes constants, and leaves operators of ONNX alone.
BASIC = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
# Smaller constants lie in the graph itself.
_LEAST_BYTES = 1024


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes of the constants that a runtime's own graphs hold."""

    total: int
    # Part and layer -> those that its nodes read.
    layers: Mapping[tuple[str, str], int]


def fold(bundle: Bundle, part: Part, float_layers: Collection[str], folder: Path) -> Path:
    """Write a part's graph with its constants computed, as other runtimes read it.

    Args:
        bundle: for ONNX Runtime on a CPU.
        part: of it.
        float_layers: whose weights become float32; the others' int8, or stay packed.
        folder: gets the graph and its weights.

    Raises:
        EngineError: ONNX Runtime refuses the graph, or 2- or 4-bit weights stay.
    """
    path = folder / part.model
    _save(bundle, part, float_layers, path, BASIC)
    narrow = [c.name for c in GraphFile.read(path).constants.values() if c.dtype in NARROW]
    if narrow:
        raise EngineError(
            f"{len(narrow)} weights of part {part.name!r} have 2 or 4 bits ({narrow[0]}), which "
            "OpenVINO does not read; run them as float32 (--weights unpacked, or qvla tune), or "
            "deploy a setting whose codes expand to int8: w4a8 with --scales two-level"
        )
    return path


def resident_bytes(bundle: Bundle, float_layers: Mapping[str, Collection[str]]) -> ResidentBytes:
    """Return what ONNX Runtime's optimized graphs of a bundle hold in constants.

    The graphs are written to a temporary folder: as much room as the weights take there.

    Args:
        bundle: for ONNX Runtime on a CPU.
        float_layers: part -> layers whose weights are float32.
    """
    every = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    total, layers = 0, dict[tuple[str, str], int]()
    with tempfile.TemporaryDirectory(prefix="qvla-forms-") as folder:
        for part in bundle.parts:
            path = Path(folder) / part.model
            _save(bundle, part, float_layers.get(part.name, ()), path, every)
            graph = GraphFile.read(path)
            total += sum(constant.nbytes for constant in graph.constants.values())
            for name, nbytes in _bytes_by_layer(graph).items():
                layers[part.name, name] = nbytes
    return ResidentBytes(total, layers)


def _bytes_by_layer(graph: GraphFile) -> dict[str, int]:
    read: dict[str, set[str]] = {}
    for node in graph.nodes:
        named = parse_node_name(node.name)
        if named is not None:
            read.setdefault(named.layer, set()).update(graph.constants.keys() & set(node.inputs))
    return {
        layer: sum(graph.constants[name].nbytes for name in names) for layer, names in read.items()
    }


def _save(
    bundle: Bundle, part: Part, float_layers: Collection[str], path: Path, level: Any
) -> None:
    save_optimized(bundle.model_path(part), path, session_options(bundle, 1), level, float_layers)


def save_optimized(
    source: Path, path: Path, options: Any, level: Any = BASIC, float_layers: Collection[str] = ()
) -> None:
    """Write a graph as ONNX Runtime has it after a level of its optimizations.

    Args:
        source, path: what to read, and what to write with its weights beside it.
        options: of a session, for this call alone.
        level: `onnxruntime.GraphOptimizationLevel`; the first computes constants only.
        float_layers: whose weights become float32.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(_WEIGHTS_FILE, f"{path.name}.data")
    options.add_session_config_entry(_WEIGHTS_LEAST, str(_LEAST_BYTES))
    open_session(source, options, float_layers)
