"""Published sizes of policies, for predictions without a checkpoint. Torch-free.

OpenVLA-7B: Llama-2-7B, DINOv2 ViT-L/14 with registers and SigLIP So400m/14 at 224 pixels; both
towers are read at their second-to-last block (openvla `prismatic/models/backbones`).
"""

import difflib
from dataclasses import dataclass

from qvla_export.latency_model.network_shape import NetworkShape, PolicyInputs, network_of
from qvla_export.shared.errors import QvlaError

# "In: What action should the robot take to ...?\nOut:" with an instruction of usual length.
PROMPT_TOKENS = 30


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of a stack of transformer blocks."""

    width: int
    mlp: int
    # Blocks that reach the action.
    depth: int
    # Width of keys and values; None for as wide as the queries.
    kv_width: int | None = None


@dataclass(frozen=True)
class Geometry:
    """A policy by its sizes."""

    dino: TransformerSize
    siglip: TransformerSize
    llama: TransformerSize
    patch_size: int
    inputs: PolicyInputs

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Quantizable layers: name -> (channels, weights of one channel)."""
        patch = 3 * self.patch_size**2
        tower = "vision_backbone.featurizer"
        found: dict[str, tuple[int, int]] = {}
        found[f"{tower}.embeddings.patch_embeddings.projection"] = (self.dino.width, patch)
        for i in range(self.dino.depth):
            block = f"{tower}.encoder.layer.{i}"
            found |= _attention(self.dino, f"{block}.attention", "o_proj") | _mlp(self.dino, block)
        tower = "vision_backbone.fused_featurizer"
        found[f"{tower}.embeddings.patch_embedding"] = (self.siglip.width, patch)
        for i in range(self.siglip.depth):
            block = f"{tower}.encoder.layers.{i}"
            found |= _attention(self.siglip, f"{block}.self_attn", "out_proj")
            found |= _mlp(self.siglip, block)
        return found | llama_layers(self.llama)

    @property
    def network(self) -> NetworkShape:
        """What it multiplies for one action."""
        return network_of(self.layers, self.inputs)


def llama_layers(size: TransformerSize) -> dict[str, tuple[int, int]]:
    """Return a Llama decoder's layers: name -> (channels, weights of one channel)."""
    found: dict[str, tuple[int, int]] = {}
    for i in range(size.depth):
        block = f"language_model.model.layers.{i}"
        found |= _attention(size, f"{block}.self_attn", "o_proj")
        found[f"{block}.mlp.gate_proj"] = (size.mlp, size.width)
        found[f"{block}.mlp.up_proj"] = (size.mlp, size.width)
        found[f"{block}.mlp.down_proj"] = (size.width, size.mlp)
    return found


def _attention(size: TransformerSize, parent: str, output: str) -> dict[str, tuple[int, int]]:
    kv_width = size.kv_width or size.width
    sizes = {"q_proj": size.width, "k_proj": kv_width, "v_proj": kv_width, output: size.width}
    return {f"{parent}.{name}": (channels, size.width) for name, channels in sizes.items()}


def _mlp(size: TransformerSize, block: str) -> dict[str, tuple[int, int]]:
    return {
        f"{block}.mlp.fc1": (size.mlp, size.width),
        f"{block}.mlp.fc2": (size.width, size.mlp),
    }


def _openvla(inputs: PolicyInputs) -> Geometry:
    return Geometry(
        dino=TransformerSize(1024, 4096, 23),
        siglip=TransformerSize(1152, 4304, 26),
        llama=TransformerSize(4096, 11008, 32),
        patch_size=14,
        inputs=inputs,
    )


GEOMETRIES: dict[str, Geometry] = {
    # One camera, one action of 7 tokens, a pass for each.
    "openvla-7b": _openvla(
        PolicyInputs(1, 224, PROMPT_TOKENS, 1, 7, head="tokens", autoregressive=True)
    ),
    # LIBERO: one camera, 12 actions decoded from 4 latent tokens, a pass for each.
    "univla-7b": _openvla(
        PolicyInputs(
            1, 224, PROMPT_TOKENS, 12, 7, head="latent", autoregressive=True, latent_tokens=4
        )
    ),
    # LIBERO: two cameras, state of 8 numbers, 8 actions in one pass.
    "openvla-oft-7b": _openvla(PolicyInputs(2, 224, PROMPT_TOKENS, 8, 7, state_dim=8)),
}


def find_geometry(name: str) -> Geometry:
    """Return a published geometry by name.

    Raises:
        QvlaError: the message lists the names and the nearest.
    """
    if name not in GEOMETRIES:
        nearest = difflib.get_close_matches(name, GEOMETRIES, n=1, cutoff=0.0)[0]
        raise QvlaError(
            f"geometry {name!r} is unknown; there are {sorted(GEOMETRIES)}. "
            f"Did you mean {nearest!r}?"
        )
    return GEOMETRIES[name]
