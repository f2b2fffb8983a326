"""The noun `NetworkShape`: what a policy multiplies for one action, independent of torch.

Layers are told apart by their names, as checkpoints of OpenVLA's family have them, so that a plan,
a bundle or a published geometry is enough to make one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from qvla_export.quantizer.layer_names import parallel_group
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.shared.errors import QvlaError

_TOWERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
_DECODER = "language_model.model."
# DINOv2's class token and registers come before its patches; SigLIP has none.
_DINO_PREFIX = 5
# Of what decodes latent tokens, as published.
_LATENT_WIDTH = 512


@dataclass(frozen=True)
class LayerShape:
    """One linear map and the rows it multiplies at a time."""

    # Module name; a plan that names it gives it its widths, otherwise it stays in float.
    name: str
    channels: int
    # Weights of one channel.
    inputs: int
    rows: int
    # Rows that a number of its input stands in: a convolution's kernel, where it moves by one.
    overlap: int = 1

    @staticmethod
    def of(name: str, shape: tuple[int, int], rows: int) -> "LayerShape":
        """Return a quantizable layer's; `shape` is (channels, weights of one channel)."""
        channels, inputs = shape
        return LayerShape(name, channels, inputs, rows)

    @property
    def group(self) -> str:
        """Equal for layers that run as one product; see `qvla_export.graph.passes.merge`."""
        return parallel_group(self.name)


@dataclass(frozen=True)
class AttentionShape:
    """Scores and weighted sum of one attention block, all heads together."""

    rows: int
    # Keys that each row attends to, and how many distinct ones are read.
    keys: int
    keys_read: int
    # Width of queries, and of keys and values.
    width: int
    kv_width: int


@dataclass(frozen=True)
class PartShape:
    """A part of the network, which runs `runs` times for each action."""

    # "vision", "decoder", "head"; an autoregressive policy has "prefill" and "decode".
    name: str
    layers: tuple[LayerShape, ...]
    attentions: tuple[AttentionShape, ...] = ()
    runs: int = 1


@dataclass(frozen=True)
class NetworkShape:
    """All parts, in the order they run."""

    parts: tuple[PartShape, ...]

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (channels, weights of one channel), each layer once."""
        every = (layer for part in self.parts for layer in part.layers)
        return {layer.name: (layer.channels, layer.inputs) for layer in every}


@dataclass(frozen=True)
class PolicyInputs:
    """What decides the rows of a policy's layers."""

    images: int
    # Side of an image in pixels; its width where it is not square.
    image_size: int
    # Prompt tokens, BOS and suffix included.
    prompt_tokens: int
    horizon: int
    action_dim: int
    # 0 where the policy takes no state.
    state_dim: int = 0
    head: Literal["l1", "tokens", "latent", "diffusion"] = "l1"
    # Every token needs a pass of its own, as in OpenVLA; False: one pass, as in OpenVLA-OFT.
    autoregressive: bool = False
    # Tokens of a chunk where they are not its numbers, but are decoded to it (head "latent").
    latent_tokens: int = 0
    # Passes through the decoder and the head, as many as a diffusion head has steps.
    denoising_steps: int = 1
    # Rows of lm_head, for token heads.
    vocab_size: int = 32064
    # Steps of a flow; 0 for policies without one. Then `action_width` are the network's numbers of
    # an action, and a state is a token; `adaptive` norms depend on the time.
    flow_steps: int = 0
    action_width: int = 0
    adaptive: bool = False
    # Tokens of an image in a flow's prefix; 0: one for each patch. Where the prefix has the state
    # as a token, the expert has not.
    image_tokens: int = 0
    state_in_prefix: bool = False
    # Of an image that is not square, in pixels; 0: as its width.
    image_height: int = 0

    @property
    def slots(self) -> int:
        """Numbers of a chunk: action tokens, or positions of the sequence."""
        return self.horizon * self.action_dim

    @property
    def decoded_tokens(self) -> int:
        """Tokens that come one after the other."""
        return self.latent_tokens or self.slots


