"""Measure `Moments`: one recorded pass a batch, one backward pass a probe of the action.

Weights that were left on disk are read part by part (`measurement.streamed`). What is summed is
in memory throughout: 8 bytes for each number of the blocks.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.measurement.backward import Pass, ProbedBatch, Probes, probed_pass
from qvla_export.measurement.distributed import Alone, World
from qvla_export.measurement.moment_bounds import (
    DEFAULT_MOMENTS,
    MomentSettings,
    moment_sums,
    open_moment_stream,
)
from qvla_export.measurement.sharded_sums import OnProgress, ShardedSums
from qvla_export.measurement.streamed import Stream
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layer, Layers, as_tokens, traced_layers, weights_on_disk
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_Sums = Mapping[str, NDArray[np.float64]]
# Among the sums, of each observation; no layer has this name.
ENERGIES = "#energies"


def measure_moments(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    settings: MomentSettings = DEFAULT_MOMENTS,
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
        settings: probes, seed, batch size, blocks, bound of memory.
        progress_file: sums are saved here after each batch; a killed run goes on from it.
        on_progress: called with (observations done, observations in all).
        world: the processes that share the observations; all get the result.

    Raises:
        QvlaError: no observations, a convolution that is called more than once in a pass, or
            a layer that exceeds the bound of memory.
    """
    if not observations:
        raise QvlaError("moments need at least one observation, got none")
    layers, world = traced_layers(policy), world or Alone()
    stream = None
    if weights_on_disk(policy):
        stream = open_moment_stream(policy, layers, observations, settings, world)
    identity = {
        "what": "moments",
        "policy_digest": policy.digest,
        "calibration_digest": calibration_digest,
        "observations": len(observations),
        "settings": settings.stated(),
    }
    empty = {**moment_sums(layers, settings), ENERGIES: np.zeros(len(observations))}
    sums = ShardedSums(empty, identity, progress_file, world)
    size = settings.batch_size
    batches = list(range(-(-len(observations) // size)))
    for batch in sums.share(batches):
        chosen = observations[batch * size : (batch + 1) * size]
        probed = ProbedBatch(chosen, Probes(settings.probes, settings.seed), batch)
        first = batch * size
        sums.values[ENERGIES][first : first + len(chosen)] += _add_batch(
            policy, layers, probed, stream, sums.values
        )
        sums.mark(batch)
        if on_progress is not None:
            done = min(sums.done(batches) * size, len(observations))
            on_progress(done, len(observations))
    total = sums.total()
    sums.values.clear()
    return Moments(
        layers={name: layer_moments(total, name) for name in layers},
        samples=len(observations),
        probes=settings.probes,
        seed=settings.seed,
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
        energies=tuple(total[ENERGIES].tolist()),
    )


def _add_batch(
    policy: Policy, layers: Layers, batch: ProbedBatch, stream: Stream | None, sums: _Sums
) -> NDArray[np.float64]:
    """Add a batch's moments to the sums; with a stream, the weights come from disk.

    Returns:
        What `add_pass` does, of all layers.  [B]
    """
    if stream is None:
        return add_pass(probed_pass(policy, layers, batch), sums)
    energies = np.zeros(len(batch.observations))
    for _, passes in stream.passes(batch):
        for number, item in enumerate(passes):
            energies[number] += add_pass(item, sums)[0]
            del item  # the next pass is made before the name is bound anew
    return energies


def layer_tokens(layer: Layer, inputs: Tensor) -> Tensor:
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


def add_pass(probed: Pass, sums: _Sums) -> NDArray[np.float64]:
    """Add the moments of recorded layers to the sums, each observation by `_image_shares`.

    Returns:
        |g|^2 |x|^2 of each observation, summed over tokens and layers, mean over probes.  [B]
    """
    layers, inputs = probed.recorded.layers, probed.recorded.inputs
    energies = np.zeros(probed.recorded.count)
    # Layer name -> |x|^2 of each token.  [N, tokens]
    powers = {name: _powers(layer, inputs[name]) for name, layer in layers.items()}
    # Layer name -> |g|^2 of each token, mean over probes.  [N * tokens]
    worths: dict[str, Tensor] = {}
    for number, weight in enumerate(probed.weights):
        for (name, layer), gradient in zip(layers.items(), probed.gradients(number), strict=True):
            tokens = as_tokens(layer, gradient)
            worth = tokens.square().sum(dim=-1)
            own = _of_observations(worth * powers[name], len(energies))
            energies += weight * own.cpu().numpy()
            share = weight * _image_shares(own, len(tokens)).to(tokens)
            flat = tokens.flatten(0, 1)
            _add_products(sums[f"{name}/channels"], flat, (tokens * share).flatten(0, 1))
            worth = (worth * share[..., 0]).flatten()
            worths[name] = worths[name] + worth if number else worth
    for name, layer in layers.items():
        tokens = layer_tokens(layer, inputs.pop(name)).flatten(0, 1)
        _add_inputs(sums, name, tokens, worths[name])
    return energies


def pass_energies(probed: Pass, names: Collection[str]) -> NDArray[np.float64]:
    """Return what `add_pass` does, of some layers of a pass, and add nothing.  float64 [B]"""
    layers, recorded = probed.recorded.layers, probed.recorded
    powers = {name: _powers(layers[name], recorded.inputs.pop(name)) for name in names}
    energies = np.zeros(recorded.count)
    for number, weight in enumerate(probed.weights):
        for (name, layer), gradient in zip(layers.items(), probed.gradients(number), strict=True):
            if name in powers:
                worth = as_tokens(layer, gradient).square().sum(dim=-1)
                own = _of_observations(worth * powers[name], recorded.count)
                energies += weight * own.cpu().numpy()
    return energies


def _of_observations(energies: Tensor, count: int) -> Tensor:
    """Add up what the tokens of each of `count` observations have.  [N, tokens] -> float64 [B]"""
    return energies.double().reshape(count, -1).sum(dim=1)


def _powers(layer: Layer, inputs: Tensor) -> Tensor:
    """Return |x|^2 of what each output token is a linear map of.  [N, tokens]"""
    lengths: Tensor = torch.linalg.vector_norm(layer_tokens(layer, inputs), dim=-1)
    return lengths.square()


def _image_shares(energies: Tensor, images: int) -> Tensor:
    """Return what each image's squares count in a layer's moments.

    Where an action is about to become another one, its gradients are tens of times those of other
    observations, and their squares would be nearly all that moments are of. There first order does
    not hold either: the action goes over and no further. So each observation's squares are divided
    by the root of its energy.

    Args:
        energies: |g|^2 |x|^2 of each observation's tokens under one probe.  [B]
        images: of all observations, each of as many.

    Returns:
        [images, 1, 1]
    """
    shares = torch.where(energies > 0, energies, torch.inf).rsqrt()
    return shares.repeat_interleave(images // len(energies))[:, None, None]


def _add_inputs(sums: _Sums, name: str, tokens: Tensor, worth: Tensor) -> None:
    """Add tokens [n, inputs] of a layer, each of a worth [n]."""
    sums[f"{name}/tokens"] += int((worth > 0).sum())
    sums[f"{name}/weight"] += float(worth.double().sum())
    weighted = tokens * worth[:, None]
    sums[f"{name}/weighted"] += weighted.sum(dim=0, dtype=torch.float64).cpu().numpy()
    _add_products(sums[f"{name}/inputs"], tokens, weighted)


def _add_products(blocks: NDArray[np.float64], left: Tensor, right: Tensor) -> None:
    """Add left^T right, [n, width] each, to the blocks along its diagonal."""
    size = blocks.shape[1]
    parts = zip(blocks, torch.split(left, size, 1), torch.split(right, size, 1), strict=True)
    for block, one, other in parts:
        inside = one.shape[1]
        block[:inside, :inside] += (one.T @ other).double().cpu().numpy()


def layer_moments(sums: dict[str, NDArray[np.float64]], name: str) -> LayerMoments:
    """Mean and central moments of a layer's sums, which are used up; without effect zeros."""
    tokens, worth = float(sums[f"{name}/tokens"][0]), float(sums[f"{name}/weight"][0])
    mean = sums.pop(f"{name}/weighted") / (worth or 1.0)
    blocks = sums.pop(f"{name}/inputs")
    blocks /= worth or 1.0
    size = blocks.shape[1]
    for number, block in enumerate(blocks):
        inside = slice(number * size, min((number + 1) * size, len(mean)))
        width = inside.stop - inside.start
        block[:width, :width] -= np.outer(mean[inside], mean[inside])
        block[:] = (block + block.T) / 2
    channels = sums.pop(f"{name}/channels")
    channels /= max(tokens, 1.0)
    return LayerMoments(
        mean.astype(np.float32),
        blocks.astype(np.float32),
        ((channels + channels.transpose(0, 2, 1)) / 2).astype(np.float32),
    )
