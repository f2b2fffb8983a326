"""A Llama decoder stack with random weights, traced as the policies' decoders are."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig

from qvla_export.graph.float_graph import export_part
from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.policies.language_model import LanguageModel
from qvla_export.quantizer.activations import ActivationRanges, storable_range
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.shared.target import Target

INPUT = "hidden"
# No policy stands behind the plans; they are made for this.
DIGEST = "random decoder stack"
_EXAMPLE_TOKENS = 8


@dataclass(frozen=True)
class DecoderGeometry:
    """Sizes of the stack, and how many tokens pass through it at once."""

    width: int
    mlp: int
    depth: int
    heads: int
    tokens: int


class DecoderStack(nn.Module):
    """The blocks and the final norm: float32 [1, tokens, width] -> the same shape."""

    def __init__(self, geometry: DecoderGeometry, seed: int = 0) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=geometry.width,
            intermediate_size=geometry.mlp,
            num_hidden_layers=geometry.depth,
            num_attention_heads=geometry.heads,
            num_key_value_heads=geometry.heads,
            vocab_size=1,
            pad_token_id=0,
        )
        self.geometry = geometry
        self.language_model = LanguageModel(config, with_head=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim == 2:
                # Rows of norm 1 keep activations near 1.
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        self.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the stack."""
        output: Tensor = self.language_model(hidden)
        return output

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The quantizable layers by name, in forward order."""
        return {
            name: layer
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Linear) and ".layers." in name
        }

    @property
    def shapes(self) -> LayerShapes:
        """Layer name -> (channels, weights of one channel)."""
        return {name: (w.out_features, w.in_features) for name, w in self.layers.items()}

    def example(self, tokens: int, seed: int = 1) -> NDArray[np.float32]:
        """Return a random input, float32 [1, tokens, width]."""
        values = np.random.default_rng(seed).normal(size=(1, tokens, self.geometry.width))
        return values.astype(np.float32)


class _PartModule(nn.Module):
    """Parameters behind "module.", as `export_part` expects them."""

    def __init__(self, module: DecoderStack) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.module(inputs[0])
        return output


def trace_decoder(stack: DecoderStack, target: Target) -> ir.Model:
    """Return the stack's float graph: input `hidden`, any number of tokens from 2, or 1."""
    weights = {**dict(stack.named_parameters()), **dict(stack.named_buffers())}

    def read_weight(name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = weights[name].detach().numpy()
        return values

    # What tracing a part reads of a policy.
    spec = SimpleNamespace(horizon=1, action_dim=1)
    policy: Any = SimpleNamespace(
        digest=DIGEST, processor=SimpleNamespace(spec=spec), read_weight=read_weight
    )
    example = torch.zeros(1, _EXAMPLE_TOKENS, stack.geometry.width)
    tokens = {1: "prompt"}
    part = PolicyPart(
        "decoder", _PartModule(stack).eval(), {INPUT: example}, {"output": tokens}, {INPUT: tokens}
    )
    return export_part(cast(Policy, policy), part, stack.layers, target)


@torch.no_grad()
def measure_ranges(stack: DecoderStack, inputs: NDArray[np.float32]) -> ActivationRanges:
    """Return 8-bit ranges: the largest |x| that each layer is fed."""
    ranges: dict[str, float] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            ranges[name] = storable_range(float(arguments[0].abs().max()), 8)

        return hook

    handles = [w.register_forward_pre_hook(keep(name)) for name, w in stack.layers.items()]
    try:
        stack(torch.from_numpy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return ActivationRanges(8, "max", ranges)
