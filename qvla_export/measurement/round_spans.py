"""Codes of a plan, span by span: moments are measured, layers rounded, codes written, all dropped.

For policies whose weights were left on disk: nothing but one span is ever in memory, and no
moments come to lie on disk.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from qvla_export.measurement.distributed import Alone, World
from qvla_export.measurement.layer_groups import LayerNeeds, Phase
from qvla_export.measurement.moment_bounds import MomentSettings, moment_needs
from qvla_export.measurement.sharded_sums import OnProgress
from qvla_export.measurement.span_sweeps import SpanSweeps, SpanUse, open_sweeps
from qvla_export.measurement.stream_limits import StreamLimits
from qvla_export.measurement.torch_arrays import elimination_on
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, layer_shapes
from qvla_export.quantizer.code_files import CodeFiles
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.round_plan import round_plan_layer
from qvla_export.quantizer.rounding import Rounding
from qvla_export.quantizer.rounding_costs import rounding_cost
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class SpanRounding:
    """A plan to be rounded span by span."""

    policy: Policy
    plan: BitPlan
    # At least one.
    observations: Sequence[Observation]
    # Digest of the set they came from.
    calibration_digest: str
    # Of moments; with the bound of memory.
    settings: MomentSettings
    # Of the codes while they are made.
    folder: Path
    world: World = field(default_factory=Alone)

    @property
    def moments_digest(self) -> str:
        """Return a digest of how moments are measured, which stands for their own."""
        settings = self.settings
        recipe = {
            "format": "qvla-span-moments-1",
            "policy": self.policy.digest,
            "calibration": self.calibration_digest,
            "observations": len(self.observations),
            "probes": settings.probes,
            "seed": settings.seed,
            "largest_block": settings.largest_block,
        }
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    @property
    def files(self) -> CodeFiles:
        """Return where the codes of single layers are."""
        return CodeFiles(self.folder, list(self.plan.widths), self.plan.digest, self.moments_digest)


def round_spans(work: SpanRounding, on_progress: OnProgress | None = None) -> Rounding:
    """Make the codes of all layers; those that an earlier run has finished are kept.

    The caller saves the result and then removes `work.files`.

    Args:
        work: what is to be rounded.
        on_progress: called with (layers done, layers in all).

    Raises:
        QvlaError: what is needed exceeds the bound of memory.
    """
    files, settings = work.files, work.settings
    finished = set(files.finished())
    missing = [name for name in files.names if name not in finished]
    if missing:
        device = work.world.device
        sweeps = rounding_sweeps(work.policy, work.observations, settings, device)
        with contextlib.closing(sweeps):
            todo = [n for n, names in enumerate(sweeps.spans) if not finished.issuperset(names)]
            for number in todo:
                for name, fed in sweeps.moments(number, todo):
                    if name in finished:
                        continue
                    made = round_plan_layer(
                        work.policy, work.plan, name, fed, elimination_on(device)
                    )
                    files.save(name, made)
                    finished.add(name)
                    if on_progress is not None:
                        on_progress(len(finished), len(files.names))
    return files.joined()


def rounding_sweeps(
    policy: Policy,
    observations: Sequence[Observation],
    settings: MomentSettings,
    device: torch.device,
) -> SpanSweeps:
    """Find out how the layers of a policy are gone through to be rounded; see `open_sweeps`.

    Args:
        policy: its weights were left on disk.
        observations: at least one.
        settings: of moments; with the bound of memory.
        device: where to compute.

    Raises:
        QvlaError: what is needed exceeds the bound of memory.
    """
    use = SpanUse(_needs, by_group=False)
    limits = StreamLimits(
        settings.batch_size,
        settings.probes,
        partial(_needs, settings=settings),
        0,
        settings.max_bytes,
        cut=False,
    )
    return open_sweeps(policy, observations, limits, settings, device, use)


def _needs(
    layers: Layers, moved: Mapping[str, tuple[int, int]], settings: MomentSettings
) -> dict[str, LayerNeeds]:
    """Return what each layer takes: its passes, then its rounding."""
    shapes = layer_shapes({name: layers[name] for name in moved})
    found = {}
    for name, needs in moment_needs(layers, moved, settings).items():
        cost = rounding_cost(*shapes[name], settings.largest_block)
        rounded = Phase(False, passes=cost.memory_bytes)
        found[name] = replace(needs, phases=(*needs.phases, rounded))
    return found
