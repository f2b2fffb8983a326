"""LIBERO's and ALOHA's HDF5: several demonstrations a file, or one episode a file."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.sources.data_paths import visible
from calibration.sources.frame_source import FrameSource, Moment
from calibration.sources.hdf5.hdf5_file import Hdf5File
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.source_columns import Offer, choose_columns
from qvla_export.shared.errors import ArtifactError

# In one episode; the same group may be in a file under many names.
_MOST_NAMES = 10_000
_ENDINGS = (".hdf5", ".h5")


@dataclass(frozen=True)
class EpisodePlace:
    """Where an episode lies: a group of a file."""

    path: Path
    # Empty where the whole file is the episode.
    group: str
    length: int


class Hdf5Source(FrameSource):
    """Episodes of a file, or of a folder's files in natural order.

    Raises:
        ArtifactError: a file is damaged, or its arrays do not fit each other.
        QvlaError: a column is not there.
    """

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        self._paths = hdf5_files(root)
        self._file: Hdf5File | None = None
        first = self._open(self._paths[0])
        names = self.arrays_of(first, self.groups_of(first)[0])
        pictures = [n for n, rank in names.items() if self.is_picture(n, rank)]
        others = [name for name in names if name not in pictures]
        self.columns = choose_columns(keys or KeyMap(), self.offer(pictures, others), str(root))
        self._places = [place for path in self._paths for place in self._episodes_of(path)]
        self.episode_lengths = tuple(place.length for place in self._places)

    @abstractmethod
    def groups_of(self, file: Hdf5File) -> list[str]:
        """Return the groups of a file's episodes."""

    @abstractmethod
    def is_picture(self, name: str, rank: int) -> bool:
        """Whether an array of a name and so many dimensions holds pictures."""

    @abstractmethod
    def offer(self, pictures: Sequence[str], others: Sequence[str]) -> Offer:
        """Return the usual names beside those that are there."""

    def vector(self, moment: Moment, column: str) -> Any:
        """Return numbers."""
        return self.row(moment, column)

    def row(self, moment: Moment, column: str) -> Any:
        """Return an array's row at a moment."""
        file, place = self.place_of(moment)
        return file.row(_join(place.group, column), moment.frame)

    def place_of(self, moment: Moment) -> tuple[Hdf5File, EpisodePlace]:
        """Return the open file of an episode, and where in it the episode lies."""
        place = self._places[moment.episode]
        return self._open(place.path), place

    def files(self) -> Iterable[Path]:
        """Return the files."""
        return self._paths

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> Hdf5File:
        if self._file is None or self._file.path != path:
            self.close()
            self._file = Hdf5File(path)
        return self._file

    def arrays_of(self, file: Hdf5File, group: str) -> dict[str, int]:
        """Return an episode's arrays by path, and how many dimensions each has."""
        ranks = {}
        for count, name in enumerate(_walk(file, group, depth=3)):
            if count > _MOST_NAMES:
                raise ArtifactError(
                    f"{file.path}, {group or 'episode'}: more than {_MOST_NAMES:,} groups and "
                    "arrays; write the file anew"
                )
            full = _join(group, name)
            if file.is_array(full):
                ranks[name] = len(file.shape(full))
        return ranks

    def _episodes_of(self, path: Path) -> Iterator[EpisodePlace]:
        file = self._open(path)
        columns = self.columns
        names = [*columns.images.values(), *columns.state, *columns.action]
        for group in self.groups_of(file):
            lengths = {}
            for name in names:
                shape = file.shape(_join(group, name))
                lengths[name] = shape[0] if shape else 0
            if len(set(lengths.values())) != 1 or not all(lengths.values()):
                raise ArtifactError(
                    f"{path}, {group or 'episode'}: arrays of one episode have as many rows, got "
                    f"{lengths}; write the file anew"
                )
            yield EpisodePlace(path, group, next(iter(lengths.values())))


def hdf5_files(root: Path) -> list[Path]:
    """Return a file, or the HDF5 files of a folder, in natural order."""
    if root.is_file():
        return [root]
    paths = (path for path in root.iterdir() if path.suffix in _ENDINGS and path.is_file())
    return sorted(visible(paths), key=lambda path: natural(path.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts demo_10 after demo_2."""
    return [
        (int(part[:18]), "") if part.isascii() and part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]


def _walk(file: Hdf5File, group: str, depth: int) -> Iterator[str]:
    for name in file.members(group):
        yield name
        if depth:
            for inner in _walk(file, _join(group, name), depth - 1):
                yield f"{name}/{inner}"


def _join(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name
