"""What every `Policy` does, however its weights are read."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qvla_export.policies.base import PolicyBatch, PolicyPart, no_flow
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.clock import SpanClock
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor
from qvla_export.shared.program import Program

_Self = TypeVar("_Self", bound="BasePolicy")  # typing.Self needs Python 3.11


@dataclass(frozen=True, repr=False)
class BasePolicy(abc.ABC):
    """A loaded policy; see `Policy` for the meaning of its members."""

    module: nn.Module
    processor: Processor
    digest: str

    def __repr__(self) -> str:
        size, spec = sum(p.numel() for p in self.module.parameters()), self.processor.spec
        return (
            f"<{type(self).__name__}: {size / 1e6:.1f} million weights, "
            f"cameras {', '.join(spec.cameras)}, {spec.horizon} actions of "
            f"{spec.action_dim} dimensions, {self.digest[:12]}>"
        )

    @abc.abstractmethod
    def inputs(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch; the network does not run."""

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch, with what a kind of policy notes."""
        return self.inputs(observations)

    @abc.abstractmethod
    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return normalized actions [B, horizon, dim], differentiable."""

    def step_by_step(self: _Self) -> _Self:
        """Refuse: there is no flow, unless a family says so.

        Raises:
            CheckpointError: always.
        """
        raise no_flow()

    @abc.abstractmethod
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes [B, horizon, dim]."""

    @abc.abstractmethod
    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return the parts of the executed policy, from model inputs to "actions"."""

    @abc.abstractmethod
    def program(self, layers_per_part: int | None = None) -> Program:
        """Return how the parts of `parts(layers_per_part)` run for one action."""

    @torch.no_grad()
    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation."""
        clock = SpanClock()
        with clock.span("preprocess"):
            batch = self.inputs([observation])
        with clock.span("engine"):
            actions, tokens = self.acted(batch)
            normalized = actions[0].cpu().numpy()
        chosen = () if tokens is None else tokens[0].tolist()
        return self.processor.chunk(normalized, clock.timing_ms, observation.state, chosen)

    def acted(self, batch: PolicyBatch) -> tuple[Tensor, Tensor | None]:
        """Return the greedy actions, and the tokens that the next prompt may repeat.

        [B, horizon, dim]; int64 [B, tokens], None where no prompt repeats any.
        """
        return self.greedy_actions(batch), None
