"""pi0 and pi0.5 as a `Policy`: load a checkpoint, integrate the flow, act."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.pi.checkpoint import load_module
from qvla_export.policies.pi.config import PiConfig, load_config
from qvla_export.policies.pi.loading import checkpoint_digest, load_processor
from qvla_export.policies.pi.module import PiModule, PrefixInputs
from qvla_export.policies.pi.parts import program_of, whole_parts
from qvla_export.policies.pi.smoothing import find_migrations
from qvla_export.policies.prismatic.network import fill_network
from qvla_export.policies.prismatic.policy import IGNORED_TOKEN_ID
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.clock import SpanClock
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor
from qvla_export.shared.program import Program

# Towers and stacks of blocks. Projector, action and state projections and the time's layers are
# small and carry most of the damage of low widths: they stay as they are.
_QUANTIZED_PREFIXES = ("vision_tower.", "language_model.layers.", "action_expert.layers.")
_TIME_TABLE = "time_table"


@dataclass(frozen=True, repr=False)
class PiPolicy:
    """A loaded pi0 or pi0.5 policy; see `Policy` for the meaning of its members."""

    module: PiModule
    processor: Processor
    config: PiConfig
    digest: str
    # Where the weights lie if `module` has none of them in memory, else None.
    on_disk: CheckpointWeights | None = None

    def __repr__(self) -> str:
        size, spec = sum(p.numel() for p in self.module.parameters()), self.processor.spec
        name = "pi0.5" if self.module.arch.adaptive else "pi0"
        return (
            f"<{name}: {size / 1e6:.1f} million weights, cameras {', '.join(spec.cameras)}, "
            f"{spec.horizon} actions of {spec.action_dim} dimensions in "
            f"{self.module.arch.flow.steps} steps, {self.digest[:12]}>"
        )

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch, with the noise that each begins with."""
        feeds = [self.processor.feeds(observation) for observation in observations]
        rows = [item["input_ids"][0] for item in feeds]
        lengths = [len(row) for row in rows]
        ids = np.full((len(rows), max(lengths)), IGNORED_TOKEN_ID, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row

        def stacked(name: str) -> Tensor | None:
            if name not in feeds[0]:
                return None
            return torch.from_numpy(np.concatenate([item[name] for item in feeds]))

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
        device = self.module.action_in_proj.weight.device
        # Where no weights are in memory, parts run on the CPU.
        return batch if device.type == "meta" else batch.to(device)

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the flow's end [B, horizon, dim], differentiable through all steps.

        Raises:
            CheckpointError: the weights were left on disk.
        """
        if self.on_disk is not None:
            raise CheckpointError(
                "a policy that integrates a flow must be in memory to act; open it whole"
            )
        assert batch.noise is not None
        inputs = PrefixInputs(
            batch.pixel_values,
            batch.input_ids,
            batch.state,
            batch.image_mask,
            batch.prompt_lengths,
        )
        actions: Tensor = self.module(inputs, batch.noise)
        return actions[:, :, : self.processor.spec.action_dim]

    @torch.no_grad()
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes [B, horizon, dim]."""
        return self.normalized_actions(batch)

    @torch.enable_grad()
    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the layers of tower, language model and expert that reach the action.

        Found by tracing one step: a layer whose weight gets no gradient is dead.
        """
        candidates = {
            name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            and name.startswith(_QUANTIZED_PREFIXES)
            and not name.endswith(".dense")
        }
        weights = [layer.weight for layer in candidates.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            gradients = torch.autograd.grad(self._probe().sum(), weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        reached = zip(candidates.items(), gradients, strict=True)
        return {name: layer for (name, layer), gradient in reached if gradient is not None}

    def _probe(self) -> Tensor:
        """Return what a step makes of an empty image and the shortest prompt."""
        arch, spec = self.module.arch, self.processor.spec
        device, side = self.module.action_in_proj.weight.device, arch.image_side
        inputs = PrefixInputs(
            torch.zeros(1, 3 * len(spec.cameras), side, side, device=device),
            torch.ones(1, 2, dtype=torch.int64, device=device),
            torch.zeros(1, arch.state_width, device=device) if arch.state_width else None,
        )
        flow = torch.zeros(1, spec.horizon, arch.action_width, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        moved = self.module.step(self.module.prefix(inputs), flow, index)
        return moved[:, :, : spec.action_dim]

    @torch.no_grad()
    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation."""
        clock = SpanClock()
        with clock.span("preprocess"):
            batch = self.batch([observation])
        with clock.span("engine"):
            normalized = self.greedy_actions(batch)[0].cpu().numpy()
        return self.processor.chunk(normalized, clock.timing_ms)

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return the prefix and a step of the flow.

        Raises:
            CheckpointError: they are to be cut.
        """
        if layers_per_part is not None:
            raise CheckpointError(
                "a policy that integrates a flow is exported as prefix and step, not in smaller "
                "parts; leave the number of layers a part out"
            )
        return whole_parts(self.module, self.processor.spec)

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program: the prefix once, then a step as often as the flow has them."""
        return program_of(self.parts(layers_per_part), self.module.arch.flow.steps)

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter or buffer by name, as float32, from memory or the checkpoint."""
        values: NDArray[np.float32] = self.stored_weight(name).float().numpy()
        return values

    def stored_weight(self, name: str) -> Tensor:
        """Return a parameter or buffer by name, in host memory, as it is stored."""
        if name == _TIME_TABLE:
            arch = self.module.arch
            return torch.from_numpy(arch.flow.time_table(arch.expert.width))
        if self.on_disk is not None:
            return self.on_disk.read_finite(name)
        return self.module.get_parameter(name).detach().cpu()

    def as_stored(self, device: torch.device, kept: Collection[str]) -> "PiPolicy":
        """Return the policy with its weights on a device; in memory they are all float32."""
        policy = self.in_memory()
        policy.module.to(device)
        return policy

    def stored_numbers(self) -> int:
        """Return how many weights the checkpoint holds."""
        tensors = self.module.state_dict() if self.on_disk is None else self.on_disk.shapes
        return sum(tensor.numel() for tensor in tensors.values())

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed."""
        return find_migrations(self.module.arch)

    def in_memory(self) -> "PiPolicy":
        """Return the policy with its weights read, if they were left on disk."""
        if self.on_disk is None:
            return self
        arch = self.module.arch
        module = fill_network(lambda: PiModule(arch), self.on_disk)
        return replace(self, module=module, on_disk=None)


def load_pi_policy(
    checkpoint: Path,
    unnorm_key: str | None = None,
    config: PiConfig | None = None,
    resident: bool = True,
) -> PiPolicy:
    """Load a pi0 or pi0.5 checkpoint folder of openpi's or LeRobot's layout.

    Args:
        checkpoint: folder with config.json, weights, statistics and tokenizer.json.
        unnorm_key: data set whose statistics are used (openpi's asset); None if only one.
        config: what the policy sees and returns; None reads it from the folder.
        resident: False leaves the weights on disk: the policy can be looked at, not run.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    config = config or load_config(checkpoint, None, unnorm_key)
    module, weights = load_module(checkpoint, config.vision_heads, config.flow, resident)
    processor = load_processor(checkpoint, config, module.arch, unnorm_key)
    digest = checkpoint_digest(checkpoint, config, processor.statistics.key)
    return PiPolicy(module, processor, config, digest, None if resident else weights)


def check_pi_checkpoint(checkpoint: Path, unnorm_key: str | None, config: PiConfig) -> None:
    """Refuse what `load_pi_policy` would refuse, in the memory of one tensor.

    Raises:
        CheckpointError, StatisticsError: as `load_pi_policy`.
    """
    policy = load_pi_policy(checkpoint, unnorm_key, config, resident=False)
    if policy.on_disk is not None:
        policy.on_disk.require_finite()
