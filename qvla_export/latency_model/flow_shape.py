"""What a policy that integrates a flow multiplies for one chunk, and published sizes of such.

pi0 and pi0.5: SigLIP So400m/14 and Gemma-2B read three pictures and the prompt once, a Gemma of
300 million weights runs once a step. Sources: openpi `models/gemma.py`, `models/pi0_config.py`.
SmolVLA: SmolVLM2-500M's tower and half of its blocks, an expert three quarters as wide that attends
to itself in every other block. Source: lerobot 0.6.1 `policies/smolvla/configuration_smolvla.py`.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

from qvla_export.latency_model.network_shape import (
    AttentionShape,
    LayerShape,
    NetworkShape,
    PartShape,
    PolicyInputs,
    attentions_of,
    layers_at,
    network_of,
    patches_of,
    require_layer,
)
from qvla_export.latency_model.published_sizes import GEOMETRIES, Geometry, TransformerSize
from qvla_export.latency_model.resnet_shape import (
    RESNET_GEOMETRIES,
    ResNetGeometry,
    has_resnet,
    resnet_network,
)
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.shared.errors import QvlaError

_TOWER, _LANGUAGE, _EXPERT = "vision_tower.", "language_model.layers.", "action_expert.layers."
# Maps of the prefix's keys and values, where a block of the expert sees nothing else.
_CROSSING = (".self_attn.key", ".self_attn.value")
_QUERY = ".self_attn.q_proj"
_EMBEDDING = f"{_TOWER}embeddings.patch_embedding"


def shape_of(shapes: LayerShapes, inputs: PolicyInputs) -> NetworkShape:
    """Return the network around a policy's quantizable layers, whatever its family.

    Raises:
        QvlaError: the layers are not those of a family that is known here.
    """
    if inputs.flow_steps:
        return flow_network(shapes, inputs)
    return resnet_network(shapes, inputs) if has_resnet(shapes) else network_of(shapes, inputs)


def has_flow_tower(shapes: LayerShapes) -> bool:
    """Whether layers are those of a policy that integrates a flow."""
    return _EMBEDDING in shapes


def with_prefix(inputs: PolicyInputs, shapes: LayerShapes, places: int) -> PolicyInputs:
    """Return the inputs with what a prefix's length says of images and state.

    Args:
        inputs: of the policy.
        shapes: its quantizable layers.
        places: of the prefix, beside those of the prompt.

    Raises:
        QvlaError: no square blocks of patches make so many.
    """
    patches = patches_of(shapes[require_layer(shapes, _EMBEDDING)][1], inputs.image_size)
    for state in (0, 1):
        tokens, rest = divmod(places - state, inputs.images)
        if rest or tokens < 1 or patches % tokens:
            continue
        if isqrt(patches // tokens) ** 2 == patches // tokens:
            return replace(inputs, image_tokens=tokens, state_in_prefix=bool(state))
    raise QvlaError(
        f"a prefix of {places} places beside the prompt is not made of {inputs.images} images of "
        f"{patches} patches; export the bundle again"
    )


def flow_network(shapes: LayerShapes, inputs: PolicyInputs) -> NetworkShape:
    """Return the network of a policy that integrates a flow: vision, prefix, flow.

    Args:
        shapes: quantizable layers that reach the action, by module name.
        inputs: pictures, prompt, chunk, steps.

    Raises:
        QvlaError: the layers are not those of such a policy.
    """
    width, patch = shapes[require_layer(shapes, _EMBEDDING)]
    hidden = shapes[require_layer(shapes, f"{_LANGUAGE}0.self_attn.k_proj")][1]
    count = inputs.images * patches_of(patch, inputs.image_size)
    tower = layers_at(shapes, _TOWER, count)
    tokens = inputs.images * inputs.image_tokens or count
    # A token gathers as many patches as there are more of them.
    projector = LayerShape("multi_modal_projector", hidden, width * (count // tokens), tokens)
    rows = tokens + inputs.prompt_tokens + inputs.state_in_prefix
    # The expert's keys of the prefix are made with it, once.
    keys = [layer for layer in layers_at(shapes, _EXPERT, rows) if layer.name.endswith(_CROSSING)]
    blocks = layers_at(shapes, _LANGUAGE, rows)
    return NetworkShape(
        (
            PartShape(
                "vision",
                (*tower, projector),
                attentions_of(tower, count // inputs.images, count),
            ),
            PartShape("prefix", (*blocks, *keys), attentions_of(blocks, rows, rows)),
            _flow(shapes, rows, inputs),
        )
    )


def _flow(shapes: LayerShapes, prefix: int, inputs: PolicyInputs) -> PartShape:
    """Return a step of the flow: the expert on the actions, and the state as a token."""
    reads_state = inputs.state_dim and not inputs.state_in_prefix
    rows = inputs.horizon + (1 if reads_state else 0)
    every = layers_at(shapes, _EXPERT, rows)
    expert = [layer for layer in every if not layer.name.endswith(_CROSSING)]
    width = shapes[require_layer(shapes, f"{_EXPERT}0.self_attn.k_proj")][1]
    small = [
        LayerShape("action_in_proj", width, inputs.action_width, inputs.horizon),
        LayerShape("action_out_proj", inputs.action_width, width, inputs.horizon),
    ]
    if inputs.adaptive:
        small += [LayerShape(f"time_mlp_{end}", width, width, 1) for end in ("in", "out")]
        blocks = sum(layer.name.endswith(".self_attn.q_proj") for layer in expert)
        # Two norms a block and the last one: scale, shift and gate of each.
        small += [
            LayerShape(f"action_expert.norms.{number}.dense", 3 * width, width, 1)
            for number in range(2 * blocks + 1)
        ]
    else:
        small += [
            LayerShape("action_time_mlp_in", width, 2 * width, inputs.horizon),
            LayerShape("action_time_mlp_out", width, width, inputs.horizon),
        ]
    keys = prefix + rows
    among = [layer for layer in expert if not _crosses(layer.name, shapes)]
    across = tuple(
        AttentionShape(rows, prefix, prefix, layer.channels, shapes[_key_of(layer.name)][0])
        for layer in expert
        if layer.name.endswith(_QUERY) and _crosses(layer.name, shapes)
    )
    attentions = (*attentions_of(among, keys, keys), *across)
    return PartShape("flow", (*expert, *small), attentions, inputs.flow_steps)


def _key_of(query: str) -> str:
    return query.removesuffix(_QUERY) + _CROSSING[0]


def _crosses(layer: str, shapes: LayerShapes) -> bool:
    """Whether a layer is the query of a block that sees the prefix alone."""
    return layer.endswith(_QUERY) and _key_of(layer) in shapes


@dataclass(frozen=True)
class FlowGeometry:
    """A policy that integrates a flow, by its sizes."""

    siglip: TransformerSize
    language: TransformerSize
    expert: TransformerSize
    # Width of the queries of language model and expert, all heads together.
    query_width: int
    patch_size: int
    inputs: PolicyInputs
    # The expert's block i attends to itself where i is a multiple of it, else to the prefix alone.
    self_attention_every: int = 1

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Quantizable layers: name -> (channels, weights of one channel)."""
        return dict(self._layers())

    @property
    def network(self) -> NetworkShape:
        """What it multiplies for one chunk."""
        return flow_network(self.layers, self.inputs)

    def _layers(self) -> Iterator[tuple[str, tuple[int, int]]]:
        siglip = self.siglip
        yield _EMBEDDING, (siglip.width, 3 * self.patch_size**2)
        for index in range(siglip.depth):
            block = f"{_TOWER}encoder.layers.{index}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield f"{block}.self_attn.{name}", (siglip.width, siglip.width)
            yield f"{block}.mlp.fc1", (siglip.mlp, siglip.width)
            yield f"{block}.mlp.fc2", (siglip.width, siglip.mlp)
        for prefix, size in ((_LANGUAGE, self.language), (_EXPERT, self.expert)):
            for index in range(size.depth):
                # Of the language model's last block, keys and values alone are read.
                whole = prefix == _EXPERT or index + 1 < size.depth
                crosses = prefix == _EXPERT and index % self.self_attention_every > 0
                yield from self._block(f"{prefix}{index}", size, whole, crosses)

    def _block(
        self, name: str, size: TransformerSize, whole: bool, crosses: bool
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        kv_width = size.kv_width or size.width
        for part in ("key", "value") if crosses else ("k_proj", "v_proj"):
            yield f"{name}.self_attn.{part}", (kv_width, kv_width if crosses else size.width)
        if whole:
            yield f"{name}.self_attn.q_proj", (self.query_width, size.width)
            yield f"{name}.self_attn.o_proj", (size.width, self.query_width)
            yield f"{name}.mlp.gate_proj", (size.mlp, size.width)
            yield f"{name}.mlp.up_proj", (size.mlp, size.width)
            yield f"{name}.mlp.down_proj", (size.width, size.mlp)


def _pi(inputs: PolicyInputs) -> FlowGeometry:
    return FlowGeometry(
        siglip=TransformerSize(1152, 4304, 27),
        language=TransformerSize(2048, 16384, 18, kv_width=256),
        expert=TransformerSize(1024, 4096, 18, kv_width=256),
        query_width=2048,
        patch_size=14,
        inputs=inputs,
    )


FLOW_GEOMETRIES: dict[str, FlowGeometry] = {
    # Three cameras, 50 actions of 32 numbers in ten steps; the prompts' usual lengths.
    "pi0-base": _pi(PolicyInputs(3, 224, 20, 50, 32, 32, flow_steps=10, action_width=32)),
    "pi05-base": _pi(
        PolicyInputs(3, 224, 60, 50, 32, flow_steps=10, action_width=32, adaptive=True)
    ),
    # Three cameras of 512 pixels, 16 patches a token; instructions are a line.
    "smolvla-base": FlowGeometry(
        siglip=TransformerSize(768, 3072, 12),
        language=TransformerSize(960, 2560, 16, kv_width=320),
        expert=TransformerSize(720, 2048, 16, kv_width=320),
        query_width=960,
        patch_size=16,
        inputs=PolicyInputs(
            *(3, 512, 12, 50, 32, 32),
            flow_steps=10,
            action_width=32,
            image_tokens=64,
            state_in_prefix=True,
        ),
        self_attention_every=2,
    ),
}


def find_any_geometry(name: str) -> Geometry | FlowGeometry | ResNetGeometry:
    """Return a published geometry by name, of any family.

    Raises:
        QvlaError: the message lists the names and the nearest.
    """
    known: dict[str, Geometry | FlowGeometry | ResNetGeometry] = {
        **GEOMETRIES,
        **FLOW_GEOMETRIES,
        **RESNET_GEOMETRIES,
    }
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise QvlaError(
            f"geometry {name!r} is unknown; there are {sorted(known)}. Did you mean {nearest!r}?"
        )
    return known[name]
