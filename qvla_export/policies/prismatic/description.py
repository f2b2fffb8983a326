"""What config.json and the weights' shapes say of a network, and a config.json that says it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

from qvla_export.policies.adapters import model_config
from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.json_documents import FOREIGN, Node, brief, read_json

_VISION_EPS = 1e-6  # timm's LayerNorm default, of both towers
# Largest sizes of a decoder: what is beyond would cost memory or minutes before weights contradict.
_MOST: Mapping[str, int] = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 256,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
}
_POSITIVE = ("rms_norm_eps", "rope_theta")


def read_architecture(
    checkpoint: Path, vision_heads: tuple[int, int], weights: Mapping[str, Tensor]
) -> PrismaticArchitecture:
    """Return the shapes of a checkpoint's network.

    Args:
        checkpoint: folder with a config.json.
        vision_heads: of the DINOv2 and the SigLIP tower; the one shape weights do not show.
        weights: our parameter names -> tensors, whose shapes alone are looked at.

    Raises:
        CheckpointError: it is no such network, or config.json and weights contradict each other.
    """
    raw = read_json(model_config(checkpoint), "model configuration", FOREIGN)
    text = raw.get("text_config")
    if raw.get("model_type") != "openvla" or not isinstance(text, dict):
        raise CheckpointError(
            f"{checkpoint}/config.json must be of model_type 'openvla' with a text_config, "
            f"got {raw.get('model_type')!r}"
        )
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(
            f"{checkpoint}/config.json: text_config.model_type is {text['model_type']!r}, a "
            "decoder that is not built here; 'llama' is"
        )
    if not raw.get("use_fused_vision_backbone", False):
        raise CheckpointError(f"{checkpoint}: only the fused DINOv2 + SigLIP backbone is supported")
    dino, siglip = _vision(weights, vision_heads)
    stated = raw.get("image_sizes", [])
    sizes = [dino.image_size, siglip.image_size, *(stated if isinstance(stated, list) else [None])]
    if any(size != sizes[0] for size in sizes):
        raise CheckpointError(
            f"{checkpoint}: image_sizes {brief(stated)} do not fit the position "
            f"embeddings ({dino.image_size} and {siglip.image_size} pixels)"
        )
    return PrismaticArchitecture(
        dino=dino,
        siglip=siglip,
        llama=llama_config(text, f"{checkpoint}/config.json"),
        vocab_padding=read_vocab_padding(checkpoint),
    )


def read_vocab_padding(checkpoint: Path) -> int:
    """Return how many rows fill the vocabulary up to a round number, behind its last id.

    Raises:
        CheckpointError: config.json does not say it as a number.
    """
    raw = read_json(model_config(checkpoint), "model configuration", FOREIGN)
    padding = raw.get("pad_to_multiple_of", 0)
    if type(padding) is not int or padding < 0:
        raise CheckpointError(
            f"{checkpoint}/config.json: pad_to_multiple_of must be a whole number, got {padding!r}"
        )
    return padding


def llama_config(text: Mapping[str, Any], file: str = "the decoder") -> LlamaConfig:
    """Return the decoder's configuration; what `text_config` omits has transformers' defaults.

    Args:
        text: the fields.
        file: where they stand, for messages.

    Raises:
        CheckpointError, ArtifactError: sizes are none that a decoder has, or transformers refuse.
    """
    node = Node(text, file, "text_config")
    for name, most in _MOST.items():
        if node.has(name):
            node.field(name).whole(1, most)
    for name in _POSITIVE:
        if node.has(name):
            node.field(name).positive()
    fields = {k: v for k, v in text.items() if k not in ("model_type", "torch_dtype", "dtype")}
    try:
        llama = LlamaConfig(**fields)
    except Exception as error:  # they raise anything, over whatever field
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}: text_config is none of a Llama: {reason:.300}; download it again"
        ) from error
    llama._attn_implementation = "sdpa"
    return llama


def _vision(
    weights: Mapping[str, Tensor], heads: tuple[int, int]
) -> tuple[Dinov2WithRegistersConfig, SiglipVisionConfig]:
    """Read the towers' shapes off the weights."""
    dino, siglip = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
    try:
        dino_patch = weights[f"{dino}embeddings.patch_embeddings.projection.weight"].shape
        siglip_patch = weights[f"{siglip}embeddings.patch_embedding.weight"].shape
        dino_positions = weights[f"{dino}embeddings.position_embeddings"].shape[1] - 1
        siglip_positions = weights[f"{siglip}embeddings.position_embedding.weight"].shape[0]
        registers = weights[f"{dino}embeddings.register_tokens"].shape[1]
        dino_mlp = weights[f"{dino}encoder.layer.0.mlp.fc1.weight"].shape[0]
        siglip_mlp = weights[f"{siglip}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no vision tower weight {error}") from error
    return vision_configs(
        dims=(dino_patch[0], siglip_patch[0]),
        depths=(_depth(weights, dino), _depth(weights, siglip)),
        heads=heads,
        mlp_dims=(dino_mlp, siglip_mlp),
        patch=dino_patch[-1],
        image_sizes=(
            dino_patch[-1] * round(dino_positions**0.5),
            siglip_patch[-1] * round(siglip_positions**0.5),
        ),
        registers=registers,
    )


