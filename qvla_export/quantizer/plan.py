"""The bit plan: the width of every channel, its origin and its cost. numpy only."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.coupling import Coupling, find_couplings
from qvla_export.quantizer.layer_shapes import LayerShapes, shape_problem
from qvla_export.quantizer.packed_storage import require_steps_of
from qvla_export.quantizer.plan_bytes import PackedForm, stored_bytes
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.rounding import Rounding
from qvla_export.quantizer.width_table import width_table
from qvla_export.shared.artifacts import read_json, require_fields, set_fields, versions, write_json
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError
from qvla_export.shared.json_documents import Node
from qvla_export.shared.target import WIDTHS, Container

_FORMAT = "qvla-plan-2"
# Its bytes had neither the order of channels nor added biases in them.
_FORMAT_BEFORE = "qvla-plan-1"
_ANEW = "make it anew: qvla plan, and qvla export for a bundle's"
# A layer's widths are a string with one character a channel; "f" is 16 bits.
_DIGITS: Mapping[int, str] = {0: "0", 2: "2", 4: "4", 8: "8", 16: "f"}
# Of one channel; the widest layers of language models have 2^18.
_MOST_WEIGHTS = 1 << 31
_WIDTH_OF = {digit: bits for bits, digit in _DIGITS.items()}


@dataclass(frozen=True)
class BitPlan:
    """Per layer int8 [channels] in {0, 2, 4, 8, 16}; budget, averages and provenance.

    Raises:
        QvlaError: an unknown width, a width the target has no container for, a layer without
            its number of weights.
    """

    # Layer name -> width of each output channel, in forward order.  int8 [channels]
    widths: Mapping[str, NDArray[np.int8]]
    # Layer name -> weights of one channel.
    weights_per_channel: Mapping[str, int]
    # Name of the target and its containers: what the plan's bytes are counted in.
    target: str
    containers: Mapping[int, Container]
    # The quantizer the sensitivities were measured with and the bundle must be made with.
    quantizer: QuantizerSpec
    # The budget in words.
    budget: str
    # SHA-256 of the policy's checkpoint.
    policy_digest: str
    # SHA-256 of the sensitivities' file and of their calibration set; None for uniform plans.
    sensitivities_digest: str | None = None
    calibration_digest: str | None = None
    # How the layers' inputs are rounded; None leaves activations in float.
    activations: ActivationRanges | None = None
    # Sum of the assigned sensitivities: the additive model's E||dA||^2; None where unknown.
    expected_error: float | None = None
    # Method and parameters that chose the widths, JSON; None in plans written before it was.
    allocation: Mapping[str, Any] | None = None
    rounding: Rounding | None = None  # a file of its own; see `qvla_export.quantizer.round_plan`
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if not self.widths or set(self.widths) != set(self.weights_per_channel):
            raise QvlaError(
                f"a plan needs widths and weights per channel for the same layers, "
                f"got {len(self.widths)} and {len(self.weights_per_channel)}"
            )
        if self.activations is not None:
            self.activations.require_layers(self.widths)
        require_steps_of(self.containers, self.quantizer)
        available = set(WIDTHS) & {0, *self.containers}
        for name, widths in self.widths.items():
            if widths.ndim != 1 or widths.dtype != np.int8 or not widths.size:
                raise QvlaError(
                    f"widths must be int8 [channels] of one channel or more, got {widths.dtype} "
                    f"{list(widths.shape)} in {name}"
                )
            unknown = sorted(set(widths.tolist()) - available)
            if unknown:
                raise QvlaError(
                    f"widths must be among {sorted(available)} on target {self.target!r}, "
                    f"got {unknown} in {name}"
                )

    def __repr__(self) -> str:
        return f"<BitPlan: {self._summary}, digest {self.digest[:8]}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: each module's channels by width, and the provenance."""
        provenance = {
            "budget": self.budget,
            "policy": self.policy_digest,
            "sensitivities": self.sensitivities_digest or "none",
            "calibration set": self.calibration_digest or "none",
            "made with": ", ".join(f"{name} {text}" for name, text in self.made_with.items()),
        }
        return width_table(f"Plan: {self._summary}", self.widths, provenance)

    @property
    def _summary(self) -> str:
        channels = sum(len(widths) for widths in self.widths.values())
        return (
            f"{channels:,} channels in {len(self.widths)} layers, "
            f"{self.mean_bits_per_channel:.2f} bits per channel, {self.weight_bytes:,} bytes "
            f"({self.ratio:.1%} of float16) on {self.target}"
        )

    @property
    def mean_bits_per_channel(self) -> float:
        """The paper's average: every channel counts the same."""
        total = sum(int(w.astype(np.int64).sum()) for w in self.widths.values())
        return total / sum(len(w) for w in self.widths.values())

    @property
    def mean_bits_per_weight(self) -> float:
        """Average width with every weight counting the same; scales not included."""
        per_layer = self.weights_per_channel
        bits = sum(int(w.astype(np.int64).sum()) * per_layer[n] for n, w in self.widths.items())
        return bits / self._weights

    @property
    def stored_bits_per_weight(self) -> float:
        """Average of all that the target stores of the planned layers."""
        return 8 * self.weight_bytes / self._weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of the planned layers on the target: codes, scales, the channels' order, biases.

        What an export really stores: see `qvla_export.quantizer.packed_storage`.
        """
        form = PackedForm(
            self.containers, self.activations is not None, self.quantizer.needs_moments
        )
        return stored_bytes(self.widths, self.weights_per_channel, form)

    @property
    def float16_bytes(self) -> int:
        """Bytes of the same weights in float16."""
        return 2 * self._weights

    @property
    def ratio(self) -> float:
        """`weight_bytes` / `float16_bytes`."""
        return self.weight_bytes / self.float16_bytes

    @property
    def shapes(self) -> LayerShapes:
        """Layer name -> (channels, weights of one channel)."""
        return {name: (len(w), self.weights_per_channel[name]) for name, w in self.widths.items()}

    @cached_property
    def couplings(self) -> Mapping[str, Coupling]:
        """Consumer -> the MLP it closes, with the hidden units that stay."""
        found = find_couplings(self.widths, self.weights_per_channel)
        return {coupling.consumer: coupling for coupling in found}

    def stored_order(self, layer: str) -> NDArray[np.int64]:
        """Return the inputs of a layer that the graph keeps, as it stores them.  int64 [kept]"""
        if layer in self.couplings:
            return self.couplings[layer].order
        return np.arange(self.weights_per_channel[layer])

    def histogram(self) -> dict[int, int]:
        """Return the number of channels at each width."""
        return {bits: sum(int((w == bits).sum()) for w in self.widths.values()) for bits in WIDTHS}

    def restricted_to(self, names: Collection[str]) -> "BitPlan":
        """Return the plan of some of its layers, in their order here."""
        return replace(
            self,
            widths={name: w for name, w in self.widths.items() if name in names},
            weights_per_channel={n: k for n, k in self.weights_per_channel.items() if n in names},
            activations=None if self.activations is None else self.activations.restricted_to(names),
            rounding=None if self.rounding is None else self.rounding.restricted_to(names),
        )

    def require_fits(self, shapes: LayerShapes, policy_digest: str) -> None:
        """Refuse a policy the plan was not made for.

        Args:
            shapes: the policy's quantizable layers, see `qvla_export.policies.layers.layer_shapes`.
            policy_digest: the policy's digest.

        Raises:
            PlanMismatch: naming the layers and the closest names, or both digests.
        """
        problem = shape_problem(self.shapes, shapes)
        if problem is not None or policy_digest != self.policy_digest:
            raise PlanMismatch(
                f"the plan was made for policy {self.policy_digest[:16]}, given policy "
                f"{policy_digest[:16]}: {problem or 'their weights differ'}. "
                "Make sensitivities and plan of this policy."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of everything the plan says."""
        return hashlib.sha256(json.dumps(self._to_json()).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically; each layer's widths are one string."""
        write_json(path, self._to_json())

    def _to_json(self) -> dict[str, Any]:
        layers = {
            name: {
                "weights_per_channel": self.weights_per_channel[name],
                "widths": "".join(_DIGITS[int(bits)] for bits in widths),
            }
            for name, widths in self.widths.items()
        }
        allocated = {} if self.allocation is None else {"allocation": dict(self.allocation)}
        return {
            "format": _FORMAT,
            "target": self.target,
            "budget": self.budget,
            **allocated,
            "activations": None if self.activations is None else self.activations.to_json(),
            "mean_bits_per_channel": self.mean_bits_per_channel,
            "mean_bits_per_weight": self.mean_bits_per_weight,
            "stored_bits_per_weight": self.stored_bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "float16_bytes": self.float16_bytes,
            "expected_error": self.expected_error,
            "policy_digest": self.policy_digest,
            "sensitivities_digest": self.sensitivities_digest,
            "calibration_digest": self.calibration_digest,
            "versions": dict(self.made_with),
            "containers": {
                str(bits): set_fields(container, "zero_points", "two_level")
                for bits, container in sorted(self.containers.items())
            },
            "quantizer": self.quantizer.to_json(),
            "layers": layers,
        }

    @staticmethod
    def load(path: Path) -> "BitPlan":
        """Read a plan.

        Raises:
            ArtifactError: the file is missing, damaged or no plan.
        """
        value = read_json(path, "bit plan")
        stated = value.get("format") if isinstance(value, dict) else None
        if stated == _FORMAT_BEFORE:
            raise ArtifactError(
                f"bit plan {path} is of format {_FORMAT_BEFORE}, whose bytes leave out the order "
                f"of channels and added biases; {_ANEW}"
            )
        if stated != _FORMAT:
            raise ArtifactError(f"{path} is not a bit plan of format {_FORMAT}; {_ANEW}")
        require_fields(value, _FIELDS, f"bit plan {path}")
        try:
            plan = _from_json(value)
        except ArtifactError as error:
            raise ArtifactError(f"bit plan {path} cannot be read: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, QvlaError) as error:
            raise ArtifactError(f"bit plan {path} is damaged: {error}; make it anew") from error
        if plan.weight_bytes != value["weight_bytes"]:
            raise ArtifactError(
                f"bit plan {path} is damaged, or of a version that counted other bytes: it states "
                f"{value['weight_bytes']} weight bytes, its widths make {plan.weight_bytes}; "
                f"{_ANEW}"
            )
        return plan

    @property
    def _weights(self) -> int:
        return sum(len(w) * self.weights_per_channel[n] for n, w in self.widths.items())


_FIELDS = (
    "target",
    "budget",
    "activations",
    "weight_bytes",
    "expected_error",
    "policy_digest",
    "sensitivities_digest",
    "calibration_digest",
    "versions",
    "containers",
    "quantizer",
    "layers",
)


def _from_json(value: Mapping[str, Any]) -> BitPlan:
    layers = value["layers"].items()
    node = Node(value, "the plan", remedy="make it anew")
    for name in ("target", "budget", "policy_digest"):
        node.field(name).text()
    for name in ("sensitivities_digest", "calibration_digest"):
        if node.has(name):
            node.field(name).text()
    for name in ("allocation", "versions"):
        if node.has(name):
            node.field(name).fields()
    if node.has("expected_error"):
        node.field("expected_error").number()
    for layer in node.field("layers").fields().values():
        layer.field("weights_per_channel").whole(1, _MOST_WEIGHTS)
    return BitPlan(
        widths={n: np.array([_WIDTH_OF[c] for c in x["widths"]], np.int8) for n, x in layers},
        weights_per_channel={n: int(x["weights_per_channel"]) for n, x in layers},
        target=value["target"],
        containers={int(bits): Container(**c) for bits, c in value["containers"].items()},
        quantizer=QuantizerSpec.from_json(value["quantizer"]),
        budget=value["budget"],
        policy_digest=value["policy_digest"],
        sensitivities_digest=value["sensitivities_digest"],
        calibration_digest=value["calibration_digest"],
        activations=ActivationRanges.from_json(value["activations"]),
        expected_error=value["expected_error"],
        allocation=value.get("allocation"),
        made_with=value["versions"] or {},
    )
