"""The noun `Baseline`: a policy's layers as another library quantized them. numpy only.

Stored as a folder of two files: integer codes and scales, and where they came from. What is judged
is what is stored: float weights are codes times stored scales, and bytes count both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qvla_export.baselines.methods import BaselineRequest
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.shared.artifacts import (
    new_folder,
    read_json,
    require_fields,
    versions,
    write_bytes,
    write_json,
)
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError

_FORMAT = "qvla-baseline-1"
_DESCRIPTION = "baseline.json"
_TENSORS = "layers.safetensors"
_AGAIN = "make it anew: qvla baseline"
# Codes of the widths that are not integers.
_FLOATS: Mapping[int, type[np.floating[Any]]] = {16: np.float16, 32: np.float32}


@dataclass(frozen=True)
class BaselineLayer:
    """One layer as a library left it.

    Raises:
        QvlaError: codes outside their width, scales of the wrong shape, numbers not finite.
    """

    # Codes and scales; scales may be negative, and any width up to 8 bits occurs. 32 bits: float.
    weight: QuantizedWeight
    # The layer's input is multiplied by this first; None for not at all.  float16 [inputs]
    input_scale: NDArray[np.float16] | None = None
    # Inputs of a block that is rotated first, see `hadamard.rotate`; None for not at all.
    rotation: int | None = None

    def __post_init__(self) -> None:
        weight, inputs = self.weight, self.weight.codes.shape[-1]
        if weight.codes.ndim != 2 or weight.codes.dtype != _FLOATS.get(weight.bits, np.int8):
            raise QvlaError(
                f"codes of {weight.bits} bits must be a matrix of their type, got "
                f"{weight.codes.dtype} {list(weight.codes.shape)}"
            )
        if weight.bits in _FLOATS:
            shape = (len(weight.codes), 0)
        else:
            _require_codes(weight.codes, weight.bits)
            groups = 1 if weight.group_size is None else -(-inputs // max(1, weight.group_size))
            shape = (len(weight.codes), groups)
        if weight.scales.shape != shape:
            raise QvlaError(f"scales must be {list(shape)}, got {list(weight.scales.shape)}")
        scale = self.input_scale
        if scale is not None and (scale.shape != (inputs,) or scale.dtype != np.float16):
            raise QvlaError(f"an input scale must be float16 [{inputs}], got {list(scale.shape)}")
        size = self.rotation
        if size is not None and (size < 1 or size & (size - 1) or inputs % size):
            raise QvlaError(
                f"blocks of {inputs} inputs that are rotated are a power of two in them, got {size}"
            )
        for what in (weight.codes, weight.scales, scale):
            if what is not None and not np.isfinite(what).all():
                raise QvlaError("codes and scales must be finite, got NaN or infinity")

    @property
    def nbytes(self) -> int:
        """Return the bytes of packed codes, scales, and the input scale if there is one."""
        scale = self.input_scale
        return self.weight.nbytes + (0 if scale is None else scale.nbytes)


@dataclass(frozen=True)
class Baseline:
    """All quantizable layers of one policy, and where they came from."""

    request: BaselineRequest
    # By layer name, all of the policy's.
    layers: Mapping[str, BaselineLayer]
    # SHA-256 of the policy's checkpoint and of the calibration set.
    policy_digest: str
    calibration_digest: str
    # How the inputs of layers are rounded, after the input scale; None for not at all.
    activations: ActivationRanges | None = None
    # The library's own settings, in its words, and its version.
    settings: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    # Wall-clock seconds of the library's work.
    seconds: float = 0.0
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __repr__(self) -> str:
        return (
            f"<Baseline {self.request.setting}: {len(self.layers)} layers, "
            f"{self.weight_bytes:,} bytes, policy {self.policy_digest[:8]}>"
        )

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of packed codes, scales and input scales of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def float16_bytes(self) -> int:
        """Return the bytes of the same weights in float16."""
        return 2 * sum(layer.weight.codes.size for layer in self.layers.values())

    @property
    def mean_bits_per_channel(self) -> float:
        """Return the average width of a channel; scales not included."""
        channels = [len(layer.weight.codes) for layer in self.layers.values()]
        bits = [layer.weight.bits for layer in self.layers.values()]
        return float(np.dot(channels, bits)) / sum(channels)

    @property
    def stored_bits_per_weight(self) -> float:
        """Return the average of what is stored, scales included."""
        return 16 * self.weight_bytes / self.float16_bytes

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything it says."""
        described = self._to_json(save_tensors(self._tensors()))
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def require_fits(self, shapes: LayerShapes, policy_digest: str) -> None:
        """Refuse a policy that it was not made of.

        Args:
            shapes: of the policy's quantizable layers, see `policies.layers.layer_shapes`.
            policy_digest: of the policy.

        Raises:
            PlanMismatch: with both digests, or the layers that differ.
        """
        found = {name: layer.weight.codes.shape for name, layer in self.layers.items()}
        differ = [n for n in {**shapes, **found} if found.get(n) != shapes.get(n)]
        if differ or policy_digest != self.policy_digest:
            raise PlanMismatch(
                f"the baseline was made of policy {self.policy_digest[:16]}, given policy "
                f"{policy_digest[:16]}; layers that differ: {differ[:3]}; {_AGAIN}"
            )

    def save(self, path: Path) -> None:
        """Write the folder atomically."""
        tensors = save_tensors(self._tensors())
        with new_folder(path) as folder:
            write_bytes(folder / _TENSORS, tensors)
            write_json(folder / _DESCRIPTION, self._to_json(tensors))

    @staticmethod
    def load(path: Path) -> "Baseline":
        """Read a folder and check that its numbers are those that were written.

        Raises:
            ArtifactError: a file is missing, damaged or changed.
        """
        value = read_json(path / _DESCRIPTION, "baseline")
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is not a baseline of format {_FORMAT}; {_AGAIN}")
        require_fields(value, _FIELDS, f"baseline {path}")
        try:
            data = (path / _TENSORS).read_bytes()
            if hashlib.sha256(data).hexdigest() != value["tensors_digest"]:
                raise ArtifactError(f"{path} was changed after it was made; {_AGAIN}")
            loaded = _from_json(value, load_tensors(data))
        except ArtifactError:
            raise
        except (OSError, SafetensorError, *_DAMAGE) as error:
            raise ArtifactError(f"baseline {path} is damaged ({error}); {_AGAIN}") from error
        if loaded.weight_bytes != value["weight_bytes"]:
            raise ArtifactError(
                f"baseline {path} states {value['weight_bytes']} weight bytes, its layers have "
                f"{loaded.weight_bytes}; {_AGAIN}"
            )
        return loaded

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.codes"] = np.ascontiguousarray(layer.weight.codes)
            tensors[f"{name}.scales"] = np.ascontiguousarray(layer.weight.scales)
            if layer.input_scale is not None:
                tensors[f"{name}.input_scale"] = layer.input_scale
        return tensors

    def _to_json(self, tensors: bytes) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "request": asdict(self.request),
            "libraries": dict(self.libraries),
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "mean_bits_per_channel": self.mean_bits_per_channel,
            "stored_bits_per_weight": self.stored_bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "float16_bytes": self.float16_bytes,
            "policy_digest": self.policy_digest,
            "calibration_digest": self.calibration_digest,
            "tensors_digest": hashlib.sha256(tensors).hexdigest(),
            "versions": dict(self.made_with),
            "activations": None if self.activations is None else self.activations.to_json(),
            "layers": {
                name: {
                    "bits": layer.weight.bits,
                    "group_size": layer.weight.group_size,
                    **({} if layer.rotation is None else {"rotation": layer.rotation}),
                }
                for name, layer in self.layers.items()
            },
        }


