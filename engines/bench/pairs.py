"""Which contenders are compared with which, in the same rounds: what fewer bits are worth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.bench.contenders import DYNAMIC
from engines.bench.openvino_contenders import INT4, INT8, INT8_FLOAT_ATTENTION, ON_OPENVINO
from engines.bench.torchao_contender import TORCHAO, TORCHAO_INT4
from engines.rounds import Ratio, speedup

_EIGHT, _EIGHT_PRUNED = "ours w8a8", "ours w8a8, 30 % pruned"
_NARROW = tuple(f"ours w{bits}a8, 30 % pruned" for bits in (4, 3, 2))
_DECODED = ("ours w4", "ours w3", "ours w4a8, 30 % pruned", "ours w3a8, 30 % pruned")


@dataclass(frozen=True)
class Pair:
    """One contender against another."""

    name: str
    against: str
    ratio: Ratio

    def __str__(self) -> str:
        return f"{self.name} is {self.ratio} times as fast as {self.against}"


def compare_pairs(samples: Mapping[str, NDArray[np.float64]], tokens: int) -> tuple[Pair, ...]:
    """Return what is compared, of those that were timed.

    Args:
        samples: milliseconds by name, of the same rounds.
        tokens: rows that pass at once; with one, weights alone decide too.
    """
    return tuple(
        Pair(name, against, speedup(samples[name], samples[against]))
        for name, against in _names(tokens)
        if name in samples and against in samples
    )


def _names(tokens: int) -> Iterator[tuple[str, str]]:
    """Yield names: equal pruning on either runtime, then the others' own 8 and 4 bits."""
    for suffix in ("", ON_OPENVINO):
        for name in _NARROW:
            yield name + suffix, _EIGHT_PRUNED + suffix
        for name in (_EIGHT, _EIGHT_PRUNED, _NARROW[0]):
            for other in (INT8, INT8_FLOAT_ATTENTION, DYNAMIC, TORCHAO):
                yield name + suffix, other
    if tokens == 1:
        for name in _DECODED:
            for other in (INT4, TORCHAO_INT4):
                yield name, other
