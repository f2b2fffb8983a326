"""A new, untrained OpenVLA network of any size."""

import torch

from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.config import OpenVlaConfig
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.prismatic.loading import token_centers
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes

_BINS = 256


def new_module(size: NetworkSize, config: OpenVlaConfig, seed: int) -> OpenVlaModule:
    """Return a randomly initialized network; the vocabulary's last 256 ids are its actions'."""
    torch.manual_seed(seed)
    shapes = new_shapes(size, config.vision_heads)
    arch = OpenVlaArchitecture(**vars(shapes), action_dim=config.action_dim, action_tokens=_BINS)
    return OpenVlaModule(arch, token_centers(_BINS))
