"""Read and write OpenVLA-OFT checkpoints in the published on-disk layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.keys import check_keys, to_upstream
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.weights import CheckpointWeights
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.json_documents import FOREIGN, read_json

_VISION_EPS = 1e-6  # timm's LayerNorm default, of both towers
# Present in transformers' modules, absent from timm checkpoints.
NOT_UPSTREAM = ("vision_backbone.featurizer.embeddings.mask_token",)


def load_module(checkpoint: Path, config: OftConfig, weights: CheckpointWeights) -> OftModule:
    """Build the network of a checkpoint and load its weights as float32.

    Raises:
        CheckpointError: keys do not fit; the message lists every missing, unexpected and misshapen
            key.
    """
    return filled_module(_checked_architecture(checkpoint, config, weights), weights)


def filled_module(arch: OftArchitecture, weights: CheckpointWeights) -> OftModule:
    """Build a network and read its weights, which have its shapes, as float32."""
    module = OftModule(arch)
    for name, tensor in module.state_dict().items():
        if name in weights.shapes:
            weights.copy_to(name, tensor)
    return module.eval().requires_grad_(False)


def empty_module(checkpoint: Path, config: OftConfig, weights: CheckpointWeights) -> OftModule:
    """Build the network of a checkpoint without memory for its weights (device "meta").

    Raises:
        CheckpointError: as `load_module`.
    """
    with torch.device("meta"):
        module = OftModule(_checked_architecture(checkpoint, config, weights))
    return module.eval().requires_grad_(False)


def _checked_architecture(
    checkpoint: Path, config: OftConfig, weights: CheckpointWeights
) -> OftArchitecture:
    arch = _architecture(checkpoint, config, weights.shapes)
    with torch.device("meta"):
        expected = OftModule(arch).state_dict()
    check_keys(weights.shapes, expected, NOT_UPSTREAM, str(checkpoint))
    return arch


def save_module(module: OftModule, checkpoint: Path, step: int) -> None:
    """Write weights into an existing folder as upstream does: bf16 body, DDP-style head files."""
    upstream = to_upstream(module.state_dict())
    body: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {"action_head": {}, "proprio_projector": {}}
    for key, tensor in upstream.items():
        part = key.split(".", 1)[0]
        if part in parts:
            parts[part][f"module.{key.removeprefix(part + '.')}"] = tensor.to(torch.bfloat16)
        else:
            body[key] = tensor.to(torch.bfloat16).contiguous()
    if "language_model.lm_head.weight" not in body:
        # Published files carry it even for L1 heads; tied, as small Llamas are.
        embedding = body["language_model.model.embed_tokens.weight"]
        body["language_model.lm_head.weight"] = embedding.clone()
    save_file(body, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for part, state in parts.items():
        if state:
            torch.save(state, checkpoint / f"{part}--{step}_checkpoint.pt")


def _architecture(
    checkpoint: Path, config: OftConfig, weights: Mapping[str, Tensor]
) -> OftArchitecture:
    raw = read_json(checkpoint / "config.json", "model configuration", FOREIGN)
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
    dino, siglip = _vision(weights, config)
    sizes = {dino.image_size, siglip.image_size, *raw.get("image_sizes", [])}
    if len(sizes) != 1:
        raise CheckpointError(
            f"{checkpoint}: image_sizes {raw.get('image_sizes')} do not fit the position "
            f"embeddings ({dino.image_size} and {siglip.image_size} pixels)"
        )
    head_key = "action_head.model.fc1.weight"
    return OftArchitecture(
        dino=dino,
        siglip=siglip,
        llama=llama_config(text),
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head=config.head,
        head_dim=weights[head_key].shape[0] if head_key in weights else 0,
        stop_token_id=config.stop_token_id,
        vocab_padding=int(raw.get("pad_to_multiple_of", 0)),
    )


def llama_config(text: Mapping[str, Any]) -> LlamaConfig:
    """Return the decoder's configuration; what `text_config` omits has transformers' defaults."""
    fields = {k: v for k, v in text.items() if k not in ("model_type", "torch_dtype", "dtype")}
    llama = LlamaConfig(**fields)
    llama._attn_implementation = "sdpa"
    return llama


def _vision(
    weights: Mapping[str, Tensor], config: OftConfig
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
        heads=config.vision_heads,
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


def upstream_config(arch: OftArchitecture, n_action_bins: int = 256) -> str:
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
