"""RLDS: episodes as tensorflow-datasets stores them in TFRecord files, read without TensorFlow."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.sources.data_paths import visible
from calibration.sources.frame_source import FrameSource, Moment
from calibration.sources.image_codec import decode_as_tensorflow
from calibration.sources.instruction_texts import text_of
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.rlds.rlds_metadata import (
    RldsMetadata,
    absent_shards,
    read_metadata,
)
from calibration.sources.rlds.tf_example import Values, example_features, feature_values
from calibration.sources.rlds.tfrecord import TfRecordFile
from calibration.sources.source_columns import Offer, choose_columns
from qvla_export.shared.errors import ArtifactError

_LOG = logging.getLogger(__name__)
_STEPS = "steps/"
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_STATES = ("state", "proprio", "EEF_state,gripper_state")
_INSTRUCTIONS = (
    "language_instruction",
    "natural_language_instruction",
    "language_instruction_1",
)
# Features that every step has one of; the first there tells how many steps there are.
_STEP_MARKERS = ("is_first", "is_last", "is_terminal")


@dataclass(frozen=True)
class _EpisodePlace:
    path: Path
    record: int
    length: int


class RldsDataset(FrameSource):
    """The episodes of a folder's TFRecord files; a `DataSource`.

    Raises:
        ArtifactError: a file is missing or damaged, or holds no episodes.
        QvlaError: a column is not there.
    """

    format_name = "RLDS"
    # RLDS does not say; it only spaces timestamps.
    fps = 10.0

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        self._paths = record_files(root)
        if root.is_dir() and (told := absent_shards(self._paths)):
            _LOG.warning("%s is not whole, what is there is read: files %s", root, told)
        self._metadata: RldsMetadata = read_metadata(self._paths[0].parent)
        self._file: TfRecordFile | None = None
        self._episode: int | None = None
        self._features: Mapping[str, list[memoryview]] = {}
        self._values: dict[str, Values] = {}
        names = self._look_into_first()
        pictures = [name for name, picture in names.items() if picture]
        others = [name for name, picture in names.items() if not picture]
        offer = Offer(pictures, others, _STATES, ("action",), _INSTRUCTIONS)
        self.columns = choose_columns(keys or KeyMap(), offer, str(root))
        marker = next((name for name in _STEP_MARKERS if name in names), None)
        self._step_marker = marker or next(iter(self.columns.images.values()))
        self._places = [place for path in self._paths for place in self._episodes_of(path)]
        self.episode_lengths = tuple(place.length for place in self._places)

    def picture(self, moment: Moment, column: str) -> Any:
        """Return pixels uint8 [h, w, 3], as TensorFlow decodes them."""
        value = self._at(moment, column)
        if not isinstance(value, memoryview):
            raise ArtifactError(f"{moment.column(column)} holds no image file but numbers")
        try:
            return decode_as_tensorflow(bytes(value))
        except ArtifactError as error:
            raise ArtifactError(f"{moment.column(column)}: {error}") from None

    def vector(self, moment: Moment, column: str) -> Any:
        """Return numbers."""
        return self._at(moment, column)

    def instruction(self, moment: Moment) -> str:
        """Return the text of a step, or of its episode."""
        column = self.columns.instruction
        if column is None:
            return ""
        return text_of(self._at(moment, column), moment.column(column))

    def files(self) -> Iterable[Path]:
        """Return the TFRecord files and the metadata beside them."""
        return [*self._paths, *self._metadata.files]

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        self._features, self._values, self._episode = {}, {}, None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _look_into_first(self) -> dict[str, bool]:
        """Return the first episode's columns, and whether each holds pictures."""
        path = self._paths[0]
        file = self._open(path)
        if not len(file):
            raise ArtifactError(f"{path} holds no episodes; give a data set that has some")
        names = {}
        for name, features in sorted(_read_features(file, 0).items()):
            place = f"{path}, record 0, column {name}"
            # A camera's first pictures may be empty.
            values = (_values_of([feature], place) for feature in features)
            texts = (text for value in values if isinstance(value, list) for text in value)
            first = next((text for text in texts if len(text)), b"")
            names[name] = bytes(first[:8]).startswith(_PICTURES)
        return names

    def _episodes_of(self, path: Path) -> Iterable[_EpisodePlace]:
        file = self._open(path)
        self._metadata.check_shard(path, len(file))
        for record in range(len(file)):
            features = _read_features(file, record)
            place = f"{path}, record {record}"
            if self._step_marker not in features:
                raise ArtifactError(
                    f"{place} lacks the column {self._step_marker}; it has {', '.join(features)}"
                )
            marks = features[self._step_marker]
            length = len(marks) if len(marks) != 1 else len(_values_of(marks, place))
            if not length:
                raise ArtifactError(f"{place} is an episode of no steps; write the data set anew")
            yield _EpisodePlace(path, record, length)

    def _open(self, path: Path) -> TfRecordFile:
        if self._file is None or self._file.path != path:
            self.close()
            self._file = TfRecordFile(path)
        return self._file

    def _at(self, moment: Moment, column: str) -> Any:
        """Return a column's value at a step: bytes, or numbers."""
        place = self._places[moment.episode]
        if self._episode != moment.episode:
            file = self._open(place.path)
            file.check(place.record)
            self._features, self._values = _read_features(file, place.record), {}
            self._episode = moment.episode
        features = self._features.get(column, [])
        where = moment.column(column)
        if not features:
            raise ArtifactError(
                f"{where}: this episode has no such column; it has {', '.join(self._features)}"
            )
        if len(features) == place.length > 1:
            values = _values_of([features[moment.frame]], where)
            return values[0] if isinstance(values, list) and len(values) == 1 else values
        if column not in self._values:
            self._values[column] = _values_of(features, where)
        return self._step(self._values[column], place.length, moment, column)

    def _step(self, values: Values, length: int, moment: Moment, column: str) -> Any:
        # What belongs to the episode is there once.
        rows = 1 if column.startswith("episode_metadata/") else length
        row = moment.frame if rows == length else 0
        if isinstance(values, list):
            if len(values) != rows:
                raise ArtifactError(
                    f"{moment.column(column)}: {len(values)} values for {rows} steps; write the "
                    "data set anew"
                )
            return values[row]
        expected = self._metadata.sizes.get(column)
        if not len(values) or len(values) % rows or expected not in (None, len(values) // rows):
            raise ArtifactError(
                f"{moment.column(column)}: {len(values)} numbers for {rows} steps"
                + (f" of {expected} each" if expected else "")
                + "; write the data set anew"
            )
        return np.asarray(values).reshape(rows, -1)[row]


def record_files(root: Path) -> list[Path]:
    """Return the TFRecord files of a file, a folder, or the one version in it, in order.

    Raises:
        ArtifactError: there are none, or several versions.
    """
    if root.is_file():
        return [root]
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    files = {folder: visible(folder.glob("*.tfrecord*")) for folder in folders}
    present = [folder for folder, paths in files.items() if paths]
    if len(present) > 1:
        raise ArtifactError(
            f"{root} holds several data sets or versions; give one of them: "
            f"{', '.join(map(str, present[:8]))}"
        )
    if not present:
        raise ArtifactError(
            f"{root} is RLDS, but no TFRecord files lie in it (NAME-train.tfrecord-00000-of-00001);"
            " download the data set whole, or write it with tfds build --file_format=tfrecord"
        )
    return files[present[0]]


def _read_features(file: TfRecordFile, record: int) -> dict[str, list[memoryview]]:
    """Return an episode's features by column: `steps/` is left out, all else is not."""
    place = f"{file.path}, record {record}"
    try:
        features = example_features(file.record(record))
    except ValueError as error:
        raise ArtifactError(
            f"{place} is no tf.train.Example: {error}; copy the file again"
        ) from None
    stepwise = any(name.startswith(_STEPS) for name in features)
    if not stepwise and not any(len(messages) > 1 for messages in features.values()):
        raise ArtifactError(
            f"{place} holds no episode: no column begins with {_STEPS}; RLDS has one episode a "
            f"record, this has {', '.join(features) or 'nothing'}"
        )
    return {name.removeprefix(_STEPS): messages for name, messages in features.items()}


def _values_of(features: list[memoryview], place: str) -> Values:
    try:
        return feature_values(features[0]) if features else []
    except ValueError as error:
        raise ArtifactError(f"{place}: no feature of tf.train.Example: {error}") from None
