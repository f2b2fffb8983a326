"""The noun `Contender`: one way to run the stack, with its bytes and its multiplications."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Contender:
    """One way to run the stack."""

    name: str
    run: Run
    # Graph and weights on disk; float32 parameters of torch.
    stored_bytes: int
    # Constants that one run reads.
    read_bytes: int
    # Multiply-adds of the quantizable layers per token.
    multiplications: int
    # Arithmetic of most products: "float32" or "int8"; decides the peak it is compared with.
    arithmetic: str


def stored_size(path: Path) -> int:
    """Return the bytes of a graph and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
