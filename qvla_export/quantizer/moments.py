"""The noun `Moments`: what layers are fed and what their outputs are worth. numpy only.

To second order and to first order in the action: with the weight error E of a layer, its inputs x
and the gradient g of the action at its outputs, the expected squared deviation of the action is
about tr(G E H E^T), where H = E[|g|^2 x x^T] / E[|g|^2] and G = E[g g^T], over tokens. H says
which inputs matter together, G which channels do. The means are weighted: an observation whose
gradients are many times those of others would be nearly all that they are of, so each counts by
the root of its squares. `measurement.measure_moments` measures them,
`qvla_export.quantizer.compensation` rounds with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.layer_artifact import FileKind, LayerArtifact
from qvla_export.shared.artifacts import require_same, versions
from qvla_export.shared.errors import QvlaError

# What files say of how much an observation counts, see `shares_of`.
SHARES = "inverse root of energy"


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer; matrices that would be too large are kept in blocks along the diagonal.

    Raises:
        QvlaError: shapes that disagree, numbers that are not finite.
    """

    # E[|g|^2 x] / E[|g|^2], the mean input.  float32 [inputs]
    mean: NDArray[np.float32]
    # E[|g|^2 (x - mean)(x - mean)^T] / E[|g|^2].  float32 [blocks, size, size], size <= inputs
    inputs: NDArray[np.float32]
    # E[g g^T].  float32 [blocks, size, size], size <= channels
    channels: NDArray[np.float32]

    def __post_init__(self) -> None:
        for part in fields(self):
            if not np.isfinite(getattr(self, part.name)).all():
                raise QvlaError(f"moments must be finite, {part.name} is not; the policy is broken")
        width = len(self.mean)
        if not _covers(self.inputs, width):
            raise QvlaError(f"moments of {width} inputs have blocks {list(self.inputs.shape)}")
        if not _covers(self.channels, self.channels.shape[0] * self.channels.shape[-1]):
            raise QvlaError(f"blocks must be square, got {list(self.channels.shape)}")

    def input_matrix(
        self,
        order: NDArray[np.int64],
        others: NDArray[np.int64] | None = None,
        dtype: type[np.floating[Any]] = np.float64,
    ) -> NDArray[Any]:
        """Return H of some inputs int64 [kept], in an order, and of others; None for the same.

        Blocks are about the mean, which joins all inputs: so no direction becomes negative where
        blocks leave moments out.  [kept, others]
        """
        columns = order if others is None else others
        result = _submatrix(self.inputs, order, columns, dtype)
        mean = self.mean.astype(dtype)
        across = mean[columns]
        for row, value in zip(result, mean[order], strict=True):
            row += value * across
        return result

    def input_diagonal(self, order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the diagonal of H of some inputs int64 [kept].  float64 [kept]"""
        return _diagonal(self.inputs)[order] + np.square(self.mean[order].astype(np.float64))

    def channel_matrix(
        self, order: NDArray[np.int64], dtype: type[np.floating[Any]] = np.float64
    ) -> NDArray[Any]:
        """Return G of some channels int64 [kept], in an order.  [kept, kept]"""
        return _submatrix(self.channels, order, order, dtype)

    def channel_diagonal(self, order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the diagonal of G of some channels int64 [kept].  float64 [kept]"""
        return _diagonal(self.channels)[order]

    def channel_groups(self, channels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the channels int64 [kept] in groups between which G is zero: its blocks."""
        block = channels // self.channels.shape[1]
        return [channels[block == number] for number in np.unique(block)]


@dataclass(frozen=True)
class Moments(LayerArtifact):
    """Moments of a policy's layers on calibration observations.

    Those of a layer lie in memory only while someone uses them, where they were read from a file.

    Raises:
        QvlaError: energies are not one of each observation, or negative or not finite.
    """

    kind = FileKind(
        "qvla-moments-3", "moments", "measure them anew: qvla moments", LayerMoments, True
    )

    # Layer name -> its moments, in forward order.
    layers: Mapping[str, LayerMoments]
    # Observations, random probes of the action an observation, and the probes' seed.
    samples: int
    probes: int
    seed: int
    policy_digest: str
    calibration_digest: str
    # Sum over all layers' tokens of |g|^2 |x|^2, of each observation; empty where not measured.
    energies: Sequence[float] = ()
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        energies = np.asarray(self.energies, np.float64)
        one_each = energies.shape in ((0,), (self.samples,))
        if not (one_each and np.isfinite(energies).all() and (energies >= 0).all()):
            raise QvlaError(
                f"moments of {self.samples} observations need as many energies, none negative, got "
                f"{energies.size} from {energies.min(initial=0)} to {energies.max(initial=0)}"
            )

    def of(self, layer: str, shape: tuple[int, int]) -> LayerMoments:
        """Return a layer's moments.

        Args:
            layer: its name.
            shape: (channels, weights of one channel).

        Raises:
            QvlaError: there are none, or they are of a layer of another size.
        """
        channels, inputs = shape
        moments: LayerMoments | None = self.layers.get(layer)
        if moments is None:
            raise QvlaError(f"no moments of layer {layer!r}; measure them anew: qvla moments")
        blocks, size, _ = moments.channels.shape
        if len(moments.mean) != inputs or not blocks * size - size < channels <= blocks * size:
            raise QvlaError(
                f"the moments of layer {layer!r} are of {len(moments.mean)} inputs and about "
                f"{blocks * size} channels, it has {inputs} and {channels}; qvla moments"
            )
        return moments

    def shares(self, observations: int) -> NDArray[np.float64] | None:
        """Return `shares_of` the energies; None where they are of another number of observations.

        float64 [observations]
        """
        energies = np.asarray(self.energies, np.float64)
        return shares_of(energies) if len(energies) == observations else None

    def has_blocks(self, largest: int) -> bool:
        """Say whether matrices are kept in the blocks that `largest` asks for."""
        return all(
            layer.inputs.shape[-1] == block_size(len(layer.mean), largest)
            for layer in self.layers.values()
        )

    def require_of(self, policy_digest: str, calibration_digest: str | None = None) -> None:
        """Refuse another policy, or another calibration set than was named.

        Raises:
            ArtifactMismatch: naming both digests.
        """
        again = "Measure the moments of this policy on this set: qvla moments."
        require_same("policy and moments", self.policy_digest, policy_digest, again)
        if calibration_digest is not None:
            what = "calibration sets of moments and plan"
            require_same(what, self.calibration_digest, calibration_digest, again)


def shares_of(energies: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return what each observation counts, 1 on average: the root of its energy's inverse.

    As in the moments themselves: an observation at the edge of two actions has gradients many times
    those of others, and would be nearly all that a mean of squares is of.

    Args:
        energies: see `Moments.energies`.

    Returns:
        float64 [observations]; None where no observation has any.
    """
    if not energies.any():
        return None
    roots = 1 / np.sqrt(np.where(energies > 0, energies, np.inf))
    return np.asarray(roots / roots.mean(), np.float64)


def block_size(width: int, largest: int) -> int:
    """Return the size of the blocks that a matrix of a width is kept in: even shares."""
    return -(-width // -(-width // largest))


def _covers(blocks: NDArray[Any], width: int) -> bool:
    count, size = blocks.shape[:2]
    return blocks.shape == (count, size, size) and count * size >= width > (count - 1) * size


def _diagonal(blocks: NDArray[np.float32]) -> NDArray[np.float64]:
    return blocks.diagonal(axis1=1, axis2=2).reshape(-1).astype(np.float64)


def _submatrix(
    blocks: NDArray[np.float32],
    order: NDArray[np.int64],
    others: NDArray[np.int64],
    dtype: type[np.floating[Any]],
) -> NDArray[Any]:
    """Rows and columns of the whole matrix; zero outside the blocks."""
    size = blocks.shape[1]
    result = np.zeros((len(order), len(others)), dtype)
    for number, values in enumerate(blocks):
        rows, columns = (np.flatnonzero(some // size == number) for some in (order, others))
        # A row at a time, which stays in cache.
        chosen = others[columns] % size
        everything = len(columns) == len(others)
        for row, place in zip(rows, order[rows] % size, strict=True):
            result[row, slice(None) if everything else columns] = values[place].take(chosen)
    return result
