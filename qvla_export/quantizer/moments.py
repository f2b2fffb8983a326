"""The noun `Moments`: what layers are fed and what their outputs are worth. numpy only.

To second order and to first order in the action: with the weight error E of a layer, its inputs x
and the gradient g of the action at its outputs, the expected squared deviation of the action is
about tr(G E H E^T), where H = E[|g|^2 x x^T] / E[|g|^2] and G = E[g g^T], over tokens. H says
which inputs matter together, G which channels do. `measurement.measure_moments` measures them,
`qvla_export.quantizer.compensation` rounds with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.artifacts import require_fields, require_same, versions
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.tensor_files import (
    StoredLayers,
    TensorArtifact,
    Tensors,
    layer_tensors,
    open_tensor_file,
)

_FORMAT = "qvla-moments-1"
_FIELDS = (
    "layers",
    "samples",
    "probes",
    "seed",
    "policy_digest",
    "calibration_digest",
    "versions",
)


@dataclass(frozen=True)
class LayerMoments:
    """Of one layer. Matrices are kept in blocks along the diagonal where they would be too large.

    Raises:
        QvlaError: shapes that disagree, numbers that are not finite.
    """

    # Mean input of the tokens that the action depends on.  float32 [inputs]
    mean: NDArray[np.float32]
    # The same, tokens weighted by |g|^2.  float32 [inputs]
    weighted_mean: NDArray[np.float32]
    # E[|g|^2 (x - mean)(x - mean)^T] / E[|g|^2].  float32 [blocks, size, size], size <= inputs
    inputs: NDArray[np.float32]
    # E[g g^T].  float32 [blocks, size, size], size <= channels
    channels: NDArray[np.float32]

    def __post_init__(self) -> None:
        for part in fields(self):
            if not np.isfinite(getattr(self, part.name)).all():
                raise QvlaError(f"moments must be finite, {part.name} is not; the policy is broken")
        width = len(self.mean)
        if self.weighted_mean.shape != (width,) or not _covers(self.inputs, width):
            raise QvlaError(
                f"moments of {width} inputs have {list(self.weighted_mean.shape)} means and "
                f"blocks {list(self.inputs.shape)}"
            )
        if not _covers(self.channels, self.channels.shape[0] * self.channels.shape[-1]):
            raise QvlaError(f"blocks must be square, got {list(self.channels.shape)}")

    def input_matrix(self, centred: bool, order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return H of some inputs, in an order.

        Args:
            centred: about the mean, which a bias makes up for; else about zero.
            order: int64 [kept], indices of inputs.

        Returns:
            float64 [kept, kept]
        """
        matrix = _picked(self.inputs, order)
        if not centred:
            # About the weighted mean first, within blocks, then about zero for all inputs: in this
            # order no direction becomes negative where blocks leave moments out.
            weighted = self.weighted_mean[order].astype(np.float64)
            shift = weighted - self.mean[order]
            block = order // self.inputs.shape[1]
            for number in range(len(self.inputs)):
                inside = np.flatnonzero(block == number)
                matrix[np.ix_(inside, inside)] -= np.outer(shift[inside], shift[inside])
            matrix += np.outer(weighted, weighted)
        return matrix

    def channel_matrix(self, order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return G of some channels int64 [kept], in an order.  float64 [kept, kept]"""
        return _picked(self.channels, order)


@dataclass(frozen=True)
class Moments(TensorArtifact):
    """Moments of a policy's layers on calibration observations."""

    # Layer name -> its moments, in forward order.
    layers: Mapping[str, LayerMoments]
    # Observations, random probes of the action an observation, and the probes' seed.
    samples: int
    probes: int
    seed: int
    policy_digest: str
    calibration_digest: str
    made_with: Mapping[str, str] = field(default_factory=versions)

    def of(self, layer: str, channels: int, inputs: int) -> LayerMoments:
        """Return a layer's moments.

        Raises:
            QvlaError: there are none, or they are of a layer of another size.
        """
        found = self.layers.get(layer)
        if found is None:
            raise QvlaError(f"no moments of layer {layer!r}; measure them anew: qvla moments")
        blocks, size, _ = found.channels.shape
        if len(found.mean) != inputs or not blocks * size - size < channels <= blocks * size:
            raise QvlaError(
                f"the moments of layer {layer!r} are of {len(found.mean)} inputs and about "
                f"{blocks * size} channels, it has {inputs} and {channels}; qvla moments"
            )
        return found

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
            digests = (self.calibration_digest, calibration_digest)
            require_same("calibration sets of moments and plan", *digests, again)

    def _tensors(self) -> Tensors:
        return layer_tensors(self.layers)

    def _provenance(self) -> Mapping[str, Any]:
        return {
            "format": _FORMAT,
            "layers": list(self.layers),
            "samples": self.samples,
            "probes": self.probes,
            "seed": self.seed,
            "policy_digest": self.policy_digest,
            "calibration_digest": self.calibration_digest,
            "versions": dict(self.made_with),
        }

    @staticmethod
    def load(path: Path) -> "Moments":
        """Read moments; those of a layer lie in memory only while someone uses them.

        Raises:
            ArtifactError: the file is missing, truncated, damaged or of another kind.
        """
        tensors, value = open_tensor_file(path, _FORMAT, "moments")
        require_fields(value, _FIELDS, f"moments {path}")
        try:
            layers = StoredLayers(tensors, value["layers"], LayerMoments)
            for name in layers:
                layers[name]  # says what is wrong with it
            return Moments(
                layers=layers,
                samples=int(value["samples"]),
                probes=int(value["probes"]),
                seed=int(value["seed"]),
                policy_digest=value["policy_digest"],
                calibration_digest=value["calibration_digest"],
                made_with=value["versions"],
            )
        except (KeyError, TypeError, ValueError, QvlaError) as error:
            raise ArtifactError(f"moments {path} are damaged: {error}; make them anew") from error


def block_size(width: int, largest: int) -> int:
    """Return the size of the blocks that a matrix of a width is kept in: even shares."""
    return -(-width // -(-width // largest))


def _covers(blocks: NDArray[Any], width: int) -> bool:
    count, size = blocks.shape[:2]
    return blocks.shape == (count, size, size) and count * size >= width > (count - 1) * size


def _picked(blocks: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows and columns of the whole matrix in an order; zero outside the blocks."""
    size = blocks.shape[1]
    block, place = np.divmod(order, size)
    if len(blocks) == 1:
        whole: NDArray[np.float64] = blocks[0][np.ix_(place, place)].astype(np.float64)
        return whole
    result = np.zeros((len(order), len(order)))
    for number, values in enumerate(blocks):
        inside = np.flatnonzero(block == number)
        result[np.ix_(inside, inside)] = values[np.ix_(place[inside], place[inside])]
    return result
