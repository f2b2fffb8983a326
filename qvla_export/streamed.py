"""First order in the memory of one stage: weights come from disk, forward once and back once.

The forward pass keeps what goes from stage to stage. The backward pass takes the stages in reverse,
runs each again from what it was given, now with a graph, and hands the gradients of the action on:
one for each probe, the same that a pass over the whole policy would bring there.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.backward import Contraction, Layers, Probes, Recorded, add_recorded, recording
from qvla_export.layer_groups import fitting_groups, layer_bytes
from qvla_export.layers import layer_shapes, traced_layers
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy
from qvla_export.stage_needs import StageNeeds, stage_needs

# Layer -> width -> its weight errors, as `backward.add_batch` takes them.
ErrorsOf = Callable[[nn.Linear | nn.Conv2d], Mapping[int, Tensor]]


@dataclass(frozen=True)
class Stream:
    """How batches go through a policy whose weights lie on disk; see `open_stream`."""

    policy: Policy
    layers: Layers
    device: torch.device
    needs: Sequence[StageNeeds]
    # Layers of each stage, in groups that are measured together.
    groups: Sequence[Sequence[Sequence[str]]]

    def add_batch(
        self,
        errors_of: ErrorsOf,
        observations: Sequence[Observation],
        probes: Probes,
        batch: int,
        sums: Mapping[str, NDArray[np.float64]],
        contraction: Contraction = "full",
    ) -> None:
        """Add the squared deviations of all layers on a batch to sums; as `backward.add_batch`."""
        runs = [_Run(_feeds(self.policy, item, self.device)) for item in observations]
        for needs in self.needs:
            with weights_in_memory(self.policy, needs.reads, self.device), torch.no_grad():
                for run in runs:
                    run.values[needs.stage.output] = run.through(needs)
        last = self.needs[-1].stage.output
        flat = torch.cat([run.values[last].reshape(1, -1) for run in runs])
        drawn, weight = probes.draw(flat, batch)
        for number, run in enumerate(runs):
            shape = run.values[last].shape
            run.gradients[last] = [probe[number].reshape(shape) for probe in drawn]
        sampled = probes.count is not None
        for needs, groups in zip(reversed(self.needs), reversed(self.groups), strict=True):
            with weights_in_memory(self.policy, needs.reads, self.device):
                for number, names in enumerate(groups):
                    group = {name: self.layers[name] for name in names}
                    errors = {name: errors_of(layer) for name, layer in group.items()}
                    for run in runs:
                        recorded, gradients = run.back(needs, group, hand_on=number == 0)
                        weights = [weight] * len(drawn)
                        add_recorded(
                            recorded, errors, gradients, weights, sampled, sums, contraction
                        )
            for run in runs:
                del run.values[needs.stage.output], run.gradients[needs.stage.output]


@dataclass
class _Run:
    """One observation on its way through the stages and back."""

    # Model inputs, and outputs of stages.
    values: dict[str, Tensor]
    # Output of a stage -> gradient of each probe's action.
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)

    def through(self, needs: StageNeeds) -> Tensor:
        """Return a stage's output."""
        output: Tensor = needs.stage.module(*(self.values[name] for name in needs.stage.inputs))
        return output

    def back(
        self, needs: StageNeeds, group: Layers, hand_on: bool
    ) -> tuple[Recorded, Callable[[int], Sequence[Tensor]]]:
        """Run a stage with a graph; return what it recorded, and what asks for the gradients.

        Args:
            needs: the stage.
            group: layers to record.
            hand_on: keep the gradients of what earlier stages made as well.
        """
        given = {name: self.values[name].detach() for name in needs.stage.inputs}
        sources = needs.made_by_others if hand_on else ()
        for name in sources:
            given[name].requires_grad_(True)
        with recording(group) as (inputs, outputs), torch.enable_grad():
            result = needs.stage.module(*given.values())
        upstream = self.gradients[needs.stage.output]
        targets = [*(outputs[name] for name in group), *(given[name] for name in sources)]

        def gradients(number: int) -> Sequence[Tensor]:
            if not targets:
                return ()
            more = number + 1 < len(upstream)
            found = torch.autograd.grad(
                result, targets, grad_outputs=upstream[number], retain_graph=more
            )
            for name, gradient in zip(sources, found[len(group) :], strict=True):
                # Each output has one reader.
                self.gradients.setdefault(name, []).append(gradient)
            return found[: len(group)]

        return Recorded(group, inputs, outputs, 1), gradients


