"""Measure `Moments`: one recorded pass a batch, one backward pass a probe of the action."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.backward import Layers, Probes, recorded_pass
from qvla_export.distributed import World
from qvla_export.errors import QvlaError
from qvla_export.layers import as_tokens, layer_shapes, traced_layers
from qvla_export.moments import LayerMoments, Moments, block_size
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy
from qvla_export.sharded_sums import OnProgress, ShardedSums

_Sums = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class MomentSettings:
    """How to measure moments."""

    # Random signs over the action's numbers, of each observation.
    probes: int = 4
    seed: int = 0
    # Observations that run together; memory grows with it.
    batch_size: int = 8
    # Inputs or channels whose moments are kept together; of more, blocks along the diagonal. A
    # layer takes 8 * (inputs * block + channels * block) bytes while it is measured.
    largest_block: int = 4096

    def __post_init__(self) -> None:
        if min(self.probes, self.batch_size, self.largest_block) < 1:
            raise QvlaError(f"probes, batch size and block must be at least 1, got {self}")


def measure_moments(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    settings: MomentSettings = MomentSettings(),
    progress_file: Path | None = None,
    on_progress: OnProgress | None = None,
    world: World | None = None,
) -> Moments:
    """Measure the moments of every quantizable layer.

    Tokens that the action does not depend on, such as those that fill a batch's prompts up, do not
    count.

    Args:
        policy: the full-precision policy; stays as it is.
        observations: at least one.
        calibration_digest: digest of the set they came from.
        settings: probes, seed, batch size, blocks.
        progress_file: sums are saved here after each batch; a killed run goes on from it.
        on_progress: called with (observations done, observations in all).
        world: the processes that share the observations; all get the result.

    Raises:
        QvlaError: no observations, or a layer that is called more than once in a pass.
    """
    if not observations:
        raise QvlaError("moments need at least one observation, got none")
    layers = traced_layers(policy)
    identity = {
        "what": "moments",
        "policy_digest": policy.digest,
        "calibration_digest": calibration_digest,
        "observations": len(observations),
        "settings": asdict(settings),
    }
    sums = ShardedSums(_empty(layers, settings), identity, progress_file, world)
    size = settings.batch_size
    batches = list(range(-(-len(observations) // size)))
    for batch in sums.share(batches):
        chosen = observations[batch * size : (batch + 1) * size]
        _add_batch(policy, layers, chosen, batch, settings, sums.values)
        sums.mark(batch)
        if on_progress is not None:
            done = min(sums.done(batches) * size, len(observations))
            on_progress(done, len(observations))
    total = sums.total()
    return Moments(
        layers={name: _moments(total, name) for name in layers},
        samples=len(observations),
        probes=settings.probes,
        seed=settings.seed,
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
    )


def layer_tokens(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each output token is a linear map of.  [N, tokens, weights of a channel]

    Raises:
        QvlaError: a convolution in groups, whose channels do not see the same.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    if layer.groups != 1 or (isinstance(layer.padding, str) and layer.padding != "valid"):
        raise QvlaError(
            f"moments of convolutions need one group and padding in numbers, got {layer}; "
            "leave the layer out of the plan"
        )
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2)


def _empty(layers: Layers, settings: MomentSettings) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    for name, (channels, inputs) in layer_shapes(layers).items():
        found |= {
            f"{name}/tokens": np.zeros(1),
            f"{name}/weight": np.zeros(1),
            f"{name}/sum": np.zeros(inputs),
            f"{name}/weighted": np.zeros(inputs),
            f"{name}/inputs": _blocks(inputs, settings),
            f"{name}/channels": _blocks(channels, settings),
        }
    return found


def _blocks(width: int, settings: MomentSettings) -> NDArray[np.float64]:
    size = block_size(width, settings.largest_block)
    return np.zeros((-(-width // size), size, size))


def _add_batch(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    batch: int,
    settings: MomentSettings,
    sums: _Sums,
) -> None:
    """Add a batch's moments to the sums."""
    actions, inputs, outputs = recorded_pass(policy, layers, observations)
    flat = actions.reshape(len(observations), -1)
    drawn, weight = Probes(settings.probes, settings.seed).draw(flat, batch)
    targets = [outputs[name] for name in layers]
    # Layer name -> |g|^2 of each token, mean over probes.  [N * tokens]
    worths: dict[str, Tensor] = {}
    for number, probe in enumerate(drawn):
        more = number + 1 < len(drawn)
        found = torch.autograd.grad(flat, targets, grad_outputs=probe, retain_graph=more)
        for (name, layer), gradient in zip(layers.items(), found, strict=True):
            tokens = as_tokens(layer, gradient).flatten(0, 1)
            _add_products(sums[f"{name}/channels"], tokens, tokens * weight)
            worth = weight * tokens.square().sum(dim=1)
            worths[name] = worths[name] + worth if number else worth
    for name, layer in layers.items():
        _add_inputs(sums, name, layer_tokens(layer, inputs.pop(name)).flatten(0, 1), worths[name])


def _add_inputs(sums: _Sums, name: str, tokens: Tensor, worth: Tensor) -> None:
    """Add tokens [n, inputs] of a layer, each of a worth [n]."""
    counted = tokens[worth > 0]
    weighted = tokens * worth[:, None]
    sums[f"{name}/tokens"] += len(counted)
    sums[f"{name}/weight"] += float(worth.double().sum())
    sums[f"{name}/sum"] += counted.double().sum(dim=0).cpu().numpy()
    sums[f"{name}/weighted"] += weighted.double().sum(dim=0).cpu().numpy()
    _add_products(sums[f"{name}/inputs"], tokens, weighted)


def _add_products(blocks: NDArray[np.float64], left: Tensor, right: Tensor) -> None:
    """Add left^T right, [n, width] each, to the blocks along its diagonal."""
    size = blocks.shape[1]
    parts = zip(blocks, torch.split(left, size, 1), torch.split(right, size, 1), strict=True)
    for block, one, other in parts:
        inside = one.shape[1]
        block[:inside, :inside] += (one.T @ other).double().cpu().numpy()


def _moments(sums: _Sums, name: str) -> LayerMoments:
    """Means and central moments of a layer's sums; of one without any effect, zeros."""
    tokens, worth = float(sums[f"{name}/tokens"][0]), float(sums[f"{name}/weight"][0])
    mean = sums[f"{name}/sum"] / max(tokens, 1.0)
    weighted = sums[f"{name}/weighted"] / (worth or 1.0)
    blocks = sums[f"{name}/inputs"] / (worth or 1.0)
    size = blocks.shape[1]
    for number, block in enumerate(blocks):
        inside = slice(number * size, min((number + 1) * size, len(mean)))
        width = inside.stop - inside.start
        cross = np.outer(weighted[inside], mean[inside])
        block[:width, :width] -= cross + cross.T - np.outer(mean[inside], mean[inside])
        block[:] = (block + block.T) / 2
    channels = sums[f"{name}/channels"] / max(tokens, 1.0)
    return LayerMoments(
        mean.astype(np.float32),
        weighted.astype(np.float32),
        blocks.astype(np.float32),
        ((channels + channels.transpose(0, 2, 1)) / 2).astype(np.float32),
    )
