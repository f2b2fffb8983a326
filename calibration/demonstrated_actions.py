"""The noun `Demonstrations`: what was done from the moments of held-out observations on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from calibration.sources.base import BadFrame, DataSource

# Actions kept after each observation: more than any policy known here has in a chunk (50).
FOLLOWING = 64
_ACTIONS = "actions"


@runtime_checkable
class ActionSource(Protocol):
    """A `DataSource` that reads actions without their pictures, and may name their numbers."""

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of an action's numbers; empty where the recording does not say."""
        ...

    def actions(self, episode: int, start: int, stop: int) -> NDArray[np.float32]:
        """Read the actions of frames [start, stop).  float32 [n, dim], dim 0 where it has none"""
        ...


@dataclass(frozen=True)
class Demonstrations:
    """The recorded actions from each held-out observation on."""

    # In the recording's units; NaN after the episode's end.  float32 [observations, steps, dim]
    actions: NDArray[np.float32]
    # Of an action's numbers; empty where the recording does not say.
    names: tuple[str, ...] = ()
    # Millimetres of one unit of a translation, degrees of one of a rotation; None where unknown.
    unit_mm: float | None = None
    unit_deg: float | None = None

    def __repr__(self) -> str:
        count, steps, dim = self.actions.shape
        return f"<Demonstrations: {count} times up to {steps} actions of {dim} numbers>"

    @property
    def digest(self) -> str:
        """SHA-256 over actions, names and units."""
        about = json.dumps([self.actions.shape, self.names, self.unit_mm, self.unit_deg])
        return hashlib.sha256(about.encode() + self.actions.tobytes()).hexdigest()

    def pack(self) -> bytes:
        """Return a safetensors file of the actions."""
        return save_tensors({_ACTIONS: self.actions})

    def describe(self) -> dict[str, Any]:
        """Return as JSON values what the file of the actions does not say."""
        return {
            "digest": self.digest,
            "names": list(self.names),
            "unit_mm": self.unit_mm,
            "unit_deg": self.unit_deg,
        }

    @staticmethod
    def unpack(data: bytes, description: Mapping[str, Any]) -> "Demonstrations":
        """Return what `pack` and `describe` returned.

        Raises:
            SafetensorError, KeyError, TypeError, ValueError: they are damaged.
        """
        actions = np.asarray(load_tensors(data)[_ACTIONS], np.float32)
        unit_mm, unit_deg = (
            None if description[name] is None else float(description[name])
            for name in ("unit_mm", "unit_deg")
        )
        names = tuple(map(str, description["names"]))
        loaded = Demonstrations(actions, names, unit_mm, unit_deg)
        if actions.ndim != 3 or loaded.digest != description["digest"]:
            raise ValueError("the demonstrated actions were changed")
        return loaded


def following_actions(source: DataSource, episode: int, frame: int) -> NDArray[np.float32]:
    """Return the recorded actions of an episode from a frame on, at most `FOLLOWING`.

    Actions end where the recording has one that is not finite.  float32 [n, dim], dim 0 where it
    has none.

    Raises:
        ArtifactError: the recording is damaged.
    """
    stop = min(frame + FOLLOWING, source.episode_lengths[episode])
    if isinstance(source, ActionSource):
        return _finite_start(source.actions(episode, frame, stop))
    actions: list[NDArray[np.float32]] = []
    for number in range(frame, stop):
        try:
            actions.append(source.frame(episode, number).action)
        except BadFrame:
            break
        if not actions[-1].size:
            break
    return _finite_start(np.stack(actions) if actions else np.zeros((0, 0), np.float32))


def pad_following(actions: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Return actions of several observations in one array, NaN behind the last of each.

    None where an observation has none, or numbers of dimensions differ: then there is nothing
    that all could be judged by.
    """
    sizes = {action.shape[-1] for action in actions if len(action)}
    if len(sizes) != 1 or sizes == {0} or not actions:
        return None
    longest = max(map(len, actions))
    padded = np.full((len(actions), longest, sizes.pop()), np.nan, np.float32)
    for row, action in zip(padded, actions, strict=True):
        row[: len(action)] = action
    return padded


def names_of(source: DataSource, dim: int) -> tuple[str, ...]:
    """Return the names that a recording has for an action's numbers; empty unless there are dim."""
    names = source.action_names if isinstance(source, ActionSource) else ()
    return names if len(names) == dim else ()


def _finite_start(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
    return actions[: bad[0]] if len(bad) else actions
