"""The noun `Candidate`: runtime and forms of weights that a bundle may run in, and its figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engines.base import Engine, EngineError
from engines.forms.float_layers import FloatLayers, count_layers
from engines.forms.tuning import PACKAGES, TimedForm
from engines.ort import OrtEngine
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.target import Runtime


@dataclass(frozen=True)
class Candidate:
    """One way to run a bundle."""

    runtime: Runtime
    # "as stored", "in float", "mixed"
    form: str
    float_layers: FloatLayers = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Say in words what it is: "ort, as stored"."""
        return f"{self.runtime}, {self.form}"

    def open(self, bundle: Bundle, threads: int | None, keep_loaded: bool = True) -> Engine:
        """Return the engine.

        Raises:
            EngineError: the runtime cannot be imported or refuses the graph.
        """
        if self.runtime == "openvino":
            try:
                from engines.openvino import OpenVinoEngine  # an extra
            except ImportError as error:
                raise EngineError(
                    f"openvino is here and cannot be imported ({error}); remove it and "
                    "install it again: pip install 'qvla[openvino]'"
                ) from error
            return OpenVinoEngine(bundle, threads, keep_loaded, self.float_layers)
        return OrtEngine(bundle, threads, keep_loaded=keep_loaded, float_layers=self.float_layers)


@dataclass(frozen=True)
class Trial:
    """A candidate and what was measured of it."""

    candidate: Candidate
    timed: TimedForm

    def to_json(self) -> dict[str, Any]:
        """Return all but the names of the layers."""
        return {"float_layers": count_layers(self.candidate.float_layers), **asdict(self.timed)}


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """Return the fastest trial that may be taken; None where none may."""
    allowed = [t for t in trials if not t.timed.refusal and t.timed.median_ms is not None]
    return min(allowed, key=lambda trial: trial.timed.median_ms or 0.0, default=None)


@dataclass(frozen=True)
class LayerForms:
    """One layer's time and bytes in both forms."""

    part: str
    layer: str
    stored_ms: float
    float_ms: float
    stored_bytes: int
    float_bytes: int

    @property
    def saved_ms(self) -> float:
        """What float saves of an action."""
        return self.stored_ms - self.float_ms

    @property
    def added_bytes(self) -> int:
        """What float takes more of memory; at least 1, so that it can be divided by."""
        return max(self.float_bytes - self.stored_bytes, 1)


def choose_layers(layers: Sequence[LayerForms], room_bytes: int) -> FloatLayers:
    """Return the layers that are worth being float: most milliseconds for a byte first.

    Args:
        layers: of a whole bundle.
        room_bytes: what all of them may take more than they do as stored.
    """
    chosen: dict[str, set[str]] = {}
    best = sorted(layers, key=lambda layer: -layer.saved_ms / layer.added_bytes)
    for layer in best:
        if layer.saved_ms > 0 and layer.added_bytes <= room_bytes:
            room_bytes -= layer.added_bytes
            chosen.setdefault(layer.part, set()).add(layer.layer)
    return {part: frozenset(names) for part, names in chosen.items()}


def runtimes_here() -> tuple[Runtime, ...]:
    """Return the runtimes on a CPU that are installed."""
    from importlib.util import find_spec

    return tuple(name for name in PACKAGES if name == "ort" or find_spec(name) is not None)
