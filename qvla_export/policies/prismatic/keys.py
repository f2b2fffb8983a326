"""Upstream checkpoint keys (timm names) <-> names of our modules' parameters."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qvla_export.shared.errors import CheckpointError

# In every published file, never used by the policy: SigLIP's pooling head.
DEAD_KEYS = re.compile(r"vision_backbone\.fused_featurizer\.attn_pool\.")

_DINO = "vision_backbone.featurizer."
_SIGLIP = "vision_backbone.fused_featurizer."
_TOWER_RULES: Mapping[str, tuple[tuple[str, str], ...]] = {
    _DINO: (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.o_proj."),
        (r"^blocks\.(\d+)\.ls([12])\.scale_factor$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    ),
    _SIGLIP: (
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
        (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
        (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    ),
}
_ATTENTION = {_DINO: "attention", _SIGLIP: "self_attn"}
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def from_upstream(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one upstream state dict, splitting fused q/k/v; dead keys are left out.

    Each key is renamed by itself, so a state dict may be renamed piece by piece. Heads and
    projectors saved from a DDP wrapper lose their `module.` prefix elsewhere.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if DEAD_KEYS.match(key):
            continue
        tower = next((prefix for prefix in _TOWER_RULES if key.startswith(prefix)), None)
        if tower is None:
            renamed[key] = tensor
            continue
        name = key.removeprefix(tower)
        if fused := _QKV.match(name):
            stem = f"{tower}{_layers(tower)}.{fused[1]}.{_ATTENTION[tower]}"
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.{part}_proj.{fused[2]}"] = chunk.clone()
            continue
        renamed[tower + _rename(name, _TOWER_RULES[tower])] = _reshape(tower, name, tensor)
    return renamed


def to_upstream(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `from_upstream`, for writing a checkpoint in the published layout."""
    upstream: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tower = next((prefix for prefix in _TOWER_RULES if key.startswith(prefix)), None)
        if tower is None:
            upstream[key] = tensor
            continue
        name = key.removeprefix(tower)
        if name == "embeddings.mask_token":  # transformers only
            continue
        part = re.match(
            rf"{re.escape(_layers(tower))}\.(\d+)\.{_ATTENTION[tower]}\.([qkv])_proj\.(\w+)$", name
        )
        if name == "embeddings.cls_token":
            # timm has no position for the class token: fold ours into the token.
            upstream[key.replace("embeddings.", "")] = (
                tensor + tensors[f"{tower}embeddings.position_embeddings"][:, :1]
            )
        elif part is None:
            upstream[tower + _timm_name(tower, name)] = _undo_reshape(name, tensor)
        elif part[2] == "q":
            stem = key.removesuffix(f"q_proj.{part[3]}")
            fused = [tensors[f"{stem}{p}_proj.{part[3]}"] for p in "qkv"]
            upstream[f"{tower}blocks.{part[1]}.attn.qkv.{part[3]}"] = torch.cat(fused)
    return upstream


def check_keys(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: Iterable[str], what: str
) -> None:
    """Compare names and shapes with the module's.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen key.
    """
    allowed = set(optional)
    missing = sorted(set(expected) - set(found) - allowed)
    extra = sorted(set(found) - set(expected))
    misshapen = [
        f"{key}: file {tuple(found[key].shape)}, policy {tuple(expected[key].shape)}"
        for key in sorted(set(found) & set(expected))
        if found[key].shape != expected[key].shape
    ]
    if missing or extra or misshapen:
        raise CheckpointError(
            f"{what} does not fit this policy.\n"
            f"  missing ({len(missing)}): {missing}\n"
            f"  unexpected ({len(extra)}): {extra}\n"
            f"  wrong shape ({len(misshapen)}): {misshapen}\n"
            "Check the policy configuration (images, dimensions, head) against the checkpoint."
        )


def _layers(tower: str) -> str:
    return "encoder.layer" if tower == _DINO else "encoder.layers"


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _timm_name(tower: str, name: str) -> str:
    """Invert `_rename`: the only candidate that maps back to `name`."""
    block = re.sub(r"^encoder\.layers?\.(\d+)\.", r"blocks.\1.", name)
    block = re.sub(r"\.layer_norm([12])\.", r".norm\1.", block)
    block = re.sub(r"\.layer_scale([12])\.lambda1$", r".ls\1.scale_factor", block)
    block = re.sub(r"\.(attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj.", block)
    if block != name:
        return block
    return {
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    }[name]


def _reshape(tower: str, name: str, tensor: Tensor) -> Tensor:
    if name != "pos_embed":
        return tensor
    if tower == _SIGLIP:
        return tensor[0]
    # timm `no_embed_class`: no position for the class token, which transformers expects first.
    return torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)


def _undo_reshape(name: str, tensor: Tensor) -> Tensor:
    if name == "embeddings.position_embedding.weight":
        return tensor[None]
    if name == "embeddings.position_embeddings":
        return tensor[:, 1:]
    return tensor
