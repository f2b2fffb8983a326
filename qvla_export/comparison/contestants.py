"""The noun `Contestant`: one way to quantize, by its name; and which of them each table has."""

import re
from dataclasses import dataclass
from typing import Literal

from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.baselines.methods import METHODS
from qvla_export.shared.errors import QvlaError

Kind = Literal["setting", "library"]

_NAME = re.compile(r"(?P<setting>[^@]+)(@(?P<how>.+))?")
_LIBRARY = re.compile(r"w(?P<bits>\d+)(a(?P<activations>\d+))?-(?P<method>.+)")


@dataclass(frozen=True)
class Contestant:
    """How a policy is quantized.

    "w4", "w8a8", "w4-layer": a setting of a run, see `allocation.setting.Setting`. "w4-awq": a
    library's method. Planned settings are as `qvla deploy` makes them, with codes that make up for
    each other's errors; "w4@nearest" takes the nearest codes. "w8a8@smoothed": of the smoothed
    checkpoint (`qvla smooth`). "w4@16": planned from the first 16 calibration observations.
    Several: "w4a8@smoothed+nearest".
    """

    name: str
    kind: Kind
    # Of a setting: as run folders know it; of a library: "w4-awq".
    setting: str
    smoothed: bool = False
    compensated: bool = False
    # Calibration observations; None for all.
    observations: int | None = None

    @property
    def simulated(self) -> bool:
        """Say whether no engine can run it: 4-bit activations, or a library's own format."""
        return self.kind == "library" or self.of_run.activation_bits == 4

    @property
    def of_run(self) -> Setting:
        """Return the setting, of the kind "setting"."""
        return parse_setting(self.setting)

    @property
    def request(self) -> tuple[str, int, int | None]:
        """Return method, bits of weights and of inputs, of the kind "library"."""
        method, bits, inputs = _library(self.setting) or ("", 0, None)
        return method, bits, inputs

    @property
    def bits(self) -> float:
        """Return the nominal mean bits per channel; 16 for float."""
        return self.of_run.bits if self.kind == "setting" else float(self.request[1])

    @property
    def activation_bits(self) -> int | None:
        """Return the bits of the layers' inputs; None for float."""
        return self.of_run.activation_bits if self.kind == "setting" else self.request[2]

    @property
    def ours(self) -> bool:
        """Say whether its widths are chosen by sensitivities, by whatever allocation."""
        return self.kind == "setting" and self.of_run.kind == "planned"

    @property
    def main(self) -> bool:
        """Say whether it is ours without a variation: what is recommended."""
        plain = self.kind == "setting" and re.fullmatch(r"w\d+(\.\d+)?(a\d)?", self.setting)
        return bool(plain) and self.observations is None


def parse_contestant(name: str) -> Contestant:
    """Read a contestant's name.

    Raises:
        QvlaError: it is of no known form.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise QvlaError(
            f"a contestant is a setting (w4, w4@nearest, w8a8@smoothed, w4@16) or a library's "
            f"method (w4-awq); got {name!r}"
        )
    setting, how = found["setting"], (found["how"] or "").split("+")
    if _library(setting) is not None:
        if found["how"]:
            raise QvlaError(f"a library's method takes the policy as it is; got {name!r}")
        return Contestant(name, "library", setting)
    counts = [part for part in how if part.isdecimal() and int(part)]
    unknown = {*how} - {"", "smoothed", "nearest", *counts}
    if unknown or len(counts) > 1 or (found["how"] and "" in how):
        raise QvlaError(
            f"behind @ are smoothed, nearest and a number of observations; got {name!r}"
        )
    planned = parse_setting(setting).kind == "planned"
    if not planned and (counts or "nearest" in how):
        raise QvlaError(f"only planned settings depend on calibration observations; got {name!r}")
    return Contestant(
        name,
        "setting",
        setting,
        smoothed="smoothed" in how,
        compensated=planned and "nearest" not in how,
        observations=int(counts[0]) if counts else None,
    )


def _library(setting: str) -> tuple[str, int, int | None] | None:
    found = _LIBRARY.fullmatch(setting)
    if found is None or found["method"] not in METHODS:
        return None
    inputs = found["activations"]
    return found["method"], int(found["bits"]), None if inputs is None else int(inputs)


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper, as it is made here."""

    # "1", as the paper numbers them.
    number: str
    title: str
    contestants: tuple[str, ...]
    # What is other than in the paper.
    note: str