def network_of(shapes: LayerShapes, inputs: PolicyInputs) -> NetworkShape:
    """Return the network around a policy's quantizable layers.

    Projector, state projector and head are added at the sizes OpenVLA's family gives them.

    Args:
        shapes: quantizable layers that reach the action, by module name.
        inputs: images, prompt, chunk.

    Raises:
        QvlaError: the layers are not those of this family.
    """
    towers = [_patch_embedding(shapes, tower) for tower in _TOWERS]
    features = sum(shapes[name][0] for name in towers)
    patches = {patches_of(shapes[name][1], inputs.image_size) for name in towers}
    hidden = shapes[require_layer(shapes, f"{_DECODER}layers.0.self_attn.q_proj")][1]
    if len(patches) != 1:
        raise QvlaError(f"both towers must make the same number of patches, got {sorted(patches)}")
    count = inputs.images * patches.pop()
    vision = _vision(shapes, towers, inputs.images, count)
    projector = (
        LayerShape("projector.fc1", 4 * features, features, count),
        LayerShape("projector.fc2", hidden, 4 * features, count),
        LayerShape("projector.fc3", hidden, hidden, count),
    )
    first = PartShape("vision", vision.layers + projector, vision.attentions)
    prompt = count + inputs.prompt_tokens + (1 if inputs.state_dim else 0)
    parts = _decoder(shapes, prompt, hidden, inputs)
    if inputs.head == "latent":
        parts = (*parts, _latent_decoder(count, hidden, inputs))
    return NetworkShape((first, *parts))


def decoder_part(shapes: LayerShapes, name: str, rows: int, keys: int, runs: int = 1) -> PartShape:
    """Return a pass of `rows` positions through a decoder's layers, each attending to `keys`."""
    layers = layers_at(shapes, _DECODER, rows)
    return PartShape(name, layers, attentions_of(layers, keys, keys), runs)


