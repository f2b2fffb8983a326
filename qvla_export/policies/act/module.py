"""The network of ACT as it acts: backbone, encoder, decoder; the training's encoder is left out.

Source: lerobot 0.6.1 `policies/act/modeling_act.py`. Names are the checkpoint's, but for
`in_proj_weight` and `in_proj_bias` of attention, which are cut into their projections.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvla_export.policies.act.attention import CrossAttention, SelfAttention, camera_positions
from qvla_export.policies.act.config import ActConfig
from qvla_export.policies.act.resnet import ResNet, ResNetShape


@dataclass(frozen=True)
class ActArchitecture:
    """Shapes of an ACT network."""

    config: ActConfig
    backbone: ResNetShape
    # Height and width of all cameras' pictures.
    picture: tuple[int, int]
    width: int
    hidden: int
    latent_dim: int
    # 0 where the policy takes no state.
    state_dim: int
    action_dim: int


class ActModule(nn.Module):
    """Pictures and state to a chunk of normalized actions."""

    # Sine codes of a camera's feature map.  float32 [h * w, width]
    camera_codes: Tensor

    def __init__(self, arch: ActArchitecture) -> None:
        super().__init__()
        self.arch = arch
        width, count = arch.width, 2 if arch.state_dim else 1
        self.backbone = ResNet(arch.backbone)
        self.encoder, self.decoder = _Encoder(arch), _Decoder(arch)
        if arch.state_dim:
            self.encoder_robot_state_input_proj = nn.Linear(arch.state_dim, width)
        self.encoder_latent_input_proj = nn.Linear(arch.latent_dim, width)
        self.encoder_img_feat_input_proj = nn.Conv2d(arch.backbone.outputs, width, 1)
        self.encoder_1d_feature_pos_embed = nn.Embedding(count, width)
        self.decoder_pos_embed = nn.Embedding(arch.config.horizon, width)
        self.action_head = nn.Linear(width, arch.action_dim)
        codes = camera_positions(*arch.backbone.map_size(*arch.picture), width)
        self.register_buffer("camera_codes", codes, persistent=False)

    def forward(self, pixel_values: Tensor, state: Tensor | None = None) -> Tensor:
        """Return normalized actions [B, horizon, dim].

        Args:
            pixel_values: float32 [B, 3 * cameras, H, W].
            state: normalized [B, n]; None where the policy takes none.
        """
        actions: Tensor = self.action_head(self.decode(*self.encode(pixel_values, state)))
        return actions

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the backbone's features [B, cameras, C, h, w] of pictures."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 3), 3, height, width)
        found: Tensor = self.backbone(frames)
        return found.reshape(batch, channels // 3, *found.shape[1:])

    def tokens(self, pixel_values: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the encoder reads: latent, state, every camera's places; and their codes.

        [B, N, width] each; the latter [1, N, width].
        """
        features = self.features(pixel_values)
        batch, cameras = features.shape[:2]
        maps = self.encoder_img_feat_input_proj(features.flatten(0, 1)).flatten(2).transpose(1, 2)
        # The latent is zero where a policy acts: its token is the bias.
        latent = self.encoder_latent_input_proj.bias.expand(batch, 1, -1)
        parts = [latent, maps.reshape(batch, -1, maps.shape[-1])]
        if state is not None:
            parts.insert(1, self.encoder_robot_state_input_proj(state)[:, None])
        codes = [self.encoder_1d_feature_pos_embed.weight, *[self.camera_codes] * cameras]
        return torch.cat(parts, dim=1), torch.cat(codes)[None]

    def encode(self, pixel_values: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the encoder's output and the codes of its positions."""
        hidden, codes = self.tokens(pixel_values, state)
        for layer in self.encoder.layers:
            hidden = layer(hidden, codes)
        return hidden, codes

    def decode(self, memory: Tensor, codes: Tensor) -> Tensor:
        """Return the decoder's output [B, horizon, width] before the action head."""
        queries = self.decoder_pos_embed.weight[None]
        hidden: Tensor | None = None
        for layer in self.decoder.layers:
            hidden = layer(hidden, queries, memory, codes)
        decoded: Tensor = self.decoder.norm(hidden)
        return decoded


class _Encoder(nn.Module):
    def __init__(self, arch: ActArchitecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(arch) for _ in range(arch.config.encoder_layers))


class _Decoder(nn.Module):
    def __init__(self, arch: ActArchitecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(arch) for _ in range(arch.config.decoder_layers))
        self.norm = nn.LayerNorm(arch.width)


class _EncoderLayer(nn.Module):
    def __init__(self, arch: ActArchitecture) -> None:
        super().__init__()
        self.self_attn = SelfAttention(arch.width, arch.config.heads)
        self.linear1 = nn.Linear(arch.width, arch.hidden)
        self.linear2 = nn.Linear(arch.hidden, arch.width)
        self.norm1, self.norm2 = nn.LayerNorm(arch.width), nn.LayerNorm(arch.width)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the layer's output, a norm behind each residual."""
        hidden = self.norm1(hidden + self.self_attn(hidden, codes))
        mlp = self.linear2(nn.functional.relu(self.linear1(hidden)))
        found: Tensor = self.norm2(hidden + mlp)
        return found


class _DecoderLayer(nn.Module):
    def __init__(self, arch: ActArchitecture) -> None:
        super().__init__()
        self.self_attn = SelfAttention(arch.width, arch.config.heads)
        self.multihead_attn = CrossAttention(arch.width, arch.config.heads)
        self.linear1 = nn.Linear(arch.width, arch.hidden)
        self.linear2 = nn.Linear(arch.hidden, arch.width)
        self.norm1, self.norm2 = nn.LayerNorm(arch.width), nn.LayerNorm(arch.width)
        self.norm3 = nn.LayerNorm(arch.width)

    def forward(
        self, hidden: Tensor | None, queries: Tensor, memory: Tensor, codes: Tensor
    ) -> Tensor:
        """Return the layer's output; `hidden` is None in the first layer, which begins at zero."""
        if hidden is None:
            row: Tensor = self.norm1(self.self_attn.of_nothing(memory.shape[0]))
            hidden = row.expand(-1, queries.shape[1], -1)
        else:
            hidden = self.norm1(hidden + self.self_attn(hidden, queries))
        hidden = self.norm2(hidden + self.multihead_attn(hidden + queries, memory + codes, memory))
        mlp = self.linear2(nn.functional.relu(self.linear1(hidden)))
        found: Tensor = self.norm3(hidden + mlp)
        return found
