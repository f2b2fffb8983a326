"""Paths that info.json of a LeRobotDataset writes with numbers to fill in."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qvla_export.shared.errors import ArtifactError

# Where nothing else is written.
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_VIDEO_KEY = "video_key"


@dataclass(frozen=True)
class PathTemplate:
    """A path below the dataset, as `str.format` fills it."""

    text: str

    @staticmethod
    def of(path: Path, info: Mapping[str, Any], key: str, usual: str) -> "PathTemplate":
        """Return what `info` writes under a key, or the usual path.

        Args:
            path: of info.json, for messages.
            info: its object.
            key: "data_path" or "video_path".
            usual: the path where nothing is written; no other fields may be in it.

        Raises:
            ArtifactError: it is no path below the dataset: the file may be anyone's.
        """
        text = info.get(key) or usual
        fields = _fields(usual)
        try:
            parts = list(string.Formatter().parse(text))
            long = any(spec and len(spec) > 3 for _, _, spec, _ in parts)
            wrong = long or not _fields(text) <= fields
            filled = "" if wrong else text.format(**dict.fromkeys(fields - {_VIDEO_KEY}, 0), **_KEY)
        except (AttributeError, IndexError, TypeError, ValueError):
            wrong, filled = True, ""
        if wrong or not _is_below(filled):
            raise ArtifactError(
                f"{path}, {key}: a path below the dataset is needed, with no fields but "
                f"{sorted(fields)}, got {text!r}; write the dataset's metadata anew"
            )
        return PathTemplate(text)

    def require_below(self, keys: Sequence[str], path: Path) -> None:
        """Refuse columns of videos whose names lead out of the dataset.

        Raises:
            ArtifactError: one does.
        """
        numbers = dict.fromkeys(_fields(self.text) - {_VIDEO_KEY}, 0)
        for key in keys:
            if not _is_below(self.file(video_key=key, **numbers)):
                raise ArtifactError(
                    f"{path}: the column {key!r} leads out of the dataset, to videos elsewhere; "
                    "write the dataset's metadata anew"
                )

    def file(self, **values: int | str) -> str:
        """Return the path with its fields filled in."""
        return self.text.format(**values)


_KEY = {_VIDEO_KEY: "video"}


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _is_below(text: str) -> bool:
    path = PurePosixPath(text)
    return not path.is_absolute() and ".." not in path.parts