def open_stream(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    batch_size: int,
    probes: int | None,
    widths: int,
    max_bytes: int | None,
    device: torch.device,
) -> Stream:
    """Find what every stage needs and cut its layers into groups that fit.

    At any time there are: what goes from stage to stage, of a batch; the gradients of each probe
    there; one stage's weights; of one observation, all that the stage makes; the weight errors of a
    group of its layers.

    Args:
        policy: its weights were left on disk.
        layers: of the policy.
        observations: all; the longest prompt counts.
        batch_size: observations that go through together.
        probes: of an observation; None for one of each number of the action chunk.
        widths: how many.
        max_bytes: bound; None for one group a stage.
        device: where to compute.

    Raises:
        QvlaError: a stage with one of its layers needs more than the bound.
    """
    longest = max(observations, key=lambda o: len(policy.processor.input_ids(o.instruction)))
    needs = stage_needs(policy, layers, _feeds(policy, longest, torch.device("cpu")))
    if probes is None:
        probes = policy.processor.spec.horizon * policy.processor.spec.action_dim
    largest = max(n.output_bytes for n in needs)
    kept = sum(n.output_bytes for n in needs) + 2 * probes * largest
    beside = [batch_size * kept + n.weight_bytes + n.made_bytes for n in needs]
    groups = [
        fitting_groups(layers, n.moved, widths, max_bytes, taken)
        for n, taken in zip(needs, beside, strict=True)
    ]
    return Stream(policy, layers, device, needs, groups)


def room_beside_whole(policy: Policy, batch_size: int, widths: int, max_bytes: int) -> int | None:
    """Return what a bound leaves for weight errors if the policy is in memory as a whole.

    None: not enough for its largest layer; the policy has to be streamed.

    Args:
        policy: its weights were left on disk.
        batch_size: observations that run together.
        widths: how many.
        max_bytes: the bound.
    """
    layers = traced_layers(policy)
    stages = policy.stages(1)
    made = {stage.output for stage in stages}
    feeds = {n: t for stage in stages for n, t in stage.inputs.items() if n not in made}
    needs = stage_needs(policy, layers, feeds)
    whole = 4 * sum(tensor.numel() for tensor in policy.module.state_dict().values())
    room = max_bytes - whole - batch_size * sum(n.made_bytes for n in needs)
    shapes = layer_shapes(layers)
    largest = max(
        layer_bytes(shapes[name], (batch_size * fed, batch_size * made), widths)
        for n in needs
        for name, (fed, made) in n.moved.items()
    )
    return room if room >= largest else None


@contextlib.contextmanager
def weights_in_memory(policy: Policy, names: Sequence[str], device: torch.device) -> Iterator[None]:
    """Hold some weights of a policy in memory, as float32, while the block runs.

    Args:
        policy: its weights were left on disk.
        names: of parameters and buffers.
        device: where to put them.
    """
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = policy.module.get_submodule(parent)
            empty = getattr(module, leaf)
            value = torch.from_numpy(np.ascontiguousarray(policy.read_weight(name))).to(device)
            is_parameter = isinstance(empty, nn.Parameter)
            setattr(module, leaf, nn.Parameter(value, False) if is_parameter else value)
            replaced.append((module, leaf, empty))
        yield
    finally:
        for module, leaf, empty in replaced:
            setattr(module, leaf, empty)


def _feeds(policy: Policy, observation: Observation, device: torch.device) -> dict[str, Tensor]:
    feeds = policy.processor.feeds(observation)
    return {name: torch.from_numpy(value).to(device) for name, value in feeds.items()}
