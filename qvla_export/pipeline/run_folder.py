"""One run's folder: where every stage reads and writes, and the settings that are compared."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvla_export.quantizer.activations import ACTIVATION_CODES
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.target import WIDTHS, Target

# File of a setting's codes, beside its plan and bundle.
ROUNDING = "rounding.safetensors"
_SETTING = re.compile(
    r"w(?P<bits>\d+(\.\d+)?)(a(?P<activations>\d+))?"
    r"((?P<uniform>-rtn)|(-(?P<method>alg1|staged|layer|module|uniform|gates(?P<gates>[1-4])?))?"
    r"(-set(?P<widths>\d+(\.\d+)*))?)"
)
# Part of a setting's name -> allocator, see `qvla_export.allocation.methods`.
_METHODS = {
    "alg1": "algorithm1",
    "staged": "staged",
    "layer": "per-layer",
    "module": "per-module",
    "uniform": "uniform",
    "gates": "gates",
}


@dataclass(frozen=True)
class Setting:
    """How the weights and activations of one bundle are quantized.

    "float": not at all. "w4": planned, 4 mean bits per channel and at most the bytes of uniform
    4 bits. "w4-rtn": every channel 4 bits, scale from the largest weight, round to nearest.
    "w8a8", "w4a8-rtn": the inputs of the layers have 8 bits as well; "w4a4" is for torch only.
    Planned ones are allocated along hulls, or as the name goes on: "-alg1", "-staged", "-gates"
    (the best row of table 6, "-gates2" another), "-layer", "-module", "-uniform"; "-set0.8" allows
    only these widths.
    """

    name: str
    kind: Literal["float", "planned", "uniform"]
    # Mean bits per channel; 16 for float.
    bits: float
    # Bits of activations; None leaves them in float.
    activation_bits: int | None = None
    # Of a planned one: allocator, row of table 6 for its gates, allowed widths.
    method: str = "hull"
    gates_row: int | None = None
    widths: tuple[int, ...] = WIDTHS


# Part of a setting's name that people try -> what they ask a target for.
_FORMATS = {"fp8": "fp8", "fp4": "fp4", "int2": "int2", "asym": "zero points"}


def parse_setting(name: str, target: Target | None = None) -> Setting:
    """Read a setting's name.

    Args:
        name: see `Setting`.
        target: what it is for, if known.

    Raises:
        UnsupportedOnTarget: it names a format that the target lacks; with the reason.
        QvlaError: it is not of a known form.
    """
    for part, feature in _FORMATS.items():
        if part in name and target is not None:
            target.require(feature)
    if name == "float":
        return Setting(name, "float", 16.0)
    found = _SETTING.fullmatch(name)
    if found is None or not 0 < float(found["bits"]) <= 16:
        raise QvlaError(
            f"a setting is 'float', 'w<mean bits>' such as w4 or w2.5, or 'w<bits>-rtn' for "
            f"uniform round-to-nearest, both also with 'a8' for 8-bit activations (w8a8); a "
            f"planned one may go on with {', '.join('-' + part for part in _METHODS)} (-gates1 to "
            f"-gates4) and -set<widths> (-set0.8), in this order; zero points are asked for by "
            f"--zero-points of qvla sensitivities and deploy; got {name!r}"
        )
    bits = float(found["bits"])
    if found["uniform"] and bits not in (2, 4, 8, 16):
        raise QvlaError(f"uniform widths are 2, 4, 8 or 16, got {name!r}")
    activations = None if found["activations"] is None else int(found["activations"])
    if activations not in (None, *ACTIVATION_CODES):
        raise QvlaError(f"activations have 8 bits, or 4 in simulation, got {name!r}")
    kind: Literal["planned", "uniform"] = "uniform" if found["uniform"] else "planned"
    method = found["method"] or ""
    return Setting(
        name,
        kind,
        bits,
        activations,
        method=next((m for part, m in _METHODS.items() if method.startswith(part)), "hull"),
        gates_row=int(found["gates"]) if found["gates"] else None,
        widths=_allowed(found["widths"], name),
    )


def _allowed(widths: str | None, name: str) -> tuple[int, ...]:
    if widths is None:
        return WIDTHS
    allowed = tuple(sorted({int(bits) for bits in widths.split(".")}))
    if not set(allowed) <= set(WIDTHS) or allowed == (0,):
        raise QvlaError(f"-set takes widths among {WIDTHS} and one above 0, got {name!r}")
    return allowed


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
