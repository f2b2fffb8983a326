"""Run a policy again with single channels changed, computing only what they can change.

The first pass records every module that maps a batch to a batch. A partial pass with some channels
of one layer changed runs several of them side by side, as repetitions of the batch: whatever ended
before the layer began returns its recorded output, the layer adds the changed channels' difference
to its own, and whatever comes after it runs only where its inputs differ. A layer that runs several
times, as in the steps of a flow, is changed in each of them. Weights are never touched.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from qvla_export.measurement.raised_weights import restore_forward
from qvla_export.policies.base import Policy, PolicyBatch
from qvla_export.policies.layers import Layers, apply_rows, as_tokens


@dataclass(frozen=True)
class _Recorded:
    """What a module did in one call of the reference pass."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    # When it was called and when it returned, counted in calls and returns.
    began: int
    ended: int


@dataclass(frozen=True)
class _Change:
    """Rows added to channels of one layer, each in a repetition of its own."""

    layer: str
    # int64 [repetitions]
    channels: Tensor
    # float32 [repetitions, inputs]
    rows: Tensor


class PartialForward:
    """The recorded pass of one batch; see `recorded`."""

    def __init__(self, policy: Policy, layers: Layers, batch: PolicyBatch) -> None:
        self._policy = policy
        self._layers = layers
        self._batch = batch
        # Name of a module -> its calls, in order.
        self._records: dict[str, list[_Recorded]] = {}
        # Modules that do not map a batch to a batch.
        self._unfit: set[str] = set()
        self._change: _Change | None = None
        # Calls and returns so far: in a partial pass, of the reference pass that it repeats.
        self._clock = 0
        # Normalized actions of the reference pass.  float32 [B, outputs]
        self.reference = torch.zeros(0)

    def deviations(self, layer: str, channels: Sequence[int], rows: Tensor) -> Tensor:
        """Return the squared action deviation of each change by itself.

        Args:
            layer: its name.
            channels: of the layer.
            rows: what each channel's weights gain.  float32 [len(channels), inputs]

        Returns:
            ||dA||^2 of each observation.  float64 [len(channels), B]
        """
        count = len(channels)
        indices = torch.tensor(list(channels), device=rows.device)
        self._change, self._clock = _Change(layer, indices, rows), 0
        try:
            actions = self._policy.normalized_actions(_repeated(self._batch, count))
        finally:
            self._change = None
        moved = actions.reshape(count, len(self._batch), -1) - self.reference
        return moved.double().square().sum(dim=-1)

    def record(self) -> None:
        """Run the reference pass; the stand-ins must be in place."""
        actions = self._policy.normalized_actions(self._batch)
        self.reference = actions.reshape(len(self._batch), -1)

    def stand_in(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return what stands in for a module's forward."""
        original = module.forward

        def run(*arguments: Any, **named: Any) -> Any:
            if self._change is None:
                return self._recording(name, original, arguments, named)
            known = self._known(name)
            if known is None:
                return original(*arguments, **named)
            output = self._partial(name, known, original, arguments, named)
            self._clock = known.ended + 1
            return output

        return run

    def _known(self, name: str) -> _Recorded | None:
        """Return the call of the reference pass that a module repeats now; None if unknown."""
        calls = self._records.get(name, ())
        number = bisect.bisect_left(calls, self._clock, key=lambda call: call.began)
        return calls[number] if number < len(calls) else None

    def _partial(
        self, name: str, known: _Recorded, original: Callable[..., Any], arguments: Any, named: Any
    ) -> Any:
        """Return a module's output in a partial pass, computed only where it may differ."""
        change = self._change
        assert change is not None
        count, changed = len(change.channels), self._records[change.layer]
        # Calls of the changed layer within this one.
        inside = bisect.bisect_left(changed, known.ended, key=lambda call: call.began)
        inside -= bisect.bisect_left(changed, known.began + 1, key=lambda call: call.began)
        if inside:
            return original(*arguments, **named)
        same = known.ended < changed[0].began or _equal(
            _tensors((arguments, named)), known.inputs, count
        )
        if name == change.layer:
            layer = self._layers[name]
            if known.began == changed[0].began or same:
                return _changed(layer, known, change)
            return _changed_again(layer, arguments[0], original(*arguments, **named), change)
        return _expanded(known.output, count) if same else original(*arguments, **named)

    def _recording(
        self, name: str, original: Callable[..., Any], arguments: Any, named: Any
    ) -> Any:
        began, self._clock = self._clock, self._clock + 1
        output = original(*arguments, **named)
        ended, self._clock = self._clock, self._clock + 1
        inputs = _tensors((arguments, named))
        first = arguments[0] if arguments else None
        maps_batches = (
            isinstance(output, Tensor)
            and isinstance(first, Tensor)
            and output.ndim > 1
            and first.shape[:1] == output.shape[:1]
        )
        if not maps_batches:
            self._unfit.add(name)
        if name in self._unfit:
            self._records.pop(name, None)
        else:
            self._records.setdefault(name, []).append(_Recorded(inputs, output, began, ended))
        return output


@contextlib.contextmanager
def recorded(policy: Policy, layers: Layers, batch: PolicyBatch) -> Iterator[PartialForward]:
    """Run a batch and yield what runs it partially; the policy is as before when the block ends.

    Args:
        policy: computes in float32; called without gradients.
        layers: whose channels may be changed.
        batch: of any size; leads the tensors between modules.
    """
    forward = PartialForward(policy, layers, batch)
    names = {module: name for name, module in layers.items()}
    replaced: list[tuple[Any, Any]] = []
    try:
        for name, module in policy.module.named_modules():
            # Without parameters there is little to save, and tables of positions have no batch.
            if module is policy.module or next(module.parameters(), None) is None:
                continue
            before = vars(module).get("forward")
            module.forward = forward.stand_in(names.get(module, name), module)
            replaced.append((module, before))
        with torch.no_grad():
            forward.record()
            yield forward
    finally:
        for module, before in replaced:
            restore_forward(module, before)


def _changed(layer: nn.Linear | nn.Conv2d, known: _Recorded, change: _Change) -> Tensor:
    """The layer's outputs, each repetition with its channel changed."""
    count = len(change.channels)
    added = apply_rows(layer, known.inputs[0], change.rows)  # [N, tokens, repetitions]
    outputs = _expanded(known.output, count)
    tokens = as_tokens(layer, outputs)
    by_repetition = tokens.reshape(count, -1, *tokens.shape[1:])
    for repetition, channel in enumerate(change.channels.tolist()):
        by_repetition[repetition, ..., channel] += added[..., repetition]
    return outputs


def _changed_again(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, outputs: Tensor, change: _Change
) -> Tensor:
    """The layer's outputs for inputs that differ already, each repetition with its channel changed.

    Args:
        layer: the layer.
        inputs: [repetitions * N, ...]
        outputs: of the unchanged layer; changed in place.
        change: rows and channels.
    """
    count = len(change.channels)
    fed = inputs.reshape(count, -1, *inputs.shape[1:])
    tokens = as_tokens(layer, outputs)
    by_repetition = tokens.reshape(count, -1, *tokens.shape[1:])
    for repetition, channel in enumerate(change.channels.tolist()):
        row = change.rows[repetition : repetition + 1]
        by_repetition[repetition, ..., channel] += apply_rows(layer, fed[repetition], row)[..., 0]
    return outputs


def _expanded(output: Tensor, count: int) -> Tensor:
    """Repeat a batch; a copy, contiguous."""
    return output.repeat(count, *[1] * (output.ndim - 1))


def _repeated(batch: PolicyBatch, count: int) -> PolicyBatch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: _expanded(t, count) for n, t in tensors.items() if t is not None})


def _equal(inputs: Sequence[Tensor], known: Sequence[Tensor], count: int) -> bool:
    """Whether inputs are the recorded ones, repeated where they lead with the batch."""
    if len(inputs) != len(known):
        return False
    for found, expected in zip(inputs, known, strict=True):
        if found.shape == expected.shape:
            if not torch.equal(found, expected):
                return False
        elif found.shape != (count * expected.shape[0], *expected.shape[1:]):
            return False
        else:
            repetitions = found.reshape(count, *expected.shape)
            # Mostly the first one already differs.
            if not all(torch.equal(repetitions[i], expected) for i in range(count)):
                return False
    return True


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors among arguments, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return ()
    return tuple(tensor for item in value for tensor in _tensors(item))
