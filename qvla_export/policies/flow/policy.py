"""What a `Policy` does whose expert integrates a flow, whatever its networks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.flow.module import FlowModule, PrefixInputs
from qvla_export.policies.flow.parts import program_of, whole_parts
from qvla_export.policies.whole_policy import WholePolicy
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation
from qvla_export.shared.program import Program

_Self = TypeVar("_Self", bound="FlowPolicy")  # typing.Self needs Python 3.11
_STACKS = ("vision_tower.", "language_model.layers.", "action_expert.layers.")


@dataclass(frozen=True, repr=False)
class FlowPolicy(WholePolicy):
    """A loaded policy; see `Policy` for the meaning of its members."""

    module: FlowModule
    # Whether `normalized_actions` are what each step adds, see `step_by_step`.
    by_step: bool = field(default=False, kw_only=True)

    def step_by_step(self: _Self) -> _Self:
        """Return the policy whose `normalized_actions` are what each step of its flow adds."""
        return replace(self, by_step=True)

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one batch; note the flow where its steps are looked at."""
        batch = self.inputs(observations)
        if not self.by_step:
            return batch
        assert batch.noise is not None
        return replace(batch, flows=self.module.flows(prefix_inputs(batch), batch.noise))

    def is_quantized(self, name: str) -> bool:
        """Whether a layer is of the tower or of a stack of blocks.

        What lies between (projector or connector, projections of actions and state, layers of the
        time) is small and carries most of the damage of low widths: it stays as it is.
        """
        return name.startswith(_STACKS)

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the flow's end [B, horizon, dim], differentiable through all steps.

        Of a batch that notes the flow: what each step adds, [B, steps * horizon, dim].
        """
        assert batch.noise is not None
        if batch.flows is not None:
            moves = self.module.moves(prefix_inputs(batch), batch.flows)
            return moves[:, :, : self.processor.spec.action_dim]
        actions: Tensor = self.module(prefix_inputs(batch), batch.noise)
        return actions[:, :, : self.processor.spec.action_dim]

    def probe_output(self, batch: PolicyBatch) -> Tensor:
        """Return the flow after its first step: the others run the same layers."""
        assert batch.noise is not None
        prefix = self.module.prefix(prefix_inputs(batch))
        first = torch.zeros(1, dtype=torch.int64, device=batch.noise.device)
        moved = self.module.step(prefix, batch.noise, first)
        return moved[:, :, : self.processor.spec.action_dim]

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return the prefix and a step of the flow.

        Raises:
            CheckpointError: they are to be cut.
        """
        _require_whole(layers_per_part)
        return whole_parts(self.module, self.processor.spec)

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program: the prefix once, then a step as often as the flow has them.

        Raises:
            CheckpointError: as `parts`.
        """
        _require_whole(layers_per_part)
        return program_of(self.module.arch.flow.steps)


def prefix_inputs(batch: PolicyBatch) -> PrefixInputs:
    """Return what a batch gives the prefix."""
    return PrefixInputs(
        batch.pixel_values, batch.input_ids, batch.state, batch.image_mask, batch.prompt_lengths
    )


def _require_whole(layers_per_part: int | None) -> None:
    if layers_per_part is not None:
        raise CheckpointError(
            "a policy that integrates a flow is exported as prefix and step, not in smaller "
            "parts; leave the number of layers a part out"
        )