def vision_configs(
    dims: tuple[int, int],
    depths: tuple[int, int],
    heads: tuple[int, int],
    mlp_dims: tuple[int, int],
    patch: int,
    image_sizes: tuple[int, int],
    registers: int = 4,
) -> tuple[Dinov2WithRegistersConfig, SiglipVisionConfig]:
    """Return transformers' configurations of timm's two towers: exact GELU, eps 1e-6."""
    if mlp_dims[0] % dims[0] or any(d % h for d, h in zip(dims, heads, strict=True)):
        raise CheckpointError(
            f"vision widths {dims} must divide into heads {heads} and MLP width {mlp_dims[0]}; "
            "set vision_heads in the policy configuration"
        )
    dino = Dinov2WithRegistersConfig(
        hidden_size=dims[0],
        num_hidden_layers=depths[0],
        num_attention_heads=heads[0],
        mlp_ratio=mlp_dims[0] // dims[0],
        image_size=image_sizes[0],
        patch_size=patch,
        num_register_tokens=registers,
        layer_norm_eps=_VISION_EPS,
        hidden_act="gelu",
    )
    siglip = SiglipVisionConfig(
        hidden_size=dims[1],
        num_hidden_layers=depths[1],
        num_attention_heads=heads[1],
        intermediate_size=mlp_dims[1],
        image_size=image_sizes[1],
        patch_size=patch,
        layer_norm_eps=_VISION_EPS,
        hidden_act="gelu",
        vision_use_head=False,
    )
    for tower in (dino, siglip):
        tower._attn_implementation = "sdpa"
    return dino, siglip


def _depth(weights: Mapping[str, Tensor], tower: str) -> int:
    marker = ".norm1." if ".featurizer." in tower else ".layer_norm1."
    return len({k for k in weights if k.startswith(tower) and k.endswith(f"{marker}weight")})


def upstream_config(arch: PrismaticArchitecture, n_action_bins: int = 256) -> str:
    """Return the `config.json` text of a checkpoint in the published layout."""
    llama = arch.llama
    return json.dumps(
        {
            "architectures": ["OpenVLAForActionPrediction"],
            "arch_specifier": "no-align+fused-gelu-mlp",
            "image_resize_strategy": "resize-naive",
            "image_sizes": [arch.dino.image_size, arch.siglip.image_size],
            "model_type": "openvla",
            "n_action_bins": n_action_bins,
            "pad_to_multiple_of": arch.vocab_padding,
            "pad_token_id": llama.pad_token_id,
            "text_config": {
                "hidden_size": llama.hidden_size,
                "intermediate_size": llama.intermediate_size,
                "model_type": "llama",
                "num_attention_heads": llama.num_attention_heads,
                "num_hidden_layers": llama.num_hidden_layers,
                "num_key_value_heads": llama.num_key_value_heads,
                "pad_token_id": llama.pad_token_id,
                "torch_dtype": "bfloat16",
                "vocab_size": llama.vocab_size,
            },
            "torch_dtype": "bfloat16",
            "use_fused_vision_backbone": True,
        },
        indent=1,
    )
