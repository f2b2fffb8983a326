"""The noun `NoiseSpec`: a model input that is random numbers, drawn alike on host and robot.

A policy that integrates a flow begins at noise, one that draws its tokens draws them by it. It is
an input of the graph, never drawn inside: what is drawn is a function of the observation and a
seed, so that the same observation gives the same action everywhere, and another frame other noise.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.observation import Observation

# "gumbel": the largest of logits with such numbers added is a draw from their softmax.
Distribution = Literal["normal", "gumbel"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
# What a draw depends on beside the seed.
SeedPolicy = Literal["observation"]
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class NoiseSpec:
    """Shape and law of an input of random numbers."""

    # Of the model's input.
    name: str
    # Without the batch.
    shape: tuple[int, ...]
    distribution: Distribution = "normal"
    seed_policy: SeedPolicy = "observation"
    seed: int = 0

    def draw(self, observation: Observation) -> NDArray[np.float32]:
        """Return the noise of an observation.  float32 [1, *shape]

        Uniform numbers of PCG64, whose stream NumPy keeps for good (NEP 19), become normal ones by
        Box and Muller's transform (1958) in float64, Gumbel's by inversion of its distribution.
        """
        generator = np.random.PCG64([self.seed, observation_number(observation)])
        count = int(np.prod(self.shape))
        if self.distribution == "gumbel":
            raw = generator.random_raw(count) >> np.uint64(11)
            # In (0, 1): both ends are infinite.
            open_uniform = (raw.astype(np.float64) + 0.5) / 2.0**53
            numbers = -np.log(-np.log(open_uniform))
            return numbers.astype(np.float32).reshape(1, *self.shape)
        raw = generator.random_raw(2 * count) >> np.uint64(11)
        # In (0, 1]: the logarithm of 0 is none.
        uniform = (raw.astype(np.float64) + 1.0) / 2.0**53
        radius = np.sqrt(-2.0 * np.log(uniform[:count]))
        normal = radius * np.cos(2.0 * np.pi * uniform[count:])
        return normal.astype(np.float32).reshape(1, *self.shape)


def observation_number(observation: Observation) -> int:
    """Return a number that is equal for equal images, state and instruction, and hardly else."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(observation.images):
        image = observation.images[name]
        digest.update(f"{name} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
    digest.update(np.ascontiguousarray(observation.state, np.float32).tobytes())
    digest.update(observation.instruction.encode())
    return int.from_bytes(digest.digest(), "little")


def noise_from_json(value: Mapping[str, Any] | None) -> NoiseSpec | None:
    """Rebuild what `dataclasses.asdict` made of a specification.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    if value is None:
        return None
    spec = NoiseSpec(**{**value, "shape": tuple(value["shape"])})
    sizes = all(type(size) is int and 0 < size <= 1 << 16 for size in spec.shape)
    known = spec.distribution in DISTRIBUTIONS and spec.seed_policy == "observation"
    seeded = type(spec.seed) is int and spec.seed >= 0
    if not (isinstance(spec.name, str) and spec.name and spec.shape and sizes and known and seeded):
        raise ValueError(f"no noise that can be drawn here: {value!r:.200}")
    return spec
