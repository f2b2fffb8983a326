"""Action heads and the projector of the state: openvla-oft `action_heads.py`, `projectors.py`."""

import torch
from torch import Tensor, nn

from qvla_export.policies.oft.architecture import OftArchitecture


class ProprioProjector(nn.Module):
    """State vector to one token."""

    def __init__(self, state_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, state: Tensor) -> Tensor:
        """Map the normalized state [B, n] to [B, hidden]."""
        token: Tensor = self.fc2(nn.functional.gelu(self.fc1(state)))
        return token


class MLPResNetBlock(nn.Module):
    """Pre-norm residual block of an action head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden + ffn(hidden)."""
        output: Tensor = hidden + self.ffn(hidden)
        return output


class MLPResNet(nn.Module):
    """An action head's body."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, horizon, input_dim] to [B, horizon, output_dim]."""
        hidden = torch.relu(self.fc1(self.layer_norm1(features)))
        for block in self.mlp_resnet_blocks:
            hidden = block(hidden)
        output: Tensor = self.fc2(self.layer_norm2(hidden))
        return output


class L1RegressionActionHead(nn.Module):
    """The hidden states of a step side by side -> its normalized action."""

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__()
        width = arch.action_dim * arch.llama.hidden_size
        self.model = MLPResNet(width, arch.head_dim, arch.action_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, horizon, dim * hidden] to [B, horizon, dim]."""
        actions: Tensor = self.model(features)
        return actions


class NoisePredictionModel(nn.Module):
    """The diffusion head's body: named as upstream's."""

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__()
        width = arch.action_dim * arch.llama.hidden_size
        self.mlp_resnet = MLPResNet(width, arch.head_dim, arch.action_dim)


class DiffusionActionHead(nn.Module):
    """The hidden states of a step side by side -> the noise in its action."""

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__()
        self.noise_predictor = NoisePredictionModel(arch)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, horizon, dim * hidden] to [B, horizon, dim]."""
        noise: Tensor = self.noise_predictor.mlp_resnet(features)
        return noise


def action_head(arch: OftArchitecture) -> nn.Module | None:
    """Return the head of a network; None where tokens are its actions."""
    if arch.head == "tokens":
        return None
    return DiffusionActionHead(arch) if arch.head == "diffusion" else L1RegressionActionHead(arch)
