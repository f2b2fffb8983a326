"""A ResNet with frozen batch norms, named as torchvision names it, of the widths its weights have.

Sources: torchvision 0.26 `models/resnet.py` (names, strides), `ops/misc.py` (FrozenBatchNorm2d).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvla_export.shared.errors import CheckpointError

_EPSILON = 1e-5
_STAGES = 4
# Convolutions of a block -> the one that strides: BasicBlock's first, Bottleneck's second.
_STRIDING = {2: 0, 3: 1}


@dataclass(frozen=True)
class ConvShape:
    """A convolution: channels in and out, side of its kernel."""

    inputs: int
    outputs: int
    kernel: int


@dataclass(frozen=True)
class BlockShape:
    """A residual block: two convolutions, or three of a bottleneck."""

    convolutions: tuple[ConvShape, ...]
    # Of its striding convolution, and of what shortens the way around it.
    stride: int
    has_downsample: bool


@dataclass(frozen=True)
class ResNetShape:
    """All blocks of the four stages."""

    stem: ConvShape
    stages: tuple[tuple[BlockShape, ...], ...]

    @property
    def outputs(self) -> int:
        """Return the channels of the last stage."""
        return self.stages[-1][-1].convolutions[-1].outputs

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the last stage's output for a picture's."""

        def size(length: int) -> int:
            length = (length + 1) // 2  # 7 x 7, stride 2, padding 3
            length = (length + 1) // 2  # pooling 3 x 3, stride 2, padding 1
            for stage in self.stages:
                length = -(-length // stage[0].stride)
            return length

        return size(height), size(width)


def read_resnet(shapes: Mapping[str, Tensor], prefix: str) -> ResNetShape:
    """Return the shape of a ResNet from its weights' shapes.

    Args:
        shapes: name -> tensor, of which the shape alone is looked at.
        prefix: of the backbone's names, "backbone.".

    Raises:
        CheckpointError: the weights are no ResNet's.
    """
    stages = []
    for stage in range(1, _STAGES + 1):
        pattern = re.compile(rf"{re.escape(prefix)}layer{stage}\.(\d+)\.conv1\.weight")
        count = sum(bool(pattern.fullmatch(name)) for name in shapes)
        blocks = [_block(shapes, f"{prefix}layer{stage}.{i}.", i, stage) for i in range(count)]
        if not blocks:
            raise CheckpointError(f"the checkpoint has no {prefix}layer{stage}; is it a ResNet?")
        stages.append(tuple(blocks))
    return ResNetShape(_convolution(shapes, f"{prefix}conv1"), tuple(stages))


def _block(shapes: Mapping[str, Tensor], name: str, number: int, stage: int) -> BlockShape:
    count = 3 if f"{name}conv3.weight" in shapes else 2
    return BlockShape(
        tuple(_convolution(shapes, f"{name}conv{i + 1}") for i in range(count)),
        2 if stage > 1 and number == 0 else 1,
        f"{name}downsample.0.weight" in shapes,
    )


def _convolution(shapes: Mapping[str, Tensor], name: str) -> ConvShape:
    weight = shapes.get(f"{name}.weight")
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        shape = None if weight is None else list(weight.shape)
        raise CheckpointError(f"{name}.weight must be a convolution's [out, in, k, k], got {shape}")
    outputs, inputs, kernel, _ = weight.shape
    return ConvShape(inputs, outputs, kernel)


class FrozenBatchNorm(nn.Module):
    """A batch norm whose statistics are constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        """Scale and shift each channel of [N, C, H, W]."""
        weight, bias, mean, variance = (
            self.get_buffer(name)[:, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (variance + _EPSILON).rsqrt()
        return values * scale + (bias - mean * scale)


class _Block(nn.Module):
    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self._count = len(shape.convolutions)
        for i, conv in enumerate(shape.convolutions):
            stride = shape.stride if i == _STRIDING[self._count] else 1
            self.add_module(f"conv{i + 1}", _conv(conv, stride))
            self.add_module(f"bn{i + 1}", FrozenBatchNorm(conv.outputs))
        self.downsample: nn.Sequential | None = None
        if shape.has_downsample:
            ends = shape.convolutions[0].inputs, shape.convolutions[-1].outputs
            self.downsample = nn.Sequential(
                _conv(ConvShape(*ends, 1), shape.stride), FrozenBatchNorm(ends[1])
            )

    def forward(self, values: Tensor) -> Tensor:
        """Map [N, C, H, W] to the block's output."""
        around = values if self.downsample is None else self.downsample(values)
        for i in range(1, self._count + 1):
            values = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(values))
            if i < self._count:
                values = nn.functional.relu(values)
        return nn.functional.relu(values + around)


class ResNet(nn.Module):
    """Pictures [N, 3, H, W] to the last stage's features [N, C, h, w]."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.conv1 = _conv(shape.stem, 2)
        self.bn1 = FrozenBatchNorm(shape.stem.outputs)
        for number, blocks in enumerate(shape.stages, 1):
            self.add_module(f"layer{number}", nn.Sequential(*map(_Block, blocks)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        values = nn.functional.relu(self.bn1(self.conv1(pictures)))
        values = nn.functional.max_pool2d(values, 3, 2, 1)
        for number in range(1, _STAGES + 1):
            values = self.get_submodule(f"layer{number}")(values)
        return values


def _conv(shape: ConvShape, stride: int) -> nn.Conv2d:
    side = shape.kernel
    return nn.Conv2d(shape.inputs, shape.outputs, side, stride, side // 2, bias=False)
