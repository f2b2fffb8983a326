"""The nouns `KernelRates` and `DeviceRates`: what kernels make of a device, for predictions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qvla_export.shared.artifacts import read_json, require_fields, versions, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.target import PowerMode

_FORMAT = "qvla-device-rates-1"


@dataclass(frozen=True)
class KernelRates:
    """Reached shares of a power mode's rates, where they were found, and how sure they are.

    Raises:
        QvlaError: a rate that is not positive, an uncertainty below 1.
    """

    # Reached shares of the power mode's bandwidth and dense rates.
    bandwidth_share: float
    compute_share: float
    # Start of one kernel, microseconds.
    launch_us: float
    # Kernels between two products that each pass over memory: 1 where a runtime fuses norms,
    # activation functions and residuals, more where it does not.
    kernels_between: int
    # A product computes its channels in multiples of this.
    channel_tile: int
    # A prediction of t milliseconds means t / uncertainty to t * uncertainty.
    uncertainty: float
    # The same where no figure has been compared: other power modes, 8-bit activations.
    unchecked_uncertainty: float
    # Power mode of the figures compared.
    checked_mode: str
    # Which figures the shares were fitted on and which were only compared.
    source: str
    # Stored bits -> share of the float rate that products of such codes reach; 1 where absent.
    expanded_share: Mapping[int, float] = field(default_factory=dict)
    # Stored bits -> codes expanded before a product, 1e9 a second; in no time where absent.
    expanded_gcodes_s: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_bits = (*self.expanded_share.values(), *self.expanded_gcodes_s.values())
        counts = (self.kernels_between, self.channel_tile)
        rates = (self.bandwidth_share, self.compute_share, *counts, *by_bits)
        spreads = (self.uncertainty, self.unchecked_uncertainty)
        if not min(rates) > 0 or not self.launch_us >= 0 or not min(spreads) >= 1:
            raise QvlaError(
                f"kernel rates must be positive and their uncertainty at least 1, got {self}; "
                "measure or fit them again"
            )

    def uncertainty_of(self, mode: PowerMode, activations: str) -> float:
        """Return the interval's factor for a prediction."""
        checked = mode.name == self.checked_mode and activations == "none"
        return self.uncertainty if checked else self.unchecked_uncertainty


@dataclass(frozen=True)
class DeviceRates:
    """A power mode and its kernel rates, as measured on one machine."""

    mode: PowerMode
    rates: KernelRates

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, {"format": _FORMAT, "versions": versions(), **asdict(self)})

    @staticmethod
    def load(path: Path) -> "DeviceRates":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        value = read_json(path, "device rates")
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ArtifactError(
                f"{path} holds no device rates of format {_FORMAT}; measure them with: qvla bench "
                "rates"
            )
        require_fields(value, ("mode", "rates"), f"device rates {path}")
        try:
            rates = value["rates"]
            return DeviceRates(
                PowerMode(**value["mode"]),
                KernelRates(
                    **{
                        **rates,
                        "expanded_share": _by_bits(rates["expanded_share"]),
                        "expanded_gcodes_s": _by_bits(rates["expanded_gcodes_s"]),
                    }
                ),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"device rates {path} are damaged: {error}") from error


@dataclass(frozen=True)
class Probe:
    """A chain of equal products x [rows, width] -> y [rows, width], to be timed."""

    # ONNX graph with input "x" float32 [rows, width] and output "y".
    model: bytes
    width: int
    products: int
    # Stored bits of a weight, and whether the products are of integers.
    bits: int
    integer: bool = False

    @property
    def weights(self) -> int:
        """Weights of all products."""
        return self.products * self.width**2


def _by_bits(value: Mapping[str, Any]) -> dict[int, float]:
    return {int(bits): float(rate) for bits, rate in value.items()}
