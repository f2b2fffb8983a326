"""What a product of each form reads and multiplies: bits in memory, arithmetic, launches."""

from collections.abc import Mapping
from dataclasses import dataclass

from qvla_export.quantizer.two_level_scales import CHANNEL_SCALE_BITS, MULTIPLIER_BITS
from qvla_export.shared.target import ActivationSupport, ProductForm, Target

# Of an int8 matrix with a float32 scale a channel.
_EXPANDED_SCALE_BITS = 32
# Inputs of a group, in scales of two levels.
_GROUP = 128


@dataclass(frozen=True)
class FormOnTarget:
    """A form of product on a target, for layers whose inputs are rounded or not."""

    form: ProductForm
    target: Target

    def stored_bits(self, bits: int, activations: ActivationSupport) -> int:
        """Return the bits of one weight where the product reads it; 16: the compute type's."""
        if bits == 16:
            return 32 if self.target.compute == "float32" else 16
        if self._joins(activations):
            return 8 if self.form == "expanded" else bits
        return bits if self.form == "kernel" else self.target.containers[bits].bits

    def row_bits(self, inputs: int, bits: int, activations: ActivationSupport) -> float:
        """Return the bits of one channel in memory, scales included."""
        stored = self.stored_bits(bits, activations)
        if bits == 16:
            return inputs * stored
        if self.form == "kernel":
            groups = -(-inputs // _GROUP) if bits < 8 else 0
            return inputs * stored + CHANNEL_SCALE_BITS + MULTIPLIER_BITS * groups
        if self._joins(activations):
            return inputs * stored + _EXPANDED_SCALE_BITS
        return self.target.containers[bits].row_bits(inputs)

    def multiplies_integers(self, bits: int, activations: ActivationSupport) -> bool:
        """Say whether channels of a width are multiplied as int8.

        TensorRT's int4 products take float activations only, and ONNX Runtime's graphs keep them
        in float (`qvla_export.graph.passes.integer_products`).
        """
        if bits == 16 or activations != "int8":
            return False
        return self._joins(activations) or self.stored_bits(bits, activations) == 8

    def unpacks_beforehand(self, bits: int, activations: ActivationSupport) -> bool:
        """Say whether codes become numbers of the compute type, at a rate of their own."""
        integers = self.multiplies_integers(bits, activations)
        return bits != 16 and self.form == "dequantized" and not integers

    def launches(
        self, channels: Mapping[int, int], activations: ActivationSupport
    ) -> list[dict[int, int]]:
        """Return which widths run in one kernel together: width -> channels of each."""
        if self.form == "kernel" and channels:
            return [dict(channels)]
        if not self._joins(activations):
            return [{bits: count} for bits, count in channels.items()]
        integers = {bits: count for bits, count in channels.items() if bits != 16}
        floats = {bits: count for bits, count in channels.items() if bits == 16}
        return [widths for widths in (integers, floats) if widths]

    @property
    def restores_order(self) -> bool:
        """Whether outputs of several widths must be put in order by a step of their own."""
        return self.form == "dequantized"

    def _joins(self, activations: ActivationSupport) -> bool:
        return self.form != "dequantized" and activations == "int8"
