"""What readers of arrays share: a format gives columns' raw values, checked frames come out."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame, Frame, OneWidth
from calibration.sources.hub_cache import name_of_dataset
from calibration.sources.image_codec import decode_png, require_picture
from calibration.sources.instruction_texts import text_of
from calibration.sources.source_columns import Columns
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

_SKIP = "mend it, or leave such frames out with --skip-bad-frames"
# Files that say what the data are count by content in a digest, others by their size: what is
# drawn of those is compared frame by frame.
_METADATA = (".json", ".jsonl", ".npy")


@dataclass(frozen=True)
class Moment:
    """One frame of an episode, by number, and what its messages begin with."""

    source: str
    episode: int
    frame: int

    def column(self, name: str) -> str:
        """Return where a column's value stands."""
        return f"{self.source}, episode {self.episode}, frame {self.frame}, column {name}"


class FrameSource(ABC):
    """A `DataSource` of a format that gives the values of columns, frame by frame.

    A reader sets the fields below and implements what is abstract.
    """

    # The format's name, as messages and `identity` say it.
    format_name: str
    root: Path
    fps: float
    columns: Columns
    # Frames of each episode.
    episode_lengths: Sequence[int]
    # Of an action's numbers, where the format says.
    action_names: tuple[str, ...] = ()

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images in every frame, in order."""
        return tuple(self.columns.images)

    @abstractmethod
    def picture(self, moment: Moment, column: str) -> Any:
        """Return bytes of an image file, or pixels uint8 [h, w, 3]."""

    @abstractmethod
    def vector(self, moment: Moment, column: str) -> Any:
        """Return numbers; null as NaN."""

    @abstractmethod
    def instruction(self, moment: Moment) -> str:
        """Return what to do; empty where the recording does not say."""

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """Return the files that the recording consists of."""

    def close(self) -> None:  # noqa: B027  # most readers keep nothing open
        """Close open files; reading again reopens them."""

    def frame(self, episode: int, frame: int) -> Frame:
        """Read one frame of an episode.

        Raises:
            IndexError: there is no such episode or frame.
            BadFrame: its state is not finite, or its instruction is empty.
            ArtifactError: the recording is damaged.
        """
        moment = self._moment(episode, frame)
        images = {
            name: self._pixels(name, self.picture(moment, column), moment.column(column))
            for name, column in self.columns.images.items()
        }
        observation = Observation(images, self._instruction(moment), self._state(moment))
        action = self._vectors(moment, self.columns.action)
        return Frame(observation, action, episode, frame, frame / self.fps)

    def actions(self, episode: int, start: int, stop: int) -> NDArray[np.float32]:
        """Read the actions of frames [start, stop).  float32 [n, dim], dim 0 where it has none"""
        moments = [self._moment(episode, frame) for frame in range(start, stop)]
        rows = [self._vectors(moment, self.columns.action) for moment in moments]
        if len({len(row) for row in rows}) > 1:
            raise ArtifactError(
                f"{self.root}, episode {episode}: actions have different numbers of dimensions"
            )
        return np.stack(rows) if rows else np.zeros((0, 0), np.float32)

    def identity(self) -> Mapping[str, Any]:
        """Return name, format, digest of the files' names, sizes and metadata, columns used."""
        columns = self.columns
        phrase = {"instruction": columns.one_instruction} if columns.one_instruction else {}
        return {
            "dataset": name_of_dataset(self.root),
            "format": self.format_name,
            "dataset_digest": _digest(self.files()),
            "columns": {
                **columns.images,
                "state": ",".join(columns.state),
                "instruction": columns.instruction or "",
            },
            **phrase,
        }

    def _moment(self, episode: int, frame: int) -> Moment:
        if not 0 <= episode < len(self.episode_lengths):
            raise IndexError(f"episode {episode} of {len(self.episode_lengths)}")
        if not 0 <= frame < self.episode_lengths[episode]:
            raise IndexError(f"frame {frame} of {self.episode_lengths[episode]}")
        return Moment(str(self.root), episode, frame)

    def _pixels(self, camera: str, value: Any, place: str) -> NDArray[np.uint8]:
        try:
            image = np.asarray(decode_png(value) if isinstance(value, bytes) else value)
            if image.ndim == 3 and image.size:
                require_picture(image.shape[1], image.shape[0])
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}") from None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ArtifactError(
                f"{place} holds no RGB picture uint8 [h, w, 3] but {image.dtype} "
                f"{list(image.shape)}; name only colour cameras with --camera NAME=COLUMN"
            )
        sizes = self.__dict__.setdefault("_sizes", {})
        size, first = sizes.setdefault(camera, (image.shape, place))
        if image.shape != size:
            raise ArtifactError(
                f"{place}: the picture is {image.shape[0]} x {image.shape[1]}, but {first} has "
                f"{size[0]} x {size[1]}; bring all pictures of a camera to one size"
            )
        return image

    def _state(self, moment: Moment) -> NDArray[np.float32]:
        state = self._vectors(moment, self.columns.state)
        place = moment.column(",".join(self.columns.state))
        bad = np.flatnonzero(~np.isfinite(state))
        if len(bad):
            raise BadFrame(f"{place}: number {bad[0]} of the state is {state[bad[0]]}; {_SKIP}")
        self.__dict__.setdefault("_width", OneWidth()).require(len(state), place)
        return state

    def _vectors(self, moment: Moment, columns: Sequence[str]) -> NDArray[np.float32]:
        parts = [np.zeros(0, np.float32)]
        for column in columns:
            try:
                raw = self.vector(moment, column)
                values = np.asarray(raw)
                if (
                    isinstance(raw, bytes | memoryview)
                    or values.dtype.kind not in "biuf"
                    or values.ndim > 2
                ):
                    raise ValueError
                # What overflows float32 is infinite, which is refused where it matters.
                with np.errstate(over="ignore"):
                    parts.append(values.astype(np.float32).reshape(-1))
            except (TypeError, ValueError) as error:
                if isinstance(error, ArtifactError):
                    raise
                place = moment.column(column)
                raise ArtifactError(
                    f"{place} holds no vector of numbers; name another one with --state-column "
                    "or --action-column"
                ) from None
        return np.concatenate(parts)

    def _instruction(self, moment: Moment) -> str:
        place = moment.column(self.columns.instruction or "instruction")
        text = self.columns.one_instruction or text_of(self.instruction(moment), place)
        if not text.strip():
            raise BadFrame(
                f"{place}: the instruction is empty; {_SKIP}, or say it with --instruction TEXT"
            )
        return text


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        content = sha256_file(path) if path.suffix in _METADATA else ""
        digest.update(f"{path.name}\0{size} {content}\n".encode())
    return digest.hexdigest()
