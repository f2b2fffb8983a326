"""Sensitivities of all channels and widths to first order, one backward pass a probe.

Quantizing channel c of a layer changes its output at token t by E[t, c] = x_t . dW_c, and the
normalized action by dA = sum_t J[t, c] E[t, c] to first order. For a probe v over the action's
numbers, one backward pass gives g = d(v . A)/dY, hence v . dA = sum_t g[t, c] E[t, c] for every
channel at once; random signs v give E_v[(v . dA)^2] = ||dA||^2, and so does the sum over all unit
vectors. Neither the norm product of eq. 6 nor the isotropic noise of appendix G is assumed; both
can be had for comparison.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from qvla_export.measurement.backward import (
    Contraction,
    ProbedBatch,
    Probes,
    WeightChanges,
    add_batch,
)
from qvla_export.measurement.distributed import Alone, World
from qvla_export.measurement.layer_groups import Piece, layer_groups
from qvla_export.measurement.moment_bounds import MomentSettings
from qvla_export.measurement.sharded_sums import OnProgress, ShardedSums
from qvla_export.measurement.span_deviations import Fed, add_spans
from qvla_export.measurement.span_sweeps import SpanSweeps, SpanUse, open_sweeps
from qvla_export.measurement.standard_error import WHOLE, empty_sums, empty_whole, standard_error
from qvla_export.measurement.stream_limits import StreamLimits, open_stream
from qvla_export.measurement.streamed import Stream
from qvla_export.measurement.weight_errors import error_needs, weight_errors
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, layer_shapes, traced_layers, weights_on_disk
from qvla_export.quantizer.moments import Moments
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.sensitivity.estimators.base import (
    QUIETLY,
    ChannelWidth,
    Question,
    Work,
    looked_up,
)
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# How the gradients come together -> what `Sensitivities.method` says.
METHODS: Mapping[Contraction, str] = {
    "full": "first order, full",
    "norms": "norm product",
    "isotropic": "norm product, isotropic noise",
}


@dataclass(frozen=True)
class FirstOrder:
    """How to measure to first order.

    `probes` random signs an observation leave the estimate unbiased with a relative standard error
    of at most sqrt(2 / probes), and sqrt(2 / (probes * observations)) where observations are alike.
    None takes every number of the action chunk in turn: no such error, cheap for small chunks.
    """

    quantizer: QuantizerSpec
    widths: tuple[int, ...] = (0, 2, 4, 8)
    probes: int | None = None
    seed: int = 0
    # Observations that run together; memory grows with it.
    batch_size: int = 8
    # "full" is the method; the others are the paper's proxies.
    contraction: Contraction = "full"
    # Layers that do not fit into this many bytes together are measured in further passes; see
    # `layer_groups` for what it counts. None measures all at once.
    max_bytes: int | None = None
    # Where the quantizer needs them.
    moments: Moments | None = None
    # Or how they are measured on the way, used and dropped: of a policy on disk.
    span_moments: MomentSettings | None = None
    # Whether of the layers that no plan quantizes, instead of the others.
    of_kept: bool = False

    def __post_init__(self) -> None:
        sources = [self.moments, self.span_moments]
        if sum(source is not None for source in sources) != self.quantizer.needs_moments:
            raise QvlaError("moments belong to a quantizer that needs them: qvla moments")
        if self.batch_size < 1 or (self.probes is not None and self.probes < 1):
            raise QvlaError(
                f"batch_size and probes must be at least 1, got {self.batch_size}, {self.probes}"
            )
        if self.contraction not in get_args(Contraction):
            raise QvlaError(
                f"contraction must be one of {get_args(Contraction)}, got {self.contraction!r}"
            )

    def shares(self, observations: int) -> NDArray[np.float64] | None:
        """Return what each of so many observations counts; None for all alike."""
        return None if self.moments is None else self.moments.shares(observations)


@dataclass(frozen=True)
class FirstOrderEstimator:
    """All channels and widths from one backward pass a probe."""

    contraction: Contraction = "full"
    # Random probes an observation; None takes the whole Jacobian.
    probes: int | None = 4
    # Bound of what layers take together; see `qvla_export.measurement.layer_groups`.
    max_bytes: int | None = None

    @property
    def method(self) -> str:
        """Return the contraction's name, as it is recorded."""
        return METHODS[self.contraction]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the number of probes."""
        return {"probes": self.probes}

    @property
    def exact_share(self) -> float:
        """Return 0: no pair is measured by itself."""
        return 0.0

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Estimate every channel at every width."""
        # The norms are of all tokens, and no padding may be among them.
        size = question.batch_size if self.contraction == "full" else 1
        measured = measure_first_order(
            question.policy,
            question.observations,
            question.calibration_digest,
            FirstOrder(
                question.quantizer,
                question.widths,
                probes=self.probes,
                seed=question.seed,
                batch_size=size,
                contraction=self.contraction,
                max_bytes=self.max_bytes,
                moments=question.moments,
                span_moments=question.span_moments,
            ),
            work.progress_file,
            work.on_progress,
            work.world,
        )
        return replace(measured, settings={**self.settings, **question.stated_shares})

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Look the pairs up in the table, which costs the same.  float64 [pairs]"""
        return looked_up(self.table(question, work), pairs)


def measure_first_order(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    settings: FirstOrder,
    progress_file: Path | None = None,
    on_progress: OnProgress | None = None,
    world: World | None = None,
) -> Sensitivities:
    """Estimate the sensitivity of every channel at every width.

    Args:
        policy: its weights stay as they are. Those that were left on disk are read part by part,
            twice a batch; see `qvla_export.measurement.streamed`.
        observations: at least one.
        calibration_digest: digest of the set they came from.
        settings: quantizer, widths, probes, seed, batch size, bound of memory.
        progress_file: sums are saved here after each batch; a killed run that finds the file goes
            on from it and gives the same numbers. The caller removes it when the result is safe:
            `sharded_sums.remove_journals`. Several processes need a folder that all see.
        on_progress: called with (observations done, observations in all) after each batch; with
            several groups of layers, each group counts all observations.
        world: the processes that share the observations; all get the result.

    Raises:
        QvlaError: no observations, a convolution that is called more than once in a pass, or a
            layer that exceeds the bound of memory.
    """
    if not observations:
        raise QvlaError("sensitivities need at least one observation, got none")
    layers = dict(policy.kept_layers()) if settings.of_kept else traced_layers(policy)
    count, size = len(observations), settings.batch_size
    empty = _empty_sums(layers, count, settings)
    stream = sweeps = None
    groups: Sequence[Sequence[str]] = [list(layers)]
    if weights_on_disk(policy):
        stream, sweeps = open_first_order(policy, observations, settings, (world or Alone()).device)
        groups = groups if sweeps is None else sweeps.spans
    else:
        needs_of, first = error_needs(settings.quantizer, settings.widths), observations[:size]
        groups = layer_groups(policy, layers, first, needs_of, settings.max_bytes)
    identity = _identity(policy, count, calibration_digest, settings, groups, stream)
    if sweeps is not None:
        identity |= {"batches": len(sweeps.batches), "blocks": sweeps.settings.largest_block}
    sums = ShardedSums(empty, identity, progress_file, world)
    work = _Work(policy, layers, groups, observations, settings, sums, on_progress, stream)
    if sweeps is None:
        work.add()
    else:
        work.add_spans(sweeps)
    total = sums.total()
    return Sensitivities(
        values={name: (total[name] / count).astype(np.float32) for name in layers},
        widths=settings.widths,
        weights_per_channel={name: n for name, (_, n) in layer_shapes(layers).items()},
        method=METHODS[settings.contraction],
        samples=count,
        probes=settings.probes or 0,
        seed=settings.seed,
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
        quantizer=settings.quantizer,
        standard_error=standard_error(total, list(layers)),
    )


def open_first_order(
    policy: Policy,
    observations: Sequence[Observation],
    settings: FirstOrder,
    device: torch.device,
) -> tuple[Stream, SpanSweeps | None]:
    """Find out how observations go through a policy whose weights were left on disk.

    Args:
        policy: its weights were left on disk.
        observations: at least one.
        settings: with the bound of memory.
        device: where to compute.

    Returns:
        Parts and groups of layers; where moments are measured on the way, also the spans.

    Raises:
        QvlaError: what is needed exceeds the bound of memory.
    """
    layers, needs_of = traced_layers(policy), error_needs(settings.quantizer, settings.widths)
    held = sum(a.nbytes for a in _empty_sums(layers, len(observations), settings).values())
    limits = StreamLimits(settings.batch_size, settings.probes, needs_of, held, settings.max_bytes)
    if settings.span_moments is None:
        placement = WeightPlacement.on(device)
        return open_stream(policy, layers, observations, limits, placement), None
    how = replace(settings.span_moments, seed=settings.seed)
    use = SpanUse(lambda some, moved, settings: needs_of(some, moved), by_group=True)
    sweeps = open_sweeps(policy, observations, limits, how, device, use)
    return sweeps.stream, sweeps


def _empty_sums(layers: Layers, count: int, settings: FirstOrder) -> dict[str, NDArray[np.float64]]:
    widths = len(settings.widths)
    empty = empty_sums({name: len(layer.weight) for name, layer in layers.items()}, widths)
    return {**empty, WHOLE: empty_whole(settings.probes, count, widths)}


@dataclass(frozen=True)
class _Work:
    """Units of work: one group of layers on one batch each."""

    policy: Policy
    layers: Layers
    groups: Sequence[Sequence[str]]
    observations: Sequence[Observation]
    settings: FirstOrder
    sums: ShardedSums
    on_progress: OnProgress | None
    # For a policy whose weights were left on disk; all layers are one group then.
    stream: Stream | None = None

    @property
    def units(self) -> range:
        """Return all units: of each batch, one for each group."""
        return range(-(-len(self.observations) // self.settings.batch_size) * len(self.groups))

    def add(self) -> None:
        """Add this process's share."""
        count = len(self.groups)
        for g, names in enumerate(self.groups):
            mine = self.sums.share(self.units[g::count])
            group = {name: self.layers[name] for name in names}
            held = group if mine and self.stream is None else {}
            changes = self._changes([Piece(n, 0, len(x.weight)) for n, x in held.items()])
            for unit in mine:
                self._add(unit // count, group, changes)
                self.sums.mark(unit)
                self._tell()

    def add_spans(self, sweeps: SpanSweeps) -> None:
        """Add this process's share, with moments that are measured on the way."""

        def changes_of(pieces: Sequence[Piece], fed: Fed) -> WeightChanges:
            count, probes = len(self.observations), self.settings.probes or 0
            moments = Moments(fed, count, probes, self.settings.seed, self.policy.digest, "")
            return self._changes(pieces, moments)

        with contextlib.closing(sweeps):
            add_spans(sweeps, changes_of, self.sums, self.on_progress)

    def _add(self, number: int, group: Layers, changes: WeightChanges) -> None:
        size = self.settings.batch_size
        observations = self.observations[number * size : (number + 1) * size]
        shares = self.settings.shares(len(self.observations))
        if shares is not None:
            shares = shares[number * size : (number + 1) * size]
        probes = Probes(self.settings.probes, self.settings.seed)
        batch = ProbedBatch(observations, probes, number, shares)
        values = self.sums.values
        whole = values[WHOLE][:, number * size : number * size + len(observations)]
        sums = {**values, WHOLE: whole}
        if self.stream is None:
            add_batch(self.policy, group, batch, changes, sums)
        else:
            self.stream.add_batch(batch, self._changes, sums)

    def _changes(self, pieces: Sequence[Piece], moments: Moments | None = None) -> WeightChanges:
        """Return what each width adds to the weights of layers, or of channels of them."""
        settings = self.settings
        errors = {
            piece.layer: weight_errors(
                piece.layer,
                self.layers[piece.layer],
                settings.widths,
                settings.quantizer,
                moments or settings.moments,
                piece.channels,
            )
            for piece in pieces
        }
        return WeightChanges(errors, settings.contraction)

    def _tell(self) -> None:
        if self.on_progress is not None:
            whole = len(self.observations) * len(self.groups)
            done = self.sums.done(self.units) * self.settings.batch_size
            self.on_progress(min(done, whole), whole)


def _identity(
    policy: Policy,
    observations: int,
    calibration_digest: str,
    settings: FirstOrder,
    groups: Sequence[Sequence[str]],
    stream: Stream | None,
) -> dict[str, Any]:
    """Return what must be equal for saved sums to be of the same measurement."""
    stated = {field.name: getattr(settings, field.name) for field in fields(settings)}
    stated["quantizer"] = settings.quantizer.to_json()
    stated["moments"] = None if settings.moments is None else settings.moments.digest
    if settings.span_moments is not None:
        stated["span_moments"] = settings.span_moments.stated()
    # It shows in the groups, or changes nothing.
    del stated["max_bytes"], stated["of_kept"]
    return {
        "policy_digest": policy.digest,
        "calibration_digest": calibration_digest,
        "observations": observations,
        "settings": stated,
        "groups": [list(names) for names in groups],
        "streamed": stream is not None,
    }
