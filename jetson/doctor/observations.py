"""Where observations come from: this machine's cameras, and a data set's columns."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jetson.doctor.bundle_facts import BundleFacts
from jetson.doctor.column_proposals import Proposal, propose_columns
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine
from jetson.doctor.statistics import CheckpointFacts

_CAMERAS = Check("cameras", "`qvla run --source camera:` reads them; a server is sent its pictures")
_DATASET = Check("data set", "sensitivities are measured on its observations")
_COLUMNS = Check(
    "data set's cameras", "a camera under another name is refused", "the policy's names"
)
# Stands for a column that only the user knows.
_COLUMN = "COLUMN"


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
        # The problem's text says what to do, and a table breaks it.
        return _DATASET.error(
            facts.problem, f"{facts.problem}; to look into it: {_look_into(facts.path)}"
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
        return _COLUMNS.warning(
            _list_cameras(facts.cameras),
            _proposal(facts.path, propose_columns(needs.cameras, facts.cameras)),
            wanted=", ".join(needs.cameras),
        )
    sizes, wanted = (facts.state_dim, facts.action_dim), (needs.state_dim, needs.action_dim)
    wrong = ["state"] if wanted[0] and sizes[0] != wanted[0] else []
    # Calibration needs no actions.
    wrong += ["action"] if sizes[1] and sizes[1] != wanted[1] else []
    if wrong:
        options = " and ".join(f"--{name}-column COLUMN" for name in wrong)
        return _COLUMNS.warning(
            f"state {sizes[0]}, action {sizes[1]}",
            f"name the column of the policy's {' and '.join(wrong)}: {options}, of what is there: "
            f"{_look_into(facts.path)}",
            wanted=f"state {wanted[0]}, action {wanted[1]}",
        )
    return _COLUMNS.ok(_list_cameras(facts.cameras))


def _look_into(path: Path) -> str:
    """Return the command that shows what a data set holds, or at least which files."""
    info = path / "meta/info.json"
    place = shlex.quote(str(info if info.is_file() else path))
    return f"sed -n 1,40p {place}" if info.is_file() else f"ls {place}"


def _proposal(path: Path, proposal: Proposal) -> str:
    columns = proposal.columns
    options = " ".join(
        f"--camera {shlex.quote(f'{name}={columns[name] or _COLUMN}')}" for name in columns
    )
    remedy = f"where it is used: --dataset {shlex.quote(str(path))} {options}"
    if all(columns.values()):
        return remedy
    if not proposal.unused:
        return f"{remedy}; the data set has no column left for {_COLUMN}"
    return f"{remedy}; {_COLUMN} is one of {', '.join(proposal.unused)}: names do not say which"


def _list_cameras(cameras: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({column})" for name, column in cameras.items()) or "no cameras"
