"""The interface the method is written against: a loaded policy and a batch of its inputs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.policies.smoothing import Migration
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor
from qvla_export.shared.program import Program

# Fills rows of a ragged batch; what stands there is never attended to.
IGNORED_TOKEN_ID = 1


@dataclass(frozen=True)
class PolicyBatch:
    """Model inputs of several observations."""

    # float32 [B, 6 * images, S, S]
    pixel_values: Tensor
    # Prompt tokens, rows padded at the end.  int64 [B, L]
    input_ids: Tensor
    # Tokens of each row's prompt; None if all rows have L.  int64 [B]
    prompt_lengths: Tensor | None
    # Normalized state; None where the policy takes none.  float32 [B, n]
    state: Tensor | None
    # Action tokens that the policy chose with the weights it had when the batch was made; None
    # where it does not decode.  int64 [B, n]
    tokens: Tensor | None = None
    # What each choice of a token got then; None where the policy does not decode.  float32
    # [B, n, choices]
    shares: Tensor | None = None
    # Cameras that are there; None where none may be absent.  bool [B, images]
    image_mask: Tensor | None = None
    # What a flow begins at, or tokens are drawn by; None for a policy without.  float32 [B, ...]
    noise: Tensor | None = None
    # Where the flow stood before each step, with the weights that the policy had when the batch was
    # made; None unless its steps are looked at one by one.  float32 [B, steps, horizon, n]
    flows: Tensor | None = None

    def __len__(self) -> int:
        return self.pixel_values.shape[0]

    def to(self, device: torch.device) -> "PolicyBatch":
        """Return the batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v if v is None else v.to(device) for n, v in values.items()}
        return PolicyBatch(**moved)


@dataclass(frozen=True)
class PolicyPart:
    """A piece of a policy that is traced by itself; its inputs may be earlier parts' outputs."""

    name: str
    # Takes the inputs in their order and returns its output, or a tuple of several. Parameters are
    # named as the policy's, behind "module.".
    module: nn.Module
    # Input name -> example, batch size 1.
    inputs: Mapping[str, Tensor]
    # Output name -> axis -> name of a size that may vary.
    outputs: Mapping[str, Mapping[int, str]]
    # Input name -> axis -> name of a size that may vary: "prompt" (tokens) or "prompt+N"; within a
    # program's loop also another, which then is the same wherever the part names it.
    dynamic: Mapping[str, Mapping[int, str]]

    @property
    def output(self) -> str:
        """Name of the only output."""
        (name,) = self.outputs
        return name


class Policy(Protocol):
    """A loaded VLA: preprocess, differentiable normalized action, quantizable layers."""

    @property
    def digest(self) -> str:
        """SHA-256 over the checkpoint's files; artifacts record it."""
        ...

    @property
    def processor(self) -> Processor:
        """Observation to model inputs, normalized actions to robot actions."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network: float32, eval mode, gradients off for all parameters.

        On device "meta", without numbers, where the policy was opened without loading it.
        """
        ...

    def inputs(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch; the network does not run."""
        ...

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch.

        A policy that decodes also notes the tokens it chooses now, with the weights it has:
        `normalized_actions` is teacher-forced on them, whatever happens to the weights later.
        """
        ...

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return normalized actions [B, horizon, dim], differentiable in weights and activations.

        Token policies return the expected bin centre under the softmax over action tokens, given
        the batch's tokens before it; where tokens only stand for a plan, what is decoded of the
        batch's, moved as their expectation moves.
        """
        ...

    def token_logits(self, batch: PolicyBatch) -> Tensor | None:
        """Return the logits of the tokens that stand for an action [B, tokens, choices].

        Each is given the batch's tokens before it, where the policy decodes. None for a policy
        whose actions are no tokens.
        """
        ...

    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes [B, horizon, dim]; no gradients."""
        ...

    def layers(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """Return the quantizable layers that reach the action, by module name, in forward order."""
        ...

    def kept_layers(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """Return the layers that reach the action and that no plan quantizes, by module name.

        They stay in 16 bits, or in float32 where 16 would round: projectors, heads, layers of state
        and time. See `quantizer.layer_names.WHY_KEPT`.
        """
        ...

    def step_by_step(self) -> "Policy":
        """Return the policy whose `normalized_actions` are what each step of its flow adds.

        [B, steps * horizon, dim], each step beginning where the batch's own flow stood: what
        happens to weights in one step does not reach the next.

        Raises:
            CheckpointError: it integrates no flow.
        """
        ...

    def parts(self, layers_per_part: int | None = None) -> Sequence[PolicyPart]:
        """Return the parts of the executed policy, from model inputs to "actions".

        None gives as few parts as the program needs; a number cuts the decoder into runs of that
        many blocks.
        """
        ...

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return how the parts of `parts(layers_per_part)` run for one action."""
        ...

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter or buffer of `module` by name, as float32."""
        ...

    def stored_weight(self, name: str) -> Tensor:
        """Return a parameter or buffer of `module` by name, in host memory, as it is stored."""
        ...

    def as_stored(self, device: torch.device, kept: Collection[str]) -> "Policy":
        """Return the policy with its weights read to a device, some as they are stored.

        It computes only where these are raised, see `measurement.raised_weights`.

        Args:
            device: where to put the weights.
            kept: names of the parameters that keep their type; the others become float32.
        """
        ...

    def stored_numbers(self) -> int:
        """Return how many weights the checkpoint holds; `qvla real-size` states their bytes."""
        ...

    def in_memory(self) -> "Policy":
        """Return the policy with its weights read, if they were left on disk."""
        ...

    def migrations(self) -> Sequence[Migration]:
        """Return the inputs whose factors something linear before them can take over."""
        ...

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation, with the milliseconds of each span."""
        ...


def no_flow() -> CheckpointError:
    """Return the error of a policy whose steps cannot be looked at one by one."""
    return CheckpointError(
        "only the steps of a flow are measured one by one, and this policy integrates none; leave "
        "--per-step out"
    )
