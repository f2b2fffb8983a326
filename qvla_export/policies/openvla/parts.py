"""OpenVLA's parts and the program that runs them: the actions so far grow by a bin a token."""

import torch
from torch import Tensor

from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.prismatic.decoding_parts import TokenParts
from qvla_export.shared.processor import ProcessorSpec


def action_parts(module: OpenVlaModule, spec: ProcessorSpec) -> TokenParts:
    """Return what makes the parts of a network, whole or cut."""

    def extend(so_far: Tensor, state: Tensor, token: Tensor) -> Tensor:
        center = module.token_centers[token][:, None]
        return torch.cat([so_far[:, :, 1:], center], dim=2)

    return TokenParts(module, spec, "actions", (1, 1, module.arch.action_dim), extend)
