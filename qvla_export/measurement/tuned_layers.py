"""Layers whose weights follow codes and scales that move, see `measurement.code_tuning`."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, planned_rows, traced_layers, weight_rows
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.rounding import RoundedLayer
from qvla_export.quantizer.scale_search import CODE_RANGE


@dataclass(frozen=True)
class TunedBlock:
    """The channels of one width of a layer, and what of them moves."""

    bits: int
    # Which of the layer's.  int64 [n]
    channels: Tensor
    # Inputs that stay in the graph, as it stores them.  int64 [kept]
    order: Tensor
    # Consecutive ones, in that order, that share a scale.
    group_size: int
    # As stored.  float32 [n, groups]
    scales: Tensor
    # Zero points of the inputs, 0 where there are none.  float32 [n, kept]
    zeros: Tensor
    # What the codes are the whole numbers nearest to; it moves.  float32 [n, kept]
    codes: Tensor
    # Logarithm of what the scales are multiplied by; it moves. One a channel where its groups are
    # multiples of one scale.  float32 [n, groups or 1]
    logarithms: Tensor

    @staticmethod
    def of(
        layer: RoundedLayer,
        bits: int,
        chosen: NDArray[np.bool_],
        order: NDArray[np.int64],
        quantizer: QuantizerSpec,
        device: torch.device,
    ) -> "TunedBlock":
        """Return the block of a layer's channels of one width."""
        rule = quantizer.rule(bits)
        groups = rule.groups(len(order))
        steps = layer.steps.of(chosen, groups)
        zeros = steps.by_input(rule.group_size, len(order)).zero_points
        channels = np.flatnonzero(chosen)
        codes = torch.from_numpy(layer.codes[np.ix_(channels, order)].astype(np.float32))
        return TunedBlock(
            bits,
            torch.from_numpy(channels).to(device),
            torch.from_numpy(order).to(device),
            rule.group_size or max(len(order), 1),
            torch.from_numpy(steps.scales.copy()).to(device),
            torch.zeros(()) if zeros is None else torch.from_numpy(zeros).to(device),
            codes.to(device),
            torch.zeros(len(channels), 1 if rule.two_level else groups, device=device),
        )

    def steps(self) -> Tensor:
        """Return what a code of each input stands for.  [n, kept]"""
        scales = self.scales * self.logarithms.exp()
        return scales.repeat_interleave(self.group_size, dim=1)[:, : len(self.order)]

    def weights(self) -> Tensor:
        """Return the weights that an engine computes with.  [n, kept]"""
        return (self.codes.round() - self.zeros) * self.steps()

    def take_gradient(self, rows: Tensor) -> None:
        """Hand the gradient of the layer's rows on to what moves.  [channels, inputs]"""
        gradient = rows[self.channels][:, self.order]
        self.codes.grad = gradient * self.steps()
        missing = -len(self.order) % self.group_size
        products = nn.functional.pad(gradient * self.weights(), (0, missing))
        of_groups = products.reshape(len(products), -1, self.group_size).sum(dim=2)
        single = self.logarithms.shape[1] == 1
        self.logarithms.grad = of_groups.sum(dim=1, keepdim=True) if single else of_groups

    def stay_within(self) -> None:
        """Bring codes that left the range of their width back to its edge."""
        self.codes.clamp_(*CODE_RANGE[self.bits])


@dataclass(frozen=True)
class TunedLayer:
    """A layer whose weight is replaced by one that follows its blocks."""

    # The replaced one, of the layer's shape.
    weight: nn.Parameter
    blocks: tuple[TunedBlock, ...]

    @torch.no_grad()
    def follow(self) -> None:
        """Make the weight what codes and scales say."""
        rows = self.weight.view(len(self.weight), -1)
        for block in self.blocks:
            rows[block.channels[:, None], block.order] = block.weights()

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Hand the weight's gradient on to the blocks."""
        if self.weight.grad is not None:
            rows = self.weight.grad.reshape(len(self.weight), -1)
            for block in self.blocks:
                block.take_gradient(rows)
            self.weight.grad = None

    def rounded(
        self, old: RoundedLayer, widths: NDArray[np.int8], quantizer: QuantizerSpec
    ) -> RoundedLayer:
        """Return the layer's codes and scales as they are now, as stored."""
        codes, factors = old.codes.copy(), np.ones_like(old.scales)
        for block in self.blocks:
            channels, order = block.channels.cpu().numpy(), block.order.cpu().numpy()
            codes[np.ix_(channels, order)] = block.codes.round().to(torch.int8).cpu().numpy()
            moved = block.logarithms.exp().cpu().numpy()
            factors[channels, : moved.shape[1]] = moved
        return replace(old.with_scales(factors, widths, quantizer), codes=codes)


@contextlib.contextmanager
def tuned_layers(policy: Policy, plan: BitPlan) -> Iterator[Mapping[str, TunedLayer]]:
    """Run the block with the plan's weights in place, by layer; the old ones return at its end."""
    traced = traced_layers(policy)
    layers: Layers = {name: traced[name] for name in plan.widths}
    before = {name: layer.weight for name, layer in layers.items()}
    tuned = {}
    try:
        for name, layer in layers.items():
            rows = torch.from_numpy(planned_rows(name, weight_rows(layer), plan))
            weight = rows.to(layer.weight.device).reshape(layer.weight.shape)
            layer.weight = nn.Parameter(weight)
            tuned[name] = TunedLayer(layer.weight, _blocks_of(name, plan, weight.device))
        yield tuned
    finally:
        for name, parameter in before.items():
            layers[name].weight = parameter


def _blocks_of(name: str, plan: BitPlan, device: torch.device) -> tuple[TunedBlock, ...]:
    assert plan.rounding is not None
    widths, order = plan.widths[name], plan.stored_order(name)
    return tuple(
        TunedBlock.of(
            plan.rounding.layers[name], bits, widths == bits, order, plan.quantizer, device
        )
        for bits in np.unique(widths[(widths > 0) & (widths < 16)]).tolist()
    )
