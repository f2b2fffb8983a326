"""What widths are charged, beside their sensitivities, when a plan is made again. numpy only.

Sensitivities of codes that make up for each other are measured on the observations that the codes
are fitted to, one channel at a time. How much more a width costs on other observations, and among
other rounded channels, is alike for all channels of the width: a factor that held-aside
observations can tell, where they could not tell channels apart.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qvla_export.sensitivity import Sensitivities

# Widths whose charges are tried, in turn; the others' are one.
_CHARGED = (0, 2)
# How many times more, or less, in the first rounds and in later ones.
_FACTORS = (3.0, 3.0**0.5)


def neighbours(charges: Mapping[str, float], number: int) -> list[dict[str, float]]:
    """Return what a round tries: charges in each of which one width's is more, or less.

    Args:
        charges: name of a width, "2 bits" -> times its sensitivity; one where not named.
        number: of the round; from 0.
    """
    name = _name(_CHARGED[number % len(_CHARGED)])
    factor = _FACTORS[min(number // len(_CHARGED), len(_FACTORS) - 1)]
    return [{**charges, name: charges.get(name, 1.0) * times} for times in (factor, 1 / factor)]


def charged(measured: Sensitivities, charges: Mapping[str, float]) -> Sensitivities:
    """Return sensitivities times what their widths are charged."""
    factors = np.array([charges.get(_name(bits), 1.0) for bits in measured.widths], np.float32)
    values = {name: table * factors[:, None] for name, table in measured.values.items()}
    return replace(measured, values=values, method=f"{measured.method}, charged by width")


def _name(bits: int) -> str:
    return f"{bits} bits"
