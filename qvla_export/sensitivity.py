"""The noun `Sensitivities`: what each channel at each width does to the action. numpy only.

`qvla_export.estimators` measure them, `qvla_export.allocation` uses them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qvla_export.artifacts import require_fields, versions, write_bytes
from qvla_export.errors import ArtifactError, QvlaError
from qvla_export.quantize import QuantizerSpec
from qvla_export.target import WIDTHS

_FORMAT = "qvla-sensitivities-1"
_FIELDS = (
    "widths",
    "weights_per_channel",
    "method",
    "samples",
    "probes",
    "seed",
    "policy_digest",
    "calibration_digest",
    "quantizer",
    "versions",
    "sha256",
)


@dataclass(frozen=True)
class StandardError:
    """How far sensitivities may be from those of all such observations and probes, relatively.

    Of the mean over observations, each with probes of its own; 0.1 means 10 %.
    """

    # Of the sum over a layer's channels at one width: the largest of all layers and widths.
    layers: float
    # The same where only the probes were drawn anew, on these very observations.
    layers_by_probes: float
    # Of one channel at one width: the median of all.
    channels: float


@dataclass(frozen=True)
class Sensitivities:
    """Expected squared action deviation of quantizing one channel, all else in float (eq. 4).

    The deviation is of the normalized action chunk, summed over its horizon * dim numbers, averaged
    over the observations. 16 bits is the reference and zero.

    Raises:
        QvlaError: shapes that disagree, negative or non-finite values.
    """

    # Layer name -> sensitivities, in forward order.  float32 [len(widths), channels]
    values: Mapping[str, NDArray[np.float32]]
    # Width of each row, rising.
    widths: tuple[int, ...]
    # Layer name -> weights of one channel.
    weights_per_channel: Mapping[str, int]
    # How they were estimated: "first order, full", "exact", ...; see `qvla_export.estimators`.
    method: str
    # Observations, and random probes an observation (0 where the method needs none).
    samples: int
    probes: int
    policy_digest: str
    calibration_digest: str
    quantizer: QuantizerSpec
    # Of the probes.
    seed: int = 0
    # None where the method does not estimate it.
    standard_error: StandardError | None = None
    # What the method was told beside these; JSON.
    settings: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if set(self.values) != set(self.weights_per_channel) or not self.values:
            raise QvlaError("sensitivities need values and weights per channel of the same layers")
        if tuple(sorted(set(self.widths))) != self.widths or not set(self.widths) <= set(WIDTHS):
            raise QvlaError(f"widths must be rising and among {WIDTHS}, got {self.widths}")
        for name, values in self.values.items():
            if values.ndim != 2 or len(values) != len(self.widths):
                raise QvlaError(
                    f"{name}: sensitivities must be [{len(self.widths)}, channels], "
                    f"got {list(values.shape)}"
                )
            if not np.isfinite(values).all() or (values < 0).any():
                raise QvlaError(f"{name}: sensitivities must be finite and not negative")

    def at(self, layer: str, bits: int) -> NDArray[np.float32]:
        """Return a layer's sensitivities at one width.  float32 [channels]

        Raises:
            QvlaError: the width was not measured.
        """
        values = self.values[layer]
        if bits in self.widths:
            row: NDArray[np.float32] = values[self.widths.index(bits)]
            return row
        if bits == 16:
            return np.zeros(values.shape[1], np.float32)
        raise QvlaError(f"sensitivities were measured at {self.widths} bits, not at {bits}")

    @property
    def digest(self) -> str:
        """SHA-256 of the file that `save` writes; a plan records it."""
        return hashlib.sha256(self._file_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write safetensors with the provenance as metadata, atomically."""
        write_bytes(path, self._file_bytes())

    def _file_bytes(self) -> bytes:
        provenance = {
            "format": _FORMAT,
            "widths": self.widths,
            "weights_per_channel": dict(self.weights_per_channel),
            "method": self.method,
            "samples": self.samples,
            "probes": self.probes,
            "seed": self.seed,
            "policy_digest": self.policy_digest,
            "calibration_digest": self.calibration_digest,
            "quantizer": self.quantizer.to_json(),
            "versions": dict(self.made_with),
        }
        if self.standard_error is not None:
            provenance["standard_error"] = asdict(self.standard_error)
        if self.settings:
            provenance["settings"] = dict(self.settings)
        return tensor_file(self.values, provenance)

    @staticmethod
    def load(path: Path) -> "Sensitivities":
        """Read sensitivities.

        Raises:
            ArtifactError: the file is missing, truncated, damaged or of another kind.
        """
        tensors, value = read_tensor_file(path, _FORMAT, "sensitivities")
        require_fields(value, _FIELDS, f"sensitivities {path}")
        try:
            order = value["weights_per_channel"]
            deviation = value.get("standard_error")
            return Sensitivities(
                values={name: tensors[name] for name in order},
                widths=tuple(value["widths"]),
                weights_per_channel={name: int(count) for name, count in order.items()},
                method=value["method"],
                samples=value["samples"],
                probes=value["probes"],
                seed=value["seed"],
                policy_digest=value["policy_digest"],
                calibration_digest=value["calibration_digest"],
                quantizer=QuantizerSpec.from_json(value["quantizer"]),
                standard_error=None if deviation is None else StandardError(**deviation),
                settings=dict(value.get("settings", {})),
                made_with=value["versions"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"sensitivities {path} are damaged: {error}") from error


def tensor_file(tensors: Mapping[str, NDArray[Any]], provenance: Mapping[str, Any]) -> bytes:
    """Return a safetensors file whose one metadata entry holds provenance and checksum.

    One entry, because safetensors writes several in random order; equal content gives equal bytes.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    value = {**provenance, "sha256": _checksum(contiguous)}
    return save_tensors(contiguous, {"qvla": json.dumps(value)})


def read_tensor_file(
    path: Path, form: str, what: str
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `tensor_file` made.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not of the format `form`.
    """
    if not path.is_file():
        raise ArtifactError(f"{what} not found: {path}")
    try:
        data = path.read_bytes()
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{what} {path}: truncated or damaged file ({error}); make it anew"
        ) from error
    provenance = json.loads(header.get("__metadata__", {}).get("qvla", "{}"))
    if provenance.get("format") != form:
        raise ArtifactError(f"{path} holds no {what} of format {form}; make it anew")
    if provenance.get("sha256") != _checksum(tensors):
        raise ArtifactError(f"{what} {path}: the checksum is wrong, the file is damaged; remake it")
    return tensors, provenance


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
