"""Artifacts that may be kept, and bars of progress: what every stage of a run uses."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from qvla_export.shared.artifacts import remove_leftovers
from qvla_export.shared.errors import ArtifactError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def kept_artifact(path: Path, load: Callable[[Path], T]) -> T | None:
    """Load an artifact that may be reused; a damaged one is reported and made anew."""
    if not path.exists():
        return None
    # Of a kill after the artifact was in place: nothing else would remove them.
    remove_leftovers(path)
    try:
        return load(path)
    except ArtifactError as error:
        _LOG.warning("making %s anew: %s", path, error)
        return None


def bar(progress: Progress, description: str) -> Callable[[int, int], None]:
    task = progress.add_task(description)
    return lambda done, total: progress.update(task, completed=done, total=total)
