"""The parts that all families on Prismatic's towers begin with, and what parts are made of."""

from collections.abc import Callable
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.prismatic.vision import PrismaticModule
from qvla_export.shared.processor import ProcessorSpec


class PartModule(nn.Module):
    """A function of the network's modules; parameters keep their names behind "module."."""

    def __init__(
        self, module: nn.Module, function: Callable[..., Tensor | tuple[Tensor, ...]]
    ) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the part."""
        return self._function(*inputs)


def tower_part(
    module: PrismaticModule, spec: ProcessorSpec, name: Literal["dino", "siglip"]
) -> PolicyPart:
    """Return one vision tower: pixels to its features."""

    def run(pixel_values: Tensor) -> Tensor:
        return module.vision_backbone.features(pixel_values, name)

    part = PartModule(module, run).eval()
    return PolicyPart(name, part, example_pixels(module, spec), {f"{name}_features": {}}, {})


def projector_part(module: PrismaticModule, spec: ProcessorSpec) -> PolicyPart:
    """Return the projector: both towers' features to patch embeddings."""

    def run(dino_features: Tensor, siglip_features: Tensor) -> Tensor:
        patches: Tensor = module.projector(torch.cat([dino_features, siglip_features], dim=-1))
        return patches

    tokens = example_patches(module, spec).shape[1]
    towers = (("dino", module.arch.dino), ("siglip", module.arch.siglip))
    inputs = {
        f"{name}_features": torch.zeros(1, tokens, tower.hidden_size, device=device_of(module))
        for name, tower in towers
    }
    return PolicyPart("projector", PartModule(module, run).eval(), inputs, {"patches": {}}, {})


def device_of(module: PrismaticModule) -> torch.device:
    """Return where a network's weights are; "meta" where they were left on disk."""
    return module.projector.fc1.weight.device


def example_pixels(module: PrismaticModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    """Return model input `pixel_values` [1, 6 * images, S, S] as an example."""
    side = isqrt(spec.pixels)
    shape = (1, 6 * len(spec.cameras), side, side)
    return {"pixel_values": torch.zeros(shape, device=device_of(module))}


def example_patches(module: PrismaticModule, spec: ProcessorSpec) -> Tensor:
    """Return patch embeddings of all images [1, images * patches, D] as an example."""
    shape = (1, len(spec.cameras) * module.arch.patches, module.arch.llama.hidden_size)
    return torch.zeros(shape, device=device_of(module))
