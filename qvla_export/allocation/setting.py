"""The noun `Setting`: how one bundle is quantized, as its name says. numpy only."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qvla_export.quantizer.activations import ACTIVATION_CODES
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, ScaleForm, Target

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
# Part of a setting's name that people try -> what they ask a target for.
_FORMATS = {"fp8": "fp8", "fp4": "fp4", "int2": "int2", "asym": "zero points"}


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
        widths=_parse_widths(found["widths"], name),
    )


def usual_scales(settings: Iterable[Setting], target: Target) -> ScaleForm:
    """Return the form of scales of a deployment that asked for none.

    Two levels where a planned setting rounds its inputs to 8 bits, so that its codes expand to one
    int8 product (of w8a8 some have fewer bits, too), and the target stores them in the bits they
    have; otherwise a float scale a group.

    Args:
        settings: what is deployed.
        target: what for; one whose weights have zero points has no scales of two levels.
    """
    expands = any(
        setting.kind == "planned" and setting.activation_bits == 8 for setting in settings
    )
    zero_points = any(container.zero_points for container in target.containers.values())
    if not expands or zero_points or "two-level scales" in target.refusals:
        return "group"
    stored = target.with_two_level_scales().containers
    as_small = all(stored[bits].bits == one.bits for bits, one in target.containers.items())
    return "two-level" if as_small else "group"


def _parse_widths(widths: str | None, name: str) -> tuple[int, ...]:
    if widths is None:
        return WIDTHS
    allowed = tuple(sorted({int(bits) for bits in widths.split(".")}))
    if not set(allowed) <= set(WIDTHS) or allowed == (0,):
        raise QvlaError(f"-set takes widths among {WIDTHS} and one above 0, got {name!r}")
    return allowed
