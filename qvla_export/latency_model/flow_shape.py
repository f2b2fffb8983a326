"""What a policy that integrates a flow multiplies for one chunk, and published sizes of such.

pi0 and pi0.5: SigLIP So400m/14 and Gemma-2B read three pictures and the prompt once, a Gemma of
300 million weights runs once a step. Sources: openpi `models/gemma.py`, `models/pi0_config.py`.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from qvla_export.latency_model.network_shape import (
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
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.shared.errors import QvlaError

_TOWER, _LANGUAGE, _EXPERT = "vision_tower.", "language_model.layers.", "action_expert.layers."
_EMBEDDING = f"{_TOWER}embeddings.patch_embedding"


def shape_of(shapes: LayerShapes, inputs: PolicyInputs) -> NetworkShape:
    """Return the network around a policy's quantizable layers, with or without a flow.

    Raises:
        QvlaError: the layers are not those of a family that is known here.
    """
    return flow_network(shapes, inputs) if inputs.flow_steps else network_of(shapes, inputs)


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
    projector = LayerShape("multi_modal_projector", hidden, width, count)
    rows = count + inputs.prompt_tokens
    prefix = layers_at(shapes, _LANGUAGE, rows)
    return NetworkShape(
        (
            PartShape(
                "vision",
                (*tower, projector),
                attentions_of(tower, count // inputs.images, count),
            ),
            PartShape("prefix", prefix, attentions_of(prefix, rows, rows)),
            _flow(shapes, rows, inputs),
        )
    )


def _flow(shapes: LayerShapes, prefix: int, inputs: PolicyInputs) -> PartShape:
    """Return a step of the flow: the expert on the actions, and the state as a token."""
    rows = inputs.horizon + (1 if inputs.state_dim else 0)
    expert = layers_at(shapes, _EXPERT, rows)
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
    attentions = attentions_of(expert, keys, keys)
    return PartShape("flow", (*expert, *small), attentions, inputs.flow_steps)


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
                yield from self._block(f"{prefix}{index}", size, whole)

    def _block(
        self, name: str, size: TransformerSize, whole: bool
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        kv_width = size.kv_width or size.width
        for part in ("k_proj", "v_proj"):
            yield f"{name}.self_attn.{part}", (kv_width, size.width)
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
}


def find_any_geometry(name: str) -> Geometry | FlowGeometry:
    """Return a published geometry by name, with or without a flow.

    Raises:
        QvlaError: the message lists the names and the nearest.
    """
    known: dict[str, Geometry | FlowGeometry] = {**GEOMETRIES, **FLOW_GEOMETRIES}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise QvlaError(
            f"geometry {name!r} is unknown; there are {sorted(known)}. Did you mean {nearest!r}?"
        )
    return known[name]
