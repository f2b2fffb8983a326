"""One run's folder: where every step reads and writes, and what of it is up to date."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qvla_export.allocation.setting import Setting
from qvla_export.shared.artifacts import remove_leftovers
from qvla_export.shared.errors import ArtifactError

_LOG = logging.getLogger(__name__)
# File of a setting's codes, beside its plan and bundle.
ROUNDING = "rounding.safetensors"
# Of an artifact's record, beside it; see `pipeline.work.log`.
RECORD_SUFFIX = ".work"

T = TypeVar("T")


def require_artifact(path: Path, command: str) -> Path:
    """Return the path of an artifact that an earlier step has written.

    Raises:
        ArtifactError: it is missing; the message names the command that makes it.
    """
    if not path.exists():
        raise ArtifactError(f"{path} not found; make it first with: qvla {command}")
    return path


def record_file(path: Path) -> Path:
    """Return where it is recorded what an artifact was made from and what it cost."""
    return path.with_name(path.name + RECORD_SUFFIX)


def load_if_current(
    path: Path, load: Callable[[Path], T], is_current: Callable[[T], bool] = lambda _: True
) -> T | None:
    """Load an artifact if it is there, whole and current; None where it is to be made.

    Args:
        path: of the artifact.
        load: reads it; a damaged one is reported and made anew.
        is_current: whether it was made from the same and in the same way.
    """
    if not path.exists():
        return None
    # Of a kill after the artifact was in place: nothing else would remove them.
    for written in (path, record_file(path)):
        remove_leftovers(written)
    try:
        loaded = load(path)
    except ArtifactError as error:
        _LOG.warning("making %s anew: %s", path, error)
        return None
    return loaded if is_current(loaded) else None


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's artifacts."""

    root: Path
    # Whether work that took long is replaced where an option has changed; see `pipeline.work.log`.
    force: bool = False

    @property
    def description(self) -> Path:
        """What was run: policy, target, settings, versions."""
        return self.root / "run.json"

    @property
    def calibration(self) -> Path:
        """Folder of the calibration set."""
        return self.root / "calibration"

    @property
    def sensitivities(self) -> Path:
        """Sensitivities of every channel and width."""
        return self.root / "sensitivities.safetensors"

    @property
    def kept_layers(self) -> Path:
        """Sensitivities of the layers that no plan quantizes."""
        return self.root / "kept_layers.safetensors"

    @property
    def activations(self) -> Path:
        """Histograms of what the layers are fed."""
        return self.root / "activations.safetensors"

    @property
    def moments(self) -> Path:
        """What the layers are fed and what their outputs are worth."""
        return self.root / "moments.safetensors"

    @property
    def agreement(self) -> Path:
        """Comparison of the sensitivities with exact ones."""
        return self.root / "agreement.json"

    @property
    def estimators(self) -> Path:
        """Comparison of all estimators."""
        return self.root / "estimators.json"

    @property
    def latency(self) -> Path:
        """Latency profiles of all settings."""
        return self.root / "latency.json"

    @property
    def recommendation(self) -> Path:
        """Which setting to take, and why."""
        return self.root / "recommendation.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    def control(self, name: str) -> Path:
        """Evaluation of the float policy under a control."""
        return self.root / "controls" / f"{name}.json"

    def plan(self, setting: Setting) -> Path:
        """Bit plan of a setting."""
        return self._of(setting) / "plan.json"

    def rounding(self, setting: Setting) -> Path:
        """Codes of a setting's plan, where its quantizer makes them from moments."""
        return self._of(setting) / ROUNDING

    def bundle(self, setting: Setting) -> Path:
        """Bundle of a setting."""
        return self._of(setting) / "bundle"

    def action_error(self, setting: Setting) -> Path:
        """Held-out action error of a setting."""
        return self._of(setting) / "action_error.json"

    def predicted_error(self, setting: Setting) -> Path:
        """Action error that is expected of a setting on other episodes."""
        return self._of(setting) / "predicted_error.json"

    def held_out_actions(self, setting: Setting) -> Path:
        """Actions of a setting's engine on the held-out observations."""
        return self._of(setting) / "held_out_actions.safetensors"

    def evaluation(self, setting: Setting) -> Path:
        """Closed-loop evaluation of a setting."""
        return self._of(setting) / "evaluation.json"

    def _of(self, setting: Setting) -> Path:
        return self.root / "settings" / setting.name
