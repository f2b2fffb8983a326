"""Normalization statistics of a data set: state in, actions out (`dataset_statistics.json`)."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import StatisticsError
from qvla_export.shared.json_documents import FOREIGN, read_json

# "files": the checkpoint's processor files say it, feature by feature (`lerobot_statistics`).
Normalization = Literal["q99", "bounds", "files"]

# OpenVLA-OFT `NormalizationType`: BOUNDS_Q99 uses the 1 % and 99 % quantiles, BOUNDS min and max.
_LIMIT_NAMES: Mapping[str, tuple[str, str]] = {"q99": ("q01", "q99"), "bounds": ("min", "max")}
# No metre, radian or encoder count of an arm is beyond it.
_MOST_PHYSICAL = 1e6
_EPSILON = 1e-8  # openvla-oft adds it to the range on both sides; plain OpenVLA does not


@dataclass(frozen=True)
class Bounds:
    """Limits that map a physical vector to [-1, 1] and back."""

    # Physical value of -1 and of +1.  float64 [n]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    # Dimensions that are mapped; the others pass unchanged.  bool [n]
    mask: NDArray[np.bool_]

    def normalize(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Map physical values [..., n] to [-1, 1], clipped (openvla-oft `normalize_proprio`)."""
        values = np.asarray(values, dtype=np.float64)
        mapped = 2 * (values - self.low) / (self.high - self.low + _EPSILON) - 1
        return np.clip(np.where(self.mask, mapped, values), -1.0, 1.0).astype(np.float32)

    def unnormalize(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Map normalized values [..., n] to physical ones; neither input nor output is clipped."""
        values = np.asarray(values, dtype=np.float64)
        mapped = 0.5 * (values + 1) * (self.high - self.low + _EPSILON) + self.low
        return np.where(self.mask, mapped, values)

    def scale(self) -> NDArray[np.float64]:
        """Return the physical size of one normalized unit.  float64 [n]"""
        return np.where(self.mask, 0.5 * (self.high - self.low + _EPSILON), 1.0)

    def places(self, normalized: NDArray[Any]) -> NDArray[np.float64]:
        """Return where normalized values lie between the limits, -1 at `low` and 1 at `high`."""
        return np.asarray(normalized, np.float64)


@dataclass(frozen=True)
class Affine(Bounds):
    """A map that states its own center and sizes, as z-scores do; nothing is clipped.

    `low` and `high` are the range of the demonstrations, within which commands are held.
    """

    # Physical value of 0.  float64 [n]
    center: NDArray[np.float64]
    # What a physical distance is divided by, and a normalized one multiplied with: policies add an
    # epsilon on the way in alone. Below 0 where the policy counts the other way.  float64 [n]
    divisor: NDArray[np.float64]
    factor: NDArray[np.float64]

    def normalize(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Map physical values [..., n] to normalized ones."""
        values = np.asarray(values, np.float64)
        mapped = (values - self.center) / self.divisor
        return np.where(self.mask, mapped, values).astype(np.float32)

    def unnormalize(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Map normalized values [..., n] to physical ones."""
        values = np.asarray(values, np.float64)
        return np.where(self.mask, values * self.factor + self.center, values)

    def scale(self) -> NDArray[np.float64]:
        """Return the physical size of one normalized unit.  float64 [n]"""
        return np.where(self.mask, np.abs(self.factor), 1.0)

    def places(self, normalized: NDArray[Any]) -> NDArray[np.float64]:
        """Return where normalized values lie between the limits, -1 at `low` and 1 at `high`."""
        half = 0.5 * (self.high - self.low)
        physical = self.unnormalize(normalized) - 0.5 * (self.high + self.low)
        return np.where(half > 0, physical / np.where(half > 0, half, 1.0), normalized)


@dataclass(frozen=True)
class Statistics:
    """What un-normalizes one data set's actions and normalizes its state."""

    # Name of the data set, the `unnorm_key`.
    key: str
    action: Bounds
    state: Bounds | None


def load_statistics(
    path: Path,
    key: str | None,
    normalization: Normalization,
    action_dim: int,
    state_dim: int,
) -> Statistics:
    """Read one data set's statistics from `dataset_statistics.json`.

    Where that is absent, `norm_stats` of config.json beside it is read, as OpenVLA's own
    checkpoints have it. `key` may be None where the file holds exactly one data set.

    Raises:
        StatisticsError: the key is missing or ambiguous (the message lists the keys and the
            nearest), or its entries do not fit the policy's dimensions.
    """
    path, table = read_statistics(path)
    keys = sorted(table)
    if key is None:
        if len(keys) > 1:
            raise StatisticsError(f"{path} holds several data sets; choose an unnorm key of {keys}")
        key = keys[0]
    if key not in table:
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
        raise StatisticsError(
            f"unnorm key {key!r} is not in {path}; it has {keys}. Did you mean {nearest!r}?"
        )
    entry = table[key]
    action = _bounds(entry, "action", normalization, action_dim, f"{path}[{key}]")
    state = _bounds(entry, "proprio", normalization, state_dim, f"{path}[{key}]")
    if action is None:
        raise StatisticsError(f"{path}[{key}] has no 'action' statistics; the policy cannot act")
    return Statistics(key, action, state if state_dim else None)


def read_statistics(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds a checkpoint's statistics, and data set name -> statistics.

    Args:
        path: `dataset_statistics.json`; where it is absent, config.json beside it is read.

    Raises:
        ArtifactError: neither file has them, or one is not JSON.
        StatisticsError: what is there is no table.
    """
    config = path.parent / "config.json"
    only_there = not path.exists() and config.exists()
    inside = read_json(config, "model configuration", FOREIGN) if only_there else None
    if isinstance(inside, dict) and "norm_stats" in inside:
        path, table = config, inside["norm_stats"]
    else:
        table = read_json(path, "data set statistics", FOREIGN)
    if not isinstance(table, dict) or not table:
        raise StatisticsError(f"{path} must map data set names to statistics, got {table!r:.80}")
    return path, table


def _bounds(
    entry: Any, part: str, normalization: Normalization, size: int, where: str
) -> Bounds | None:
    if size == 0:
        return None
    if normalization not in _LIMIT_NAMES:
        raise StatisticsError(f"{where} has limits, {normalization!r} normalization takes others")
    names = _LIMIT_NAMES[normalization]
    values = entry.get(part) if isinstance(entry, dict) else None
    if not isinstance(values, dict) or any(name not in values for name in names):
        raise StatisticsError(
            f"{where} needs {part!r} with {list(names)} for {normalization!r} normalization; "
            f"it has {sorted(values) if isinstance(values, dict) else values!r}"
        )
    low, high = (_numbers(values[name], f"{where}: {part!r} {name}") for name in names)
    mask = _mask(values.get("mask", [True] * low.size), f"{where}: {part!r}")
    if not low.shape == high.shape == mask.shape == (size,):
        raise StatisticsError(
            f"{where}: {part!r} must have {size} entries for this policy, got {low.shape}, "
            f"{high.shape} and mask {mask.shape}"
        )
    # What the mask leaves out passes unchanged, whatever is written there: null for a gripper.
    low, high = (np.where(mask | np.isfinite(limit), limit, 0.0) for limit in (low, high))
    bounds = Bounds(low, high, mask)
    require_limits(bounds, f"{where}: {part!r}")
    return bounds


def require_limits(bounds: Bounds, where: str) -> None:
    """Refuse limits that no robot can have: what is un-normalized by them would move it wrongly.

    Raises:
        StatisticsError: some that the mask maps are not finite, not ordered or beyond a million.
    """
    low, high = bounds.low, bounds.high
    sane = np.isfinite(low) & np.isfinite(high) & (high >= low)
    sane &= np.maximum(np.abs(low), np.abs(high)) <= _MOST_PHYSICAL
    if (wrong := np.flatnonzero(bounds.mask & ~sane)).size:
        raise StatisticsError(
            f"{where} limits must be finite, ordered and within {_MOST_PHYSICAL:,.0f} in the "
            f"robot's units, dimensions {wrong.tolist()} are {low[wrong].tolist()} to "
            f"{high[wrong].tolist()}; make the statistics anew from the demonstrations"
        )


def _numbers(values: Any, where: str) -> NDArray[np.float64]:
    """Return limits; what is null is NaN."""
    if isinstance(values, list) and all(
        value is None or type(value) in (int, float) for value in values
    ):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    raise StatisticsError(f"{where} must be a list of numbers, got {values!r:.80}")


def _mask(values: Any, where: str) -> NDArray[np.bool_]:
    # Text is refused: bool("false") is true.
    if isinstance(values, list) and all(
        type(value) in (bool, int) and value in (0, 1) for value in values
    ):
        return np.array(values, dtype=bool)
    raise StatisticsError(f"{where}: mask must be a list of true and false, got {values!r:.80}")
