"""Where observations come from: this machine's cameras, and a data set's columns."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jetson.doctor.bundle_facts import BundleFacts
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine
from jetson.doctor.statistics import CheckpointFacts

_CAMERAS = Check("cameras", "`qvla run --source camera:` reads them; a server is sent its pictures")
_DATASET = Check("data set", "sensitivities are measured on its observations")
_COLUMNS = Check(
    "data set's cameras", "a camera under another name is refused", "the policy's names"
)


@dataclass(frozen=True)
class DatasetFacts:
    """A LeRobot data set's columns, or why it cannot be read."""

    path: Path
    problem: str = ""
    # What makes it readable, where the problem is a library that is missing.
    remedy: str = ""
    frames: int = 0
    # Camera name -> column; and the sizes of state and action.
    cameras: Mapping[str, str] | None = None
    state_dim: int = 0
    action_dim: int = 0


@dataclass(frozen=True)
class Needs:
    """What a policy is to be given."""

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int


def needs_of(bundle: BundleFacts | None, checkpoint: CheckpointFacts | None) -> Needs | None:
    """Return what the bundle, else the checkpoint, needs; None where neither says."""
    if bundle is not None and bundle.bundle is not None:
        spec = bundle.bundle.processor.spec
        return Needs(spec.cameras, spec.state_dim, spec.action_dim)
    if checkpoint is not None and checkpoint.config is not None:
        config = checkpoint.config
        return Needs(config.cameras, config.state_dim, config.action_dim)
    return None


def check_cameras(machine: Machine, needs: Needs | None) -> BoardFinding:
    """Say which cameras the policy has and which devices are here; a help, no fault."""
    found = ", ".join(machine.cameras) or "none at /dev/video*"
    if needs is None:
        return _CAMERAS.inapplicable(f"no policy given; found {found}")
    return _CAMERAS.ok(f"the policy's: {', '.join(needs.cameras)}; found {found}")


def check_dataset(facts: DatasetFacts | None) -> BoardFinding:
    """Look whether a data set can be read."""
    if facts is None:
        return _DATASET.inapplicable("no data set given")
    if facts.remedy:
        return _DATASET.unknown(facts.problem, facts.remedy)
    if facts.problem:
        return _DATASET.error(
            facts.problem,
            f"sed -n 1,40p {shlex.quote(str(facts.path))}/meta/info.json; mend what is "
            "named, or write it anew as a LeRobotDataset",
        )
    return _DATASET.ok(f"{facts.frames} frames")


def check_columns(facts: DatasetFacts | None, needs: Needs | None) -> BoardFinding:
    """Compare a data set's cameras and dimensions with the policy's."""
    if facts is None or facts.cameras is None:
        return _COLUMNS.inapplicable("no data set to look into")
    if needs is None:
        return _COLUMNS.inapplicable(f"no policy given; it has {_list_cameras(facts.cameras)}")
    missing = [name for name in needs.cameras if name not in facts.cameras]
    if missing:
        columns = _proposed_columns(needs.cameras, facts.cameras)
        options = " ".join(f"--camera {shlex.quote(f'{n}={c}')}" for n, c in columns.items())
        return _COLUMNS.warning(
            _list_cameras(facts.cameras),
            f"where it is used: --dataset {shlex.quote(str(facts.path))} {options}",
            wanted=", ".join(needs.cameras),
        )
    sizes, wanted = (facts.state_dim, facts.action_dim), (needs.state_dim, needs.action_dim)
    if wanted[0] and sizes != wanted:
        return _COLUMNS.warning(
            f"state {sizes[0]}, action {sizes[1]}",
            "name the column of the policy's state: --state-column COLUMN, one of the features in "
            f"{shlex.quote(str(facts.path))}/meta/info.json",
            wanted=f"state {wanted[0]}, action {wanted[1]}",
        )
    return _COLUMNS.ok(_list_cameras(facts.cameras))


def _proposed_columns(needed: Sequence[str], present: Mapping[str, str]) -> dict[str, str]:
    """Return a column for each camera that a policy needs, none of them twice.

    A camera of the same name keeps its column. Of the unused columns, one goes to a camera where
    it is the only one left for it, or the only one that shares a word of the name, such as wrist;
    otherwise all that are left are listed.
    """
    columns = {name: present[name] for name in needed if name in present}
    free = [column for name, column in present.items() if name not in needed]
    missing = [name for name in needed if name not in present]
    for name in sorted(missing, key=lambda name: not _alike(name, free)):
        candidates = _alike(name, free) or free
        columns[name] = "|".join(candidates) or "COLUMN"
        if len(candidates) == 1:
            free.remove(candidates[0])
    return {name: columns[name] for name in needed}


def _alike(name: str, columns: Sequence[str]) -> list[str]:
    words = set(re.split(r"[._/]", name.lower())) - {"image", "images", "observation", "rgb"}
    return [c for c in columns if words & set(re.split(r"[._/]", c.lower()))]


def _list_cameras(cameras: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({column})" for name, column in cameras.items()) or "no cameras"
