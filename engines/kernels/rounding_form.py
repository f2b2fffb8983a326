"""Which form of the kernel rounds rows of how many inputs. No torch, no triton."""

from typing import NamedTuple

# A norm's kind in a `RoundingForm`.
NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
_KINDS = {"none": NO_NORM, "rms": RMS_NORM, "layer": LAYER_NORM}
# A program holds a row in registers.
MOST_INPUTS = 1 << 15
# Inputs of a program that four warps hold; of more there are eight.
_FEW_INPUTS = 4096


class RoundingForm(NamedTuple):
    """What a kernel is compiled for; a constant inside the kernel."""

    # Inputs of a program: a power of 2, at least those of a row.
    block: int
    # One of the three.
    norm: int
    # Whether what a norm gives is rounded to float16 before.
    halves: bool


def rounding_form(inputs: int, norm: str, halves: bool) -> tuple[RoundingForm, int]:
    """Return the form for rows of some inputs, and its warps.

    Args:
        inputs: of a row.
        norm: "none", "rms" or "layer".
        halves: whether the norm's result is rounded to float16 first.
    """
    block = 1 << (inputs - 1).bit_length()
    return RoundingForm(block, _KINDS[norm], halves), 4 if inputs <= _FEW_INPUTS else 8