TABLES: tuple[PaperTable, ...] = (
    PaperTable(
        "1",
        "Weights and activations",
        ("float", "w8a8", "w8a8@nearest", "w8a8@smoothed", "w8a8-smoothquant", "w8a8-max", "w4a8",
         "w4a8@smoothed", "w4a4", "w4a4@smoothed", "w4a4-rtn", "w4a4-max"),
        "Those run by onnxruntime are INT8 products; 4-bit activations and the libraries' are "
        "simulated in torch. No kept library learns activations' clipping as OmniQuant does.",
    ),
    PaperTable(
        "2",
        "Weights only",
        ("float", "w8", "w8@nearest", "w8-rtn", "w8-awq", "w8-gptq", "w4", "w4@nearest",
         "w4-rtn", "w4-awq", "w4-gptq", "w4-auto-round", "w3", "w3@nearest", "w3-awq", "w3-gptq",
         "w3-auto-round", "w2.5", "w2.5@nearest", "w2", "w2@nearest", "w2-rtn", "w2-awq",
         "w2-gptq", "w2-auto-round"),
        "Libraries' results are run in torch with their own codes and scales; 3, 2.5 and 2 mean "
        "bits are beyond the paper.",
    ),
    PaperTable(
        "3",
        "Per layer against per channel",
        ("float", "w4-module", "w4-module@nearest", "w4-layer", "w4-layer@nearest", "w4",
         "w4@nearest", "w8-module", "w8-module@nearest", "w8-layer", "w8-layer@nearest", "w8",
         "w8@nearest"),
        "One width for all channels of a module or layer, chosen by the same sensitivities.",
    ),
    PaperTable(
        "4",
        "Pruning and sets of widths",
        ("float", "w8-set2.4.8.16", "w8-set2.4.8.16@nearest", "w8-rtn", "w8", "w8@nearest",
         "w8-set0.8", "w8-set0.8@nearest", "w4-set2.4.8.16", "w4-set2.4.8.16@nearest", "w4",
         "w4@nearest", "w4-set0.8", "w4-set0.8@nearest"),
        "The paper's 8-bit budget, and 4 bits below it.",
    ),
    PaperTable(
        "6",
        "Gate ratios",
        ("float", "w8-gates1", "w8-gates1@nearest", "w8-gates2", "w8-gates2@nearest", "w8-gates3",
         "w8-gates3@nearest", "w8-gates4", "w8-gates4@nearest", "w8", "w8@nearest"),
        "Fixed shares of the channels at 0, 2, 4, 8 and 16 bits.",
    ),
    PaperTable(
        "9",
        "Calibration observations",
        ("float", "w8@8", "w8@8+nearest", "w8@32", "w8@32+nearest", "w8", "w8@nearest", "w4@8",
         "w4@8+nearest", "w4@32", "w4@32+nearest", "w4", "w4@nearest", "w2.5@8", "w2.5@8+nearest",
         "w2.5@32", "w2.5@32+nearest", "w2.5", "w2.5@nearest"),
        "The first ones of the run's calibration set, which has two of an episode; the last rows "
        "of a width have them all.",
    ),
)  # fmt: skip
# Of which episodes are run unless others are named; in this order.
WITH_EPISODES = (
    "float", "w8", "w8a8", "w4", "w3", "w2.5", "w2", "w8@nearest", "w8a8@nearest", "w4@nearest",
    "w3@nearest", "w2.5@nearest", "w2@nearest", "w4-gptq", "w4-rtn", "w2-gptq", "w2-rtn",
    "w4a8", "w4a4@smoothed", "w4a4", "w8a8@smoothed", "w8a8-smoothquant", "w4-layer", "w4-module",
    "w4-set0.8", "w4-set2.4.8.16", "w8-gates1", "w8-gates4", "w2.5@8",
)  # fmt: skip


def table_contestants(numbers: tuple[str, ...] | None = None) -> tuple[Contestant, ...]:
    """Return the contestants of some tables, each once; of all by default.

    Raises:
        QvlaError: there is no such table.
    """
    known = [table.number for table in TABLES]
    wanted = known if numbers is None else list(numbers)
    if not set(wanted) <= set(known):
        raise QvlaError(f"tables are {', '.join(known)}, got {', '.join(wanted)}")
    names = [n for table in TABLES if table.number in wanted for n in table.contestants]
    return tuple(parse_contestant(name) for name in dict.fromkeys(names))
