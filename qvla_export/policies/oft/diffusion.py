"""The diffusion head: noise becomes a chunk of actions, step by step (DDIM, arXiv 2010.02502).

Sources: openvla-oft `action_heads.py` (`DiffusionActionHead`), `projectors.py`, and diffusers'
`DDIMScheduler` as it is set there: squared-cosine betas, noise predicted, clipped, leading steps.
"""

import math

import torch
from torch import Tensor, nn

_MOST_BETA = 0.999


class NoisyActionProjector(nn.Module):
    """Each number of a noisy chunk to one token."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, noisy: Tensor) -> Tensor:
        """Map [B, horizon, dim] to [B, horizon * dim, hidden]."""
        numbers = noisy.reshape(noisy.shape[0], -1, 1)
        tokens: Tensor = self.fc2(nn.functional.gelu(self.fc1(numbers)))
        return tokens


class Ddim(nn.Module):
    """The steps from noise to actions: what a step is told, and what it does."""

    # Sine and cosine of each step's time.  float32 [steps, hidden]
    times: Tensor
    # Of signal and noise before a step, and after it.  float32 [steps, 4]
    shares: Tensor

    def __init__(self, train_steps: int, steps: int, hidden_dim: int) -> None:
        super().__init__()
        moments = torch.arange(0, steps).flip(0) * (train_steps // steps)
        kept = torch.cat([torch.ones(1), _signal_left(train_steps)])
        before, after = kept[moments + 1], kept[(moments - train_steps // steps + 1).clamp(min=0)]
        shares = torch.stack([before, 1 - before, after, 1 - after], dim=1).sqrt()
        self.register_buffer("times", _sines(moments.float(), hidden_dim), persistent=False)
        self.register_buffer("shares", shares, persistent=False)

    def time(self, index: Tensor) -> Tensor:
        """Return the token that tells the network a step's time [1, 1, hidden].

        Args:
            index: which step, the first one 0.  int64 [1]
        """
        return self.times[index][:, None]

    def step(self, noise: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """Return the chunk [B, horizon, dim] after a step, from the noise that is predicted in it.

        The clean chunk is clipped to [-1, 1]; the noise stays as it was predicted.
        """
        signal, share, next_signal, next_share = self.shares[index][:, :, None, None].unbind(dim=1)
        clean = ((noisy - share * noise) / signal).clamp(-1, 1)
        return next_signal * clean + next_share * noise


def _signal_left(steps: int) -> Tensor:
    """Return the products of 1 - beta of the squared-cosine schedule (arXiv 2102.09672).

    float32 [steps]
    """

    def left(part: float) -> float:
        return math.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - left((i + 1) / steps) / left(i / steps), _MOST_BETA) for i in range(steps)]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0)


def _sines(moments: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -math.log(10000) / (half - 1))
    angles = moments[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
