"""What `dataset_info.json` and `features.json` of tensorflow-datasets say beside TFRecord files."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import FOREIGN, Node, read_json

_INFO = "dataset_info.json"
_FEATURES = "features.json"
_SHARD = re.compile(r"-(?P<split>[^-]+)\.tfrecord-(?P<number>\d{5,})-of-(?P<count>\d{5,})$")


@dataclass(frozen=True)
class RldsMetadata:
    """What the files say, as far as it can be held against the data."""

    files: tuple[Path, ...]
    # Split -> records of each of its shards.
    shards: Mapping[str, tuple[int, ...]]
    # Column -> numbers a step, where all dimensions are stated.
    sizes: Mapping[str, int]

    def check_shard(self, path: Path, records: int) -> None:
        """Compare the records of a file with what is stated of it.

        Raises:
            ArtifactError: they differ.
        """
        match = _SHARD.search(path.name)
        lengths = self.shards.get(match["split"], ()) if match else ()
        number = int(match["number"]) if match else 0
        if match and number < len(lengths) and lengths[number] != records:
            raise ArtifactError(
                f"{path} has {records} records, {_INFO} says {lengths[number]}; the file is cut "
                "short or of another data set; copy it again"
            )


def absent_shards(paths: Sequence[Path]) -> str | None:
    """Say how many files there are of each split that names more; None where none is missing."""
    counts: dict[tuple[str, int], int] = {}
    for match in filter(None, (_SHARD.search(path.name) for path in paths)):
        split = (match["split"], int(match["count"]))
        counts[split] = counts.get(split, 0) + 1
    told = [f"{n} of {total} of {split}" for (split, total), n in counts.items() if n < total]
    return ", ".join(told) or None


def read_metadata(folder: Path) -> RldsMetadata:
    """Return what lies beside TFRecord files; both files may be absent.

    Raises:
        ArtifactError: a file is damaged, or says that records are stored otherwise.
    """
    files = tuple(path for path in (folder / _INFO, folder / _FEATURES) if path.exists())
    shards: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    if (folder / _INFO).exists():
        info = _document(folder / _INFO)
        file_format = info.field("fileFormat").text() if info.has("fileFormat") else "tfrecord"
        if file_format != "tfrecord":
            raise ArtifactError(
                f"{folder} is stored as {file_format}, this reads tfrecord; write it anew with "
                "tfds build --file_format=tfrecord"
            )
        for split in info.field("splits").elements() if info.has("splits") else []:
            lengths = split.field("shardLengths").elements() if split.has("shardLengths") else []
            shards[split.field("name").text()] = tuple(_count(length) for length in lengths)
    if (folder / _FEATURES).exists():
        sizes = dict(_sizes(_document(folder / _FEATURES), ()))
    return RldsMetadata(files, shards, sizes)


def _document(path: Path) -> Node:
    return Node(read_json(path, "RLDS metadata", FOREIGN), str(path))


def _count(node: Node) -> int:
    """Return a number that protobuf's JSON writes as a text."""
    if isinstance(node.value, str) and node.value.isascii() and node.value.isdecimal():
        return Node(int(node.value[:20]), node.file, node.path, node.remedy).whole()
    return node.whole()


def _sizes(feature: Node, path: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield column and numbers a step of each tensor; `steps` is left out of names."""
    if feature.has("featuresDict"):
        features = feature.field("featuresDict").field("features")
        for name, inner in features.fields().items():
            yield from _sizes(inner, path if (*path, name) == ("steps",) else (*path, name))
    elif feature.has("sequence"):
        # Only the steps of an episode are a sequence whose parts have the same names.
        if not path:
            yield from _sizes(feature.field("sequence").field("feature"), path)
    elif feature.has("tensor"):
        shape = feature.field("tensor").field("shape")
        dimensions = shape.field("dimensions").elements() if shape.has("dimensions") else []
        if not any(dimension.value in ("-1", -1) for dimension in dimensions):
            yield "/".join(path), math.prod(_count(dimension) for dimension in dimensions)
