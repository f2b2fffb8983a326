"""The noun `Sensitivities`: what each channel at each width does to the action. numpy only.

`qvla_export.sensitivity.estimators` measure them, `qvla_export.allocation.allocate` uses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.standard_error import StandardError
from qvla_export.quantizer.layer_names import module_of
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.shared.artifacts import require_fields, versions
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.tables.html_table import html_table
from qvla_export.shared.target import WIDTHS
from qvla_export.shared.tensor_files import TensorArtifact, Tensors, read_tensor_file

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
class Sensitivities(TensorArtifact):
    """Expected squared action deviation of quantizing one channel, all else in float (eq. 4).

    The deviation is of the normalized action chunk, summed over its horizon * dim numbers, averaged
    over the observations: of compensated codes, each counts by the root of its squared gradients
    (`Moments.shares`). 16 bits is the reference and zero.

    Raises:
        QvlaError: shapes that disagree, negative or non-finite values.
    """

    # Layer name -> sensitivities, in forward order.  float32 [len(widths), channels]
    values: Mapping[str, NDArray[np.float32]]
    # Width of each row, rising.
    widths: tuple[int, ...]
    # Layer name -> weights of one channel.
    weights_per_channel: Mapping[str, int]
    # How they were estimated: "first order, full", "exact", ...; see
    # `sensitivity.estimators`.
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

    def __repr__(self) -> str:
        return f"<Sensitivities: {self._summary}, digest {self.digest[:8]}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: each module's sum at every width, and the provenance."""
        columns = ("Module", *(f"{bits} bits" for bits in self.widths))
        rows = [
            (module, *(f"{total:.3g}" for total in sums.tolist()))
            for module, sums in self.module_sums().items()
        ]
        provenance = {
            "policy": self.policy_digest,
            "calibration set": self.calibration_digest,
            "made with": ", ".join(f"{name} {text}" for name, text in self.made_with.items()),
        }
        return html_table(f"Sensitivities: {self._summary}", columns, rows, provenance)

    @property
    def channels(self) -> int:
        """Return the number of channels of all layers."""
        return sum(values.shape[1] for values in self.values.values())

    @property
    def _summary(self) -> str:
        return (
            f"{self.channels:,} channels in {len(self.values)} layers at "
            f"{', '.join(map(str, self.widths))} bits, {self.method}, {self.samples} observations"
        )

    def module_sums(self) -> dict[str, NDArray[np.float64]]:
        """Return the sum over each module's channels at every width.

        Returns:
            Name of the module, as `layer_names.module_of` has it -> float64 [widths]
        """
        sums: dict[str, NDArray[np.float64]] = {}
        for layer, values in self.values.items():
            name = module_of(layer)
            total = values.sum(axis=1, dtype=np.float64)
            sums[name] = sums[name] + total if name in sums else total
        return sums

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

    def _tensors(self) -> Tensors:
        return self.values

    def _provenance(self) -> Mapping[str, Any]:
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
            provenance["standard_error"] = self.standard_error.to_json()
        if self.settings:
            provenance["settings"] = dict(self.settings)
        return provenance

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
                standard_error=deviation and StandardError.from_json(deviation),
                settings=dict(value.get("settings", {})),
                made_with=value["versions"],
            )
        except ArtifactError as error:
            raise ArtifactError(f"sensitivities {path} cannot be read: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"sensitivities {path} are damaged: {error}") from error
