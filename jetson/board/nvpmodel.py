"""Power modes of a Jetson: what `nvpmodel` is set to and what it could be set to."""

import re
from collections.abc import Mapping
from pathlib import Path

from engines.trt.gpu import read_power_modes

_ANSWER = re.compile(r"^\s*NV Power Mode:\s*(\S+)\s*$", re.M)
# Names of the mode without caps, the newest first.
_FASTEST = ("MAXN_SUPER", "MAXN")


def mode_of_answer(text: str) -> str | None:
    """Return the mode that `nvpmodel -q` names; None if its answer is something else."""
    found = _ANSWER.search(text)
    return None if found is None else re.sub(r"^MODE_", "", found[1])


def fastest_mode(root: Path = Path("/")) -> tuple[int, str] | None:
    """Return number and name of the mode without caps; None where it is not known."""
    modes: Mapping[int, str] = read_power_modes(root)
    for wanted in _FASTEST:
        for number, name in modes.items():
            if name.upper() == wanted:
                return number, name
    return None