_FIELDS = (
    "request",
    "libraries",
    "settings",
    "seconds",
    "weight_bytes",
    "policy_digest",
    "calibration_digest",
    "tensors_digest",
    "versions",
    "activations",
    "layers",
)
_DAMAGE = (AttributeError, KeyError, TypeError, ValueError)


def _require_codes(codes: NDArray[Any], bits: int) -> None:
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise QvlaError(f"integer codes have 1 to 8 bits, got {bits}")
    if bits == 1:
        if (np.abs(codes) != 1).any():
            raise QvlaError("codes of 1 bit are signs, -1 and 1")
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.size and (codes.min() < low or codes.max() > high):
        raise QvlaError(
            f"codes of {bits} bits are {low} to {high}, got {codes.min()} to {codes.max()}"
        )


def _from_json(value: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Baseline:
    layers = {}
    for name, said in value["layers"].items():
        unknown = sorted(set(said) - {"bits", "group_size", "rotation"})
        if unknown:
            raise ValueError(f"{name} says {unknown}, which this version does not know")
        weight = QuantizedWeight(
            tensors[f"{name}.codes"], tensors[f"{name}.scales"], said["bits"], said["group_size"]
        )
        layers[name] = BaselineLayer(
            weight, tensors.get(f"{name}.input_scale"), said.get("rotation")
        )
    return Baseline(
        request=BaselineRequest(**value["request"]),
        layers=layers,
        policy_digest=value["policy_digest"],
        calibration_digest=value["calibration_digest"],
        activations=ActivationRanges.from_json(value["activations"]),
        settings=value["settings"],
        libraries=value["libraries"],
        seconds=float(value["seconds"]),
        made_with=value["versions"],
    )
