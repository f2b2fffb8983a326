"""The noun `Target`: what a device and its runtime really offer. Instances: `engines.targets`."""

from collections.abc import Mapping
from dataclasses import dataclass

WIDTHS = (0, 2, 4, 8, 16)


@dataclass(frozen=True)
class Container:
    """How a target stores the weights of one width."""

    # Bits that one weight really occupies.
    bits: int
    # Weights along the input that share one scale; None for one scale per channel.
    group_size: int | None
    # Bits of one scale.
    scale_bits: int

    def row_bits(self, inputs: int) -> int:
        """Return the stored bits of one channel with `inputs` weights, scales included."""
        if self.bits == 0:
            return 0
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        return inputs * self.bits + groups * self.scale_bits


@dataclass(frozen=True)
class Target:
    """A device and runtime that a plan and a bundle are made for."""

    name: str
    # ONNX operator set and IR version of the exported graph.
    opset: int
    ir_version: int
    # Width -> container; 0 is absent from the graph.
    containers: Mapping[int, Container]
