"""What a `Policy` on Prismatic's two towers and Llama does, whatever its head."""

import abc
import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qvla_export.policies.base import IGNORED_TOKEN_ID, PolicyBatch
from qvla_export.policies.base_policy import BasePolicy
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.smoothing import find_migrations
from qvla_export.policies.prismatic.vision import PrismaticModule
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.reached_layers import linear_layers, reached_layers
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.observation import Observation

# Present in transformers' modules, absent from timm checkpoints.
NOT_UPSTREAM = ("vision_backbone.featurizer.embeddings.mask_token",)
_QUANTIZED_PREFIXES = ("vision_backbone.", "language_model.model.")
_ROTARY = "language_model.model.rotary_emb."
_Self = TypeVar("_Self", bound="PrismaticPolicy")  # typing.Self needs Python 3.11


@dataclass(frozen=True, repr=False)
class PrismaticPolicy(BasePolicy):
    """A loaded policy; see `Policy` for the meaning of its members."""

    module: PrismaticModule
    config: PrismaticConfig
    # Centre of each action token's bin, ordered by token id.  float32 [256]; empty without tokens.
    token_centers: Tensor
    # Where the weights lie if `module` has none of them in memory, else None.
    on_disk: CheckpointWeights | None = None

    @abc.abstractmethod
    def token_logits(self, batch: PolicyBatch) -> Tensor | None:
        """Return logits of the action's tokens [B, tokens, choices]; None without tokens."""

    def inputs(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch of model inputs."""
        pixels = np.stack([self.processor.pixel_values(o) for o in observations])
        rows = [self.processor.prompt_ids(o) for o in observations]
        lengths = [len(row) for row in rows]
        ids = np.full((len(rows), max(lengths)), IGNORED_TOKEN_ID, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        state = None
        if self.config.state_dim:
            state = torch.from_numpy(np.stack([self.processor.state(o) for o in observations]))
        ragged = torch.tensor(lengths) if len(set(lengths)) > 1 else None
        noise, law = None, self.processor.spec.noise
        if law is not None:
            noise = torch.from_numpy(np.concatenate([law.draw(o) for o in observations]))
        batch = PolicyBatch(
            torch.from_numpy(pixels), torch.from_numpy(ids), ragged, state, noise=noise
        )
        device = self.module.projector.fc1.weight.device
        # Where no weights are in memory, parts run on the CPU.
        return batch if device.type == "meta" else batch.to(device)

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the linear and convolution layers of towers and decoder that reach the action.

        Found by tracing: a layer whose weight gets no gradient from the action is dead.
        """
        return self._reached(quantized=True)

    def kept_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the other layers that reach the action: projectors, heads, FiLM."""
        return self._reached(quantized=False)

    @abc.abstractmethod
    def probe_output(self) -> Tensor:
        """Return what the head makes of an empty image and the shortest prompt."""

    @abc.abstractmethod
    def filled(self, weights: CheckpointWeights) -> PrismaticModule:
        """Return the network with its weights read."""

    def probe_inputs(self) -> tuple[Tensor, Tensor]:
        """Return an empty image and the shortest prompt, where the weights are."""
        side = isqrt(self.processor.spec.pixels)
        device = self.module.projector.fc1.weight.device
        pixels = torch.zeros(1, 6 * len(self.config.cameras), side, side, device=device)
        ids = torch.tensor([[self.config.bos_token_id, self.config.suffix_token_id]], device=device)
        return pixels, ids

    def _reached(self, quantized: bool) -> dict[str, nn.Linear | nn.Conv2d]:
        living = {n: x for n, x in linear_layers(self.module).items() if n in self._living}
        return {n: x for n, x in living.items() if n.startswith(_QUANTIZED_PREFIXES) == quantized}

    @cached_property
    def _living(self) -> frozenset[str]:
        """Names of the layers that reach the action: traced once, every step asks for them."""
        return frozenset(reached_layers(linear_layers(self.module), self.probe_output))

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter or buffer by name, as float32, from memory or the checkpoint."""
        if self.on_disk is not None and name in self.on_disk.shapes:
            tensor = torch.empty(self.on_disk.shapes[name].shape, dtype=torch.float32)
            self.on_disk.copy_to(name, tensor)
            return tensor.numpy()
        if name == "token_centers":
            centers: NDArray[np.float32] = self.token_centers.numpy()
            return centers
        if self.on_disk is not None:
            # What no checkpoint holds follows from the configuration alone.
            rotary = LlamaRotaryEmbedding(self.module.arch.llama)
            tensor = rotary.get_buffer(name.removeprefix(_ROTARY))
        else:
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(self.module.get_submodule(owner), leaf)
        values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
        return values

    def stored_weight(self, name: str) -> Tensor:
        """Return a parameter or buffer by name, in host memory, as it is stored."""
        if self.on_disk is not None and name in self.on_disk.shapes:
            return self.on_disk.read_finite(name)
        return torch.from_numpy(np.ascontiguousarray(self.read_weight(name)))

    def as_stored(self: _Self, device: torch.device, kept: Collection[str]) -> _Self:
        """Return the policy with its weights read to a device, those of `kept` as stored."""
        if self.on_disk is None:
            self.module.to(device)
            return self
        module = copy.deepcopy(self.module)
        for name, empty in [*self.module.named_parameters(), *self.module.named_buffers()]:
            parent, _, leaf = name.rpartition(".")
            if name in self.on_disk.shapes or name.startswith(_ROTARY):
                value = self.stored_weight(name)
                value = value.to(device, value.dtype if name in kept else torch.float32)
            else:  # transformers' own; nothing here reads it
                value = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
            is_parameter = isinstance(empty, nn.Parameter)
            placed = nn.Parameter(value, requires_grad=False) if is_parameter else value
            setattr(module.get_submodule(parent), leaf, placed)
        return replace(self, module=module, on_disk=None)

    def stored_numbers(self) -> int:
        """Return how many weights the checkpoint holds."""
        tensors = self.module.state_dict() if self.on_disk is None else self.on_disk.shapes
        return sum(t.numel() for name, t in tensors.items() if name not in NOT_UPSTREAM)

    def require_finite(self) -> None:
        """Refuse weights that were left on disk and are no numbers; reads one at a time.

        Raises:
            CheckpointError: naming the tensor.
        """
        if self.on_disk is not None:
            self.on_disk.require_finite()

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed."""
        return find_migrations(self.module.arch)

    def in_memory(self: _Self) -> _Self:
        """Return the policy with its weights read, if they were left on disk."""
        if self.on_disk is None:
            return self
        return replace(self, module=self.filled(self.on_disk), on_disk=None)