def _vision(shapes: LayerShapes, embeddings: list[str], images: int, patches: int) -> PartShape:
    """Both towers on all images; attention stays within an image."""
    layers: tuple[LayerShape, ...] = ()
    attentions: tuple[AttentionShape, ...] = ()
    for tower, embedding, prefix in zip(_TOWERS, embeddings, (_DINO_PREFIX, 0), strict=True):
        rows = patches + images * prefix
        blocks = tuple(e for e in layers_at(shapes, tower, rows) if e.name != embedding)
        layers += (LayerShape.of(embedding, shapes[embedding], patches), *blocks)
        attentions += attentions_of(blocks, rows // images, rows)
    return PartShape("vision", layers, attentions)


def _decoder(
    shapes: LayerShapes, prompt: int, hidden: int, inputs: PolicyInputs
) -> tuple[PartShape, ...]:
    """Everything from the first decoder block on; `prompt` positions come before the action."""
    if inputs.autoregressive:
        # The pass over the prompt yields the first token.
        tokens = inputs.decoded_tokens
        lm_head = LayerShape("language_model.lm_head", inputs.vocab_size, hidden, 1)
        return (
            decoder_part(shapes, "prefill", prompt, prompt),
            decoder_part(shapes, "decode", 1, prompt + tokens // 2, tokens - 1),
            PartShape("head", (lm_head,), runs=tokens),
        )
    rows, steps = prompt + inputs.slots + 1, inputs.denoising_steps
    if inputs.head == "diffusion":
        rows += 1  # the time
    decoder = decoder_part(shapes, "decoder", rows, rows, steps)
    if inputs.head == "diffusion":
        noisy = (
            LayerShape("noisy_action_projector.fc1", hidden, 1, inputs.slots),
            LayerShape("noisy_action_projector.fc2", hidden, hidden, inputs.slots),
        )
        decoder = PartShape("decoder", noisy + decoder.layers, decoder.attentions, steps)
    if inputs.state_dim:
        state = (
            LayerShape("proprio_projector.fc1", hidden, inputs.state_dim, 1),
            LayerShape("proprio_projector.fc2", hidden, hidden, 1),
        )
        decoder = PartShape("decoder", state + decoder.layers, decoder.attentions, steps)
    if inputs.head == "tokens":
        lm_head = LayerShape("language_model.lm_head", inputs.vocab_size, hidden, inputs.slots)
        return decoder, PartShape("head", (lm_head,))
    sizes = [(hidden, hidden * inputs.action_dim), *[(hidden, hidden)] * 2]
    sizes.append((inputs.action_dim, hidden))
    head = tuple(
        LayerShape(f"action_head.model.{i}", channels, width, inputs.horizon)
        for i, (channels, width) in enumerate(sizes)
    )
    return decoder, PartShape("head", head, runs=steps)


def _latent_decoder(patches: int, hidden: int, inputs: PolicyInputs) -> PartShape:
    """Pool patches, then latent tokens, into one vector, and map it to the chunk."""
    layers = []
    for pool, rows in (("visual_pool", patches), ("latent_action_pool", inputs.latent_tokens)):
        name, width = f"action_decoder.{pool}", _LATENT_WIDTH
        layers += [
            LayerShape(f"{name}.projection", width, hidden, rows),
            LayerShape(f"{name}.attn.kv", 2 * width, width, rows),
            LayerShape(f"{name}.attn.q", width, width, 1),
            LayerShape(f"{name}.attn.proj", width, width, 1),
            LayerShape(f"{name}.mlp.0.project", 8 * width, width, 1),
            LayerShape(f"{name}.mlp.1", width, 4 * width, 1),
        ]
    proj = LayerShape("action_decoder.proj.0", inputs.slots, _LATENT_WIDTH, 1)
    return PartShape("action_decoder", (*layers, proj))


def layers_at(shapes: LayerShapes, prefix: str, rows: int) -> tuple[LayerShape, ...]:
    """Return the layers of a module as they multiply `rows` rows."""
    return tuple(
        LayerShape.of(name, shape, rows)
        for name, shape in shapes.items()
        if name.startswith(prefix)
    )


def attentions_of(
    layers: Iterable[LayerShape], keys: int, keys_read: int
) -> tuple[AttentionShape, ...]:
    """Return the attention of every block among layers; see `AttentionShape`."""
    channels = {layer.name: layer.channels for layer in layers}
    return tuple(
        AttentionShape(
            layer.rows, keys, keys_read, layer.channels, channels[f"{layer.name[:-6]}k_proj"]
        )
        for layer in layers
        if layer.name.endswith(".q_proj")
    )


def _patch_embedding(shapes: LayerShapes, tower: str) -> str:
    for name in shapes:
        if name.startswith(f"{tower}embeddings."):
            return name
    return require_layer(shapes, f"{tower}embeddings")


def patches_of(inputs: int, image_size: int) -> int:
    """Return the patches of an image; `inputs` are the 3 colours of a square patch.

    Raises:
        QvlaError: such patches do not tile it.
    """
    side = isqrt(inputs // 3)
    if 3 * side * side != inputs or image_size % side:
        raise QvlaError(
            f"a patch embedding must read square patches of 3 colours that tile the image, got "
            f"{inputs} inputs for images of {image_size} pixels; give the policy's image size"
        )
    return (image_size // side) ** 2


def require_layer(shapes: Mapping[str, tuple[int, int]], name: str) -> str:
    """Return a layer's name.

    Raises:
        QvlaError: there is no such layer.
    """
    if name not in shapes:
        raise QvlaError(
            f"no layer {name!r} among {list(shapes)[:3]}...; latency is predicted for policies "
            "with the module names of OpenVLA's family"
        )
    return name
