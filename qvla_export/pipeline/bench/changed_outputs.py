"""How far what a changed network puts out lies from what it put out before."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.base import Policy, PolicyBatch
    from qvla_export.shared.observation import Observation

# Observations that run together: logits of a batch take a gigabyte and more where there are many.
_BATCH = 4


@dataclass(frozen=True)
class Outputs:
    """What a network puts out for observations."""

    # Its outputs, observations x tokens x numbers.  float32 [n, tokens, dim]
    values: NDArray[np.float32]
    # Mean negative log-likelihood of a text's next tokens, nats; None where it reads none.
    # float64 [n]
    surprise: NDArray[np.float64] | None


@dataclass(frozen=True)
class Change:
    """What became of the outputs of each observation."""

    # Length of the change over the length of the output.  float64 [n]
    relative: NDArray[np.float64]
    # Mean over tokens of the cosine between both.  float64 [n]
    cosine: NDArray[np.float64]
    # Of the changed network, see `Outputs`.
    surprise: NDArray[np.float64] | None


def outputs_of(policy: "Policy", observations: "Sequence[Observation]") -> Outputs:
    """Run a network on observations, a few at a time."""
    import torch

    values, surprises = [], []
    with torch.no_grad():
        for first in range(0, len(observations), _BATCH):
            batch = policy.batch(observations[first : first + _BATCH])
            values.append(policy.normalized_actions(batch).numpy())
            logits = policy.token_logits(batch)
            if logits is not None:
                surprises.append(_surprise(logits, batch))
    return Outputs(np.concatenate(values), np.concatenate(surprises) if surprises else None)


def change_under(
    policy: "Policy",
    observations: "Sequence[Observation]",
    before: Outputs,
    changed: AbstractContextManager[None],
) -> Change:
    """Compare what a network puts out inside a block with what it put out before.

    Args:
        policy: in memory.
        observations: those of `before`.
        before: of the float network.
        changed: the block.
    """
    with changed:
        after = outputs_of(policy, observations)
    old, new = before.values.astype(np.float64), after.values.astype(np.float64)
    lengths = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
    cosines = (old * new).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    moved, whole = (np.sqrt(np.square(x).sum(axis=(1, 2))) for x in (new - old, old))
    return Change(moved / whole, cosines.mean(axis=1), after.surprise)


def _surprise(logits: "Tensor", batch: "PolicyBatch") -> NDArray[np.float64]:
    """Return the mean over a text's tokens but the first, nats.  float64 [B]"""
    shares = logits[:, :-1].log_softmax(dim=-1)
    said = shares.gather(2, batch.input_ids[:, 1:, None])[..., 0]
    means: NDArray[np.float64] = (-said.double()).mean(dim=1).numpy()
    return means
