"""Read and write OpenVLA checkpoints in the published on-disk layout."""

from pathlib import Path

from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.config import OpenVlaConfig
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.openvla.weights import open_weights
from qvla_export.policies.prismatic.description import read_architecture, read_vocab_padding
from qvla_export.policies.prismatic.loading import load_token_centers
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.new_checkpoint import save_token_body
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
    """Write weights into an existing folder as upstream does; see `save_token_body`."""
    save_token_body(module.state_dict(), module.arch, module.vocabulary.first, checkpoint)
