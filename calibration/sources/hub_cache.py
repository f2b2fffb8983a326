"""Data sets of the Hugging Face Hub that were downloaded to this machine; never the network."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from qvla_export.shared.errors import QvlaError

# ORGANISATION/NAME, as the Hub allows.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Before an id, as pages' addresses and fsspec have it; a path has one slash where there were two.
_ADDRESS = re.compile(r"(?:https?:/+(?:www\.)?huggingface\.co|hf:)/+datasets/")
_INFO = "meta/info.json"
# Whose snapshot is taken first where a cache has several: the default branch, then LeRobot's tags.
_REFERENCES = ("main", "v3.0", "v2.1", "v2.0")
_FOLDER = "datasets--"


def find_dataset(place: Path) -> Path:
    """Return the folder of a data set that is named by a path or by its id on the Hub.

    A path that exists comes first. An id, such as lerobot/pusht, also behind hf://datasets/ or in
    the address of its page, is looked for where LeRobot and
    the Hub's own client keep what they downloaded (HF_LEROBOT_HOME, HF_HUB_CACHE, HF_HOME). What
    is neither is returned as it is.

    Raises:
        QvlaError: the id is of no data set that was downloaded, with the command that does it; or
            of several snapshots of which none is current.
    """
    name = _ADDRESS.sub("", str(place), 1)
    if place.exists() or not _ID.fullmatch(name):
        return place
    looked_at = [_lerobot_home() / name]
    if (looked_at[0] / _INFO).is_file():
        return looked_at[0]
    for cache in (_lerobot_home() / "hub", _hub_cache()):
        folder = cache / f"{_FOLDER}{name.replace('/', '--')}"
        looked_at.append(folder)
        if (snapshot := _snapshot(folder)) is not None:
            return snapshot
    raise QvlaError(
        f"data set not found: {name}; there is no such folder here, and the local cache of the "
        f"Hub has none in {', '.join(map(str, looked_at))}; if it is a data set of the Hub, "
        f"download it: hf download {name} --repo-type dataset"
    )


def name_of_dataset(root: Path) -> str:
    """Return what tells a folder's data set from others: its id where it is the Hub's snapshot."""
    whole = root.resolve()
    repository = whole.parent.parent.name
    if whole.parent.name == "snapshots" and repository.startswith(_FOLDER):
        return repository.removeprefix(_FOLDER).replace("--", "/", 1)
    return whole.name


def _snapshot(folder: Path) -> Path | None:
    """Return the current snapshot of a folder of the Hub's cache; None where there is none."""
    for reference in _REFERENCES:
        try:
            revision = (folder / "refs" / reference).read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        # A revision is a folder's name, and an id cannot lead out of the cache.
        if re.fullmatch(r"[\w.-]+", revision) and _is_dataset(folder / "snapshots" / revision):
            return folder / "snapshots" / revision
    whole = list(filter(_is_dataset, _folders(folder / "snapshots")))
    if len(whole) > 1:
        raise QvlaError(
            f"{folder} has several snapshots, of which none is current; give one of them: "
            f"{', '.join(map(str, whole))}"
        )
    return whole[0] if whole else None


def _is_dataset(folder: Path) -> bool:
    # A download that was interrupted may lack it.
    return (folder / _INFO).is_file()


def _folders(parent: Path) -> Iterator[Path]:
    return iter(sorted(parent.iterdir()) if parent.is_dir() else ())


def _home() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _path(os.environ.get("HF_HOME") or f"{caches}/huggingface")


def _hub_cache() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _path(named) if named else _home() / "hub"


def _lerobot_home() -> Path:
    named = os.environ.get("HF_LEROBOT_HOME")
    return _path(named) if named else _home() / "lerobot"


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()
