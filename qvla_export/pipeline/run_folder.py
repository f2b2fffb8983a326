"""One run's folder: where every stage reads and writes."""

from dataclasses import dataclass
from pathlib import Path

from qvla_export.allocation.setting import Setting
from qvla_export.shared.errors import ArtifactError

# File of a setting's codes, beside its plan and bundle.
ROUNDING = "rounding.safetensors"


def made(path: Path, command: str) -> Path:
    """Return the path of an artifact that an earlier stage has made.

    Raises:
        ArtifactError: it is missing; the message names the command that makes it.
    """
    if not path.exists():
        raise ArtifactError(f"{path} not found; make it first with: qvla {command}")
    return path


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's artifacts."""

    root: Path

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

    def evaluation(self, setting: Setting) -> Path:
        """Closed-loop evaluation of a setting."""
        return self._of(setting) / "evaluation.json"

    def _of(self, setting: Setting) -> Path:
        return self.root / "settings" / setting.name
