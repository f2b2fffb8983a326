"""Histograms of what a policy's quantizable layers are fed, by forward hooks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn

from qvla_export.measurement.distributed import Alone, World
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, traced_layers
from qvla_export.quantizer.activation_statistics import BINS, ActivationStatistics, Histogram
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


class _Recorder:
    """Gives every distinct input tensor of a pass to one histogram."""

    def __init__(self) -> None:
        # First layer that takes an input -> all that take the same, and the input's histogram.
        self.groups: dict[str, list[str]] = {}
        self.histograms: dict[str, Histogram] = {}
        self._group_of: dict[str, str] = {}
        # Inputs of the running pass that are still alive, and who takes them.
        self._seen: list[tuple[ReferenceType[Tensor], str]] = []

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward pre-hook of one layer."""

        def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs: Tensor = arguments[0]
            self._seen = [(kept, group) for kept, group in self._seen if kept() is not None]
            shared = next((group for kept, group in self._seen if kept() is inputs), None)
            group = self._group_of.setdefault(name, shared or name)
            if shared is not None:
                if group != shared:
                    raise QvlaError(
                        f"layer {name} shares its input with {shared} in some passes only; "
                        "its activations cannot have one range"
                    )
                if name not in self.groups[group]:
                    self.groups[group].append(name)
                return
            self.groups.setdefault(group, [name])
            self._seen.append((ref(inputs), group))
            add_numbers(self.histograms.setdefault(group, Histogram()), inputs, name)

        return record


@contextlib.contextmanager
def _hooked(layers: Layers, recorder: _Recorder) -> Iterator[None]:
    """Record what layers are fed while the block runs, and not while tokens are chosen."""
    handles = [layer.register_forward_pre_hook(recorder.hook(n)) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_numbers(histogram: Histogram, values: Tensor, name: str) -> None:
    """Count the numbers of a tensor.

    Raises:
        QvlaError: a number is not finite; the message has the layer's name.
    """
    if values.numel() == 0:
        return
    sizes = values.detach().abs().flatten().float()
    largest = float(sizes.max())
    if not largest < float("inf"):
        raise QvlaError(f"layer {name} is fed NaN or infinity; the policy is broken")
    histogram.widen(largest)
    # A division by a power of two is exact.
    bins = (sizes / histogram.width).long()
    histogram.counts += torch.bincount(bins, minlength=BINS).cpu().numpy()


def _join(histograms: Sequence[Histogram], world: World) -> None:
    """Make every process's histograms those of all; no number moves between bins by rounding."""
    largest = np.zeros((world.size, len(histograms)))
    largest[world.rank] = [histogram.largest for histogram in histograms]
    of_all = world.all_reduce_sum({"largest": largest})["largest"].max(axis=0)
    for histogram, most in zip(histograms, of_all.tolist(), strict=True):
        histogram.widen(most)
    # Counts are whole numbers far below 2^53.
    counts = np.stack([histogram.counts for histogram in histograms]).astype(np.float64)
    for histogram, row in zip(
        histograms, world.all_reduce_sum({"counts": counts})["counts"], strict=True
    ):
        histogram.counts = row.astype(np.int64)


def measure_activations(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    on_progress: Callable[[int, int], None] | None = None,
    world: World | None = None,
) -> ActivationStatistics:
    """Record the inputs of all quantizable layers of the full-precision policy.

    Observations run one by one, as in the engine, so no padding is counted.

    Args:
        policy: stays as it is.
        observations: at least one.
        calibration_digest: digest of the set they came from.
        on_progress: called with (observations done, observations in all).
        world: the processes that share the observations; all get the same result as one alone.

    Raises:
        QvlaError: fewer observations than processes, a layer that is never run, an input that is
            not finite.
    """
    world = world or Alone()
    if len(observations) < world.size:
        raise QvlaError(
            "activation ranges need at least one observation a process, got "
            f"{len(observations)} for {world.size}"
        )
    layers = traced_layers(policy)
    recorder = _Recorder()
    for number in range(world.rank, len(observations), world.size):
        batch = policy.batch([observations[number]])
        with _hooked(layers, recorder), torch.no_grad():
            policy.normalized_actions(batch)
        if on_progress is not None:
            on_progress(min(number + world.size, len(observations)), len(observations))
    recorded = {name for members in recorder.groups.values() for name in members}
    if missing := sorted(set(layers) - recorded):
        raise QvlaError(f"layers that no observation runs have no activations: {missing}")
    _join(list(recorder.histograms.values()), world)
    return ActivationStatistics(
        histograms={tuple(m): recorder.histograms[g] for g, m in recorder.groups.items()},
        samples=len(observations),
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
        convolutions=frozenset(n for n, layer in layers.items() if isinstance(layer, nn.Conv2d)),
    )
