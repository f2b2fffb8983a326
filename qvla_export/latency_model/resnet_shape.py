"""What a policy with a ResNet, an encoder and a decoder multiplies for one chunk. Torch-free.

ACT: a ResNet-18 for each picture, its last map's places and the state in an encoder, as many
queries as a chunk has actions in a decoder. Source: lerobot 0.6.1 `policies/act`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qvla_export.latency_model.network_shape import (
    AttentionShape,
    LayerShape,
    NetworkShape,
    PartShape,
    PolicyInputs,
    require_layer,
)
from qvla_export.quantizer.layer_shapes import LayerShapes

_STEM = "backbone.conv1"
_CONVOLUTION = re.compile(r"^backbone\.layer(\d)\.(\d+)\.(conv\d|downsample\.0)$")
# Layers of the decoder that read what the encoder put out.
_OF_MEMORY = (".multihead_attn.key", ".multihead_attn.value")


def has_resnet(shapes: LayerShapes) -> bool:
    """Whether layers are those of such a policy."""
    return _STEM in shapes


def resnet_network(shapes: LayerShapes, inputs: PolicyInputs) -> NetworkShape:
    """Return the network around a policy's quantizable layers: vision, encoder, decoder.

    Args:
        shapes: quantizable layers that reach the action, by module name.
        inputs: pictures, state, chunk.

    Raises:
        QvlaError: the layers are not those of such a policy.
    """
    convolutions = tuple(_convolutions(shapes, inputs))
    features, rows = convolutions[-1].channels, convolutions[-1].rows
    width = shapes[require_layer(shapes, "encoder.layers.0.linear1")][1]
    projector = LayerShape("encoder_img_feat_input_proj", width, features, rows)
    state = [LayerShape("encoder_robot_state_input_proj", width, inputs.state_dim, 1)]
    # The latent, which is zero where a policy acts, is a token too.
    memory = rows + 1 + bool(inputs.state_dim)
    encoder = tuple(LayerShape.of(n, s, memory) for n, s in _at(shapes, "encoder.layers."))
    decoder = tuple(
        LayerShape.of(n, s, memory if n.endswith(_OF_MEMORY) else inputs.horizon)
        for n, s in _at(shapes, "decoder.layers.")
    )
    head = LayerShape("action_head", inputs.action_dim, width, inputs.horizon)
    first = tuple(state) if inputs.state_dim else ()
    return NetworkShape(
        (
            PartShape("vision", (*convolutions, projector)),
            PartShape("encoder", (*first, *encoder), tuple(_attentions(encoder, memory))),
            PartShape("decoder", (*decoder, head), tuple(_attentions(decoder, memory))),
        )
    )


def _convolutions(shapes: LayerShapes, inputs: PolicyInputs) -> Iterator[LayerShape]:
    """Yield the ResNet's layers: 7 x 7 by two, pooling by two, stages by two but for the first."""
    size = _halved((inputs.image_height or inputs.image_size, inputs.image_size))
    yield _convolution(shapes, _STEM, inputs.images, size, 7 * 7 // 4)
    size = _halved(size)
    for name in shapes:
        match = _CONVOLUTION.match(name)
        if match is None:
            continue
        stage, block, part = match.groups()
        deep = f"backbone.layer{stage}.{block}.conv3" in shapes
        # A bottleneck's second convolution is the wide one and strides, else the first does.
        wide = part == "conv2" if deep else part != "downsample.0"
        strides = (stage, block, part) in {(str(s), "0", f"conv{1 + deep}") for s in (2, 3, 4)}
        size = _halved(size) if strides else size
        overlap = 3 * 3 // (4 if strides else 1) if wide else 1
        yield _convolution(shapes, name, inputs.images, size, overlap)


def _convolution(
    shapes: LayerShapes, name: str, images: int, size: tuple[int, int], overlap: int
) -> LayerShape:
    channels, weights = shapes[name]
    return LayerShape(name, channels, weights, images * size[0] * size[1], overlap)


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    return (height + 1) // 2, (width + 1) // 2


def _at(shapes: LayerShapes, prefix: str) -> list[tuple[str, tuple[int, int]]]:
    return [(name, shape) for name, shape in shapes.items() if name.startswith(prefix)]


def _attentions(layers: tuple[LayerShape, ...], memory: int) -> Iterator[AttentionShape]:
    """Yield the attention of each block; the decoder's first one looks at constants, once made."""
    for layer in layers:
        if layer.name.endswith(".self_attn.qk_proj"):
            width = layer.channels // 2
            yield AttentionShape(layer.rows, layer.rows, layer.rows, width, width)
        elif layer.name.endswith(_OF_MEMORY[0]):
            width = layer.channels
            rows = next(e.rows for e in layers if e.name.endswith(".multihead_attn.out_proj"))
            yield AttentionShape(rows, memory, memory, width, width)


@dataclass(frozen=True)
class ResNetGeometry:
    """A policy of this kind, with a ResNet of two convolutions a block, by its sizes."""

    # Blocks of each stage, of 64 channels and twice as many from one to the next.
    blocks: tuple[int, ...]
    width: int
    mlp: int
    encoder_depth: int
    decoder_depth: int
    inputs: PolicyInputs

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Quantizable layers: name -> (channels, weights of one channel)."""
        return dict(self._layers())

    @property
    def network(self) -> NetworkShape:
        """What it multiplies for one chunk."""
        return resnet_network(self.layers, self.inputs)

    def _layers(self) -> Iterator[tuple[str, tuple[int, int]]]:
        yield _STEM, (64, 3 * 7 * 7)
        before = 64
        for stage, blocks in enumerate(self.blocks, 1):
            channels = 64 << (stage - 1)
            for block in range(blocks):
                name = f"backbone.layer{stage}.{block}"
                yield f"{name}.conv1", (channels, 9 * before)
                yield f"{name}.conv2", (channels, 9 * channels)
                if before != channels:
                    yield f"{name}.downsample.0", (channels, before)
                before = channels
        for number in range(self.encoder_depth):
            yield from self._block(f"encoder.layers.{number}", ("self_attn",))
        for number in range(self.decoder_depth):
            # The first block's queries, and what it attends to of itself, are constants.
            both = ("self_attn", "multihead_attn") if number else ("multihead_attn",)
            yield from self._block(f"decoder.layers.{number}", both, reads_constants=not number)

    def _block(
        self, name: str, attentions: tuple[str, ...], reads_constants: bool = False
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        square = (self.width, self.width)
        for attention in attentions:
            if attention == "self_attn":
                yield f"{name}.self_attn.qk_proj", (2 * self.width, self.width)
                yield f"{name}.self_attn.v_proj", square
            else:
                for part in ("key", "value") if reads_constants else ("query", "key", "value"):
                    yield f"{name}.multihead_attn.{part}", square
            yield f"{name}.{attention}.out_proj", square
        yield f"{name}.linear1", (self.mlp, self.width)
        yield f"{name}.linear2", (self.width, self.mlp)


RESNET_GEOMETRIES: dict[str, ResNetGeometry] = {
    # ALOHA in simulation: one camera of 480 x 640, 14 joints, chunks of 100 actions.
    "act-aloha": ResNetGeometry(
        blocks=(2, 2, 2, 2),
        width=512,
        mlp=3200,
        encoder_depth=4,
        decoder_depth=1,
        inputs=PolicyInputs(1, 640, 0, 100, 14, 14, image_height=480),
    ),
}
