"""What a `Policy` does that is read whole and that its processor feeds, whatever its network."""

import abc
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.policies.base import IGNORED_TOKEN_ID, PolicyBatch
from qvla_export.policies.base_policy import BasePolicy
from qvla_export.policies.reached_layers import linear_layers, reached_layers
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.observation import Observation

_NO_WORDS = np.zeros(0, np.int64)
_Self = TypeVar("_Self", bound="WholePolicy")  # typing.Self needs Python 3.11


@dataclass(frozen=True, repr=False)
class WholePolicy(BasePolicy):
    """A loaded policy; see `Policy` for the meaning of its members."""

    @abc.abstractmethod
    def is_quantized(self, name: str) -> bool:
        """Whether a layer of this name is quantized, provided that it reaches the action."""

    def inputs(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch of model inputs."""
        feeds = [self.processor.feeds(observation) for observation in observations]

        def stacked(name: str) -> Tensor | None:
            if name not in feeds[0]:
                return None
            return torch.from_numpy(np.concatenate([item[name] for item in feeds]))

        rows = [item["input_ids"][0] if "input_ids" in item else _NO_WORDS for item in feeds]
        lengths = [len(row) for row in rows]
        ids = np.full((len(rows), max(lengths)), IGNORED_TOKEN_ID, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        pixels = stacked("pixel_values")
        assert pixels is not None
        batch = PolicyBatch(
            pixels,
            torch.from_numpy(ids),
            torch.tensor(lengths) if len(set(lengths)) > 1 else None,
            stacked("state"),
            image_mask=stacked("image_mask"),
            noise=stacked("noise"),
        )
        return batch.to(next(self.module.parameters()).device)

    def token_logits(self, batch: PolicyBatch) -> Tensor | None:
        """Return None: actions are no tokens."""
        return None

    @torch.no_grad()
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes [B, horizon, dim]."""
        return self.normalized_actions(batch)

    def kept_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the other layers that reach the action, those of constants too."""
        return {n: x for n, x in linear_layers(self.module).items() if n in self._kept}

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the linear and convolution layers that carry an observation to the action.

        Found by tracing: a layer whose weight gets no gradient from the action is dead; one whose
        input does not depend on what is observed is a constant of the policy.
        """
        return {n: x for n, x in linear_layers(self.module).items() if n in self._living}

    @cached_property
    def _kept(self) -> frozenset[str]:
        """Names of the kept layers: traced once."""
        every = linear_layers(self.module).items()
        others = {name: layer for name, layer in every if not self.is_quantized(name)}
        batch = self.probe_batch()
        return frozenset(reached_layers(others, lambda: self.probe_output(batch)))

    @cached_property
    @torch.enable_grad()
    def _living(self) -> frozenset[str]:
        """Names of the layers: traced once, since every step asks for them."""
        every = linear_layers(self.module).items()
        candidates = {name: layer for name, layer in every if self.is_quantized(name)}
        batch = self.probe_batch()
        for tensor in (batch.pixel_values, batch.state, batch.noise):
            if tensor is not None:
                tensor.requires_grad_(True)
        fed: set[nn.Module] = set()

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if arguments[0].requires_grad:
                fed.add(module)

        handles = [layer.register_forward_pre_hook(note) for layer in candidates.values()]
        try:
            self.probe_output(batch)
        finally:
            for handle in handles:
                handle.remove()
        living = {name: layer for name, layer in candidates.items() if layer in fed}
        return frozenset(reached_layers(living, lambda: self.probe_output(batch)))

    def probe_batch(self) -> PolicyBatch:
        """Return a batch of one observation of nothing."""
        spec = self.processor.spec
        images = {name: np.zeros((*spec.frame_size, 3), np.uint8) for name in spec.cameras}
        state = np.zeros(spec.state_dim, np.float32)
        words = "" if spec.language == "none" else "move"
        return self.batch([Observation(images, words, state)])

    def probe_output(self, batch: PolicyBatch) -> Tensor:
        """Return what every layer that reaches the action reaches."""
        return self.normalized_actions(batch)

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter or buffer by name, as float32."""
        values: NDArray[np.float32] = self.stored_weight(name).float().numpy()
        return values

    def stored_weight(self, name: str) -> Tensor:
        """Return a parameter or buffer by name, in host memory."""
        parent, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.module.get_submodule(parent), leaf)
        return tensor.detach().cpu().contiguous()

    def as_stored(self: _Self, device: torch.device, kept: Collection[str]) -> _Self:
        """Return the policy on a device; its weights are in memory as float32."""
        self.module.to(device)
        return self

    def stored_numbers(self) -> int:
        """Return how many weights the policy acts with."""
        return sum(tensor.numel() for tensor in self.module.state_dict().values())

    def in_memory(self: _Self) -> _Self:
        """Return the policy: its weights are in memory."""
        return self

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed: nowhere, unless a family says so."""
        return ()
