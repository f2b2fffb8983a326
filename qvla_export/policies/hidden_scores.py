"""What hides positions from attention, in torch and in every graph."""

import torch
from torch import Tensor

# Added to scores of positions that are not attended to; exp of it is 0, and float16 holds it.
HIDDEN_SCORE = -30000.0


def hidden_scores(seen: Tensor) -> Tensor:
    """Return what hides positions when it is added to scores: 0 where `seen`.  float32"""
    return (~seen).to(torch.float32) * HIDDEN_SCORE
