"""Read and write OpenVLA checkpoints in the published on-disk layout."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.config import OpenVlaConfig
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.openvla.weights import open_weights
from qvla_export.policies.prismatic.description import read_architecture, read_vocab_padding
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.loading import load_token_centers
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.weights import CheckpointWeights


def load_module(
    checkpoint: Path, config: OpenVlaConfig, resident: bool = True
) -> tuple[OpenVlaModule, CheckpointWeights]:
    """Build the network of a checkpoint, with its weights as float32 or (device "meta") without.

    Raises:
        CheckpointError: keys do not fit; the message lists every missing, unexpected and misshapen
            key. Or a file of weights would not be used.
    """
    centers = load_token_centers(checkpoint)
    weights = open_weights(checkpoint, read_vocab_padding(checkpoint), len(centers))
    shapes = read_architecture(checkpoint, config.vision_heads, weights.shapes)
    arch = OpenVlaArchitecture(
        **vars(shapes), action_dim=config.action_dim, action_tokens=len(centers)
    )
    module = load_network(checkpoint, lambda: OpenVlaModule(arch, centers), weights, resident)
    return module, weights


def save_module(module: OpenVlaModule, checkpoint: Path) -> None:
    """Write weights into an existing folder as upstream does, in bf16.

    Rows of the output layer that the network does not have are zeros, as no token of theirs is
    ever chosen.
    """
    arch, head = module.arch, module.language_model.lm_head.weight
    first = arch.first_action_token
    body = {name: tensor for name, tensor in module.state_dict().items() if name != HEAD}
    whole = torch.zeros(int(arch.llama.vocab_size), head.shape[1])
    whole[first : first + arch.action_tokens] = head
    upstream = {**to_upstream(body), HEAD: whole}
    stored = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in upstream.items()}
    save_file(stored, checkpoint / "model.safetensors", metadata={"format": "pt"})
