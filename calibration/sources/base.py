"""The `DataSource` protocol: recorded episodes of any format, read a frame at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation


class BadFrame(ArtifactError):
    """A frame has no usable state or instruction; others of the recording may."""


class OneWidth:
    """Holds every state of a recording to the width of the first one."""

    def __init__(self) -> None:
        self._first: tuple[int, str] | None = None

    def require(self, width: int, place: str) -> None:
        """Refuse another width than the first.

        Args:
            width: numbers of a state.
            place: names it in an error.

        Raises:
            ArtifactError: says where both are.
        """
        first, where = self._first = self._first or (width, place)
        if width != first:
            raise ArtifactError(
                f"{place}: the state has {width} numbers, but {where} has {first}; bring all to "
                "one length, or name another column with --state-column"
            )


@dataclass(frozen=True)
class Frame:
    """One moment of a recorded episode."""

    # Cameras, state and the instruction that holds at this moment.
    observation: Observation
    # Empty where the recording has none.  float32 [action dim]
    action: NDArray[np.float32]
    # Episode number, and frame number within it.
    episode: int
    frame: int
    # Seconds since the episode's start.
    timestamp: float


class DataSource(Protocol):
    """Recorded episodes, numbered from 0; nothing is read before a frame is asked for."""

    @property
    def root(self) -> Path:
        """Folder or file that holds the recording."""
        ...

    @property
    def fps(self) -> float:
        """Frames a second."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images in every frame, in order."""
        ...

    @property
    def episode_lengths(self) -> Sequence[int]:
        """Number of frames in each episode."""
        ...

    def frame(self, episode: int, frame: int) -> Frame:
        """Read one frame of an episode.

        Raises:
            IndexError: there is no such episode or frame.
            BadFrame: its state is not finite, or its instruction is empty.
            ArtifactError: the recording is damaged.
        """
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return what tells this recording from others, as JSON values: a digest, columns used."""
        ...

    def close(self) -> None:
        """Close open files; reading again reopens them."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A `DataSource` that reads faster what is announced, and looks at frames without pictures."""

    def check(self, episode: int, frame: int) -> None:
        """Look whether a frame has a usable state and instruction.

        Raises:
            BadFrame: its state is not finite, or its instruction is empty.
            ArtifactError: the recording is damaged.
        """
        ...

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Say which frames of which episodes will be read; each may be read once, in any order.

        Raises:
            ArtifactError: the recording is damaged.
        """
        ...
