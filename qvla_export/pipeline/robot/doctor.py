"""Examine this machine, and what it is to run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions, open_dataset
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.doctor.examination import DoctorRequest
    from jetson.doctor.finding import BoardFinding, Severity
    from jetson.doctor.observations import DatasetFacts

_FORMAT = "qvla.doctor/1"


@dataclass(frozen=True)
class Examination:
    """Every finding, in the order of the machine's parts."""

    findings: "tuple[BoardFinding, ...]"

    @property
    def counts(self) -> "dict[Severity, int]":
        """How many findings there are of each severity, the worst first."""
        from jetson.doctor.finding import SEVERITIES, count

        return {severity: count(self.findings, severity) for severity in SEVERITIES}

    def to_json(self) -> dict[str, Any]:
        """Return counts and findings as JSON values."""
        shown = [finding.to_json() for finding in self.findings]
        return {"format": _FORMAT, "counts": self.counts, "findings": shown}


def examine_machine(
    request: "DoctorRequest",
    dataset: Path | None = None,
    columns: ColumnOptions = USUAL_COLUMNS,
) -> Examination:
    """Look at every setting that makes a policy fail, act wrongly or run late; never an error.

    Args:
        request: what the machine is to run.
        dataset: folder of a LeRobotDataset whose columns are compared with the policy's.
        columns: which of its columns are what.
    """
    from jetson.doctor.examination import examine, read_subject

    facts = None if dataset is None else _dataset_facts(dataset, columns)
    subject = read_subject(request, dataset=facts, load_problem=_load_problem(request))
    return Examination(examine(request, subject))


def looks_like_checkpoint(place: Path) -> bool:
    """Whether a folder is a policy's weights, whole or an adapter's, rather than a bundle."""
    from qvla_export.shared.bundle import MANIFEST

    return not (place / MANIFEST).exists() and any(
        any(place.glob(pattern)) for pattern in ("*config.json", "*.safetensors*")
    )


def _load_problem(request: "DoctorRequest") -> str | None:
    """Return why the checkpoint cannot be loaded, empty if it can.

    Without torch files are looked at and their numbers are not: None where nothing is wrong then.
    """
    from qvla_export.policies.families import recognize

    if request.checkpoint is None:
        return None
    try:
        family = recognize(request.checkpoint)
        try:
            family.check(request.checkpoint, request.unnorm_key, request.preset)
        except ImportError:
            family.check_files(request.checkpoint, request.preset)
            return None
    except (QvlaError, OSError) as error:
        return str(error)
    return ""


def _dataset_facts(path: Path, columns: ColumnOptions) -> "DatasetFacts":
    """Return a data set's columns; or why it, or the library for it, is not there."""
    from jetson.doctor.observations import DatasetFacts

    try:
        from calibration.sources.frame_source import FrameSource
        from calibration.sources.lerobot import LeRobotDataset

        dataset = open_dataset(path, columns)
        frames = sum(dataset.episode_lengths)
        if isinstance(dataset, LeRobotDataset):
            state, action = dataset.width(dataset.keys.state), dataset.width(dataset.keys.action)
            return DatasetFacts(path, "", "", frames, dict(dataset.keys.images), state, action)
        first = dataset.frame(0, 0)
        state, action = len(first.observation.state), len(first.action)
        images = {name: name for name in dataset.cameras}
        if isinstance(dataset, FrameSource):
            images = dict(dataset.columns.images)
        return DatasetFacts(path, "", "", frames, images, state, action)
    except ImportError as error:
        return DatasetFacts(path, f"{error.name} is not installed", "pip install 'qvla[host]'")
    except (QvlaError, OSError, KeyError, TypeError, ValueError) as error:
        return DatasetFacts(path, " ".join(str(error).split()) or type(error).__name__)
