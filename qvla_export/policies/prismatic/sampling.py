"""The noun `Sampling`: how a token is drawn where the likeliest one is not simply taken.

All randomness comes in as numbers of Gumbel's law, one a token: the largest sum of logit and number
is a draw from the softmax (Gumbel 1954; Maddison et al. 2014, A* Sampling). So one argmax serves
graph and torch alike, and greedy decoding is the same graph without the numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below any logit that counts, and within 16 bits.
_NEVER = -1e4


@dataclass(frozen=True)
class Sampling:
    """A softmax at a temperature, cut to its likeliest tokens.

    As transformers' `TemperatureLogitsWarper` and `TopPLogitsWarper` do it, in this order. Of
    tokens at the edge that are equally likely all are kept, where upstream keeps some.
    """

    temperature: float
    # Smallest set of likeliest tokens with at least this probability is drawn from; 1: all.
    top_p: float

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Return one token a position.  int64 [B, 1]

        Args:
            logits: float32 [B, 1, V].
            numbers: of Gumbel's law.  float32 [B, 1, V]
        """
        scaled = logits / self.temperature
        likely = torch.softmax(scaled, dim=-1)
        # What a token and those less likely have together: no sort, which targets do badly.
        each, other = likely[..., :, None], likely[..., None, :]
        mass = torch.where(other <= each, other, torch.zeros_like(other)).sum(dim=-1)
        kept = mass > 1 - self.top_p
        return torch.where(kept, scaled + numbers, torch.full_like(scaled, _NEVER)).argmax(dim=-1)
