"""Small bundles whose weights can be held in several forms."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tiny_bundles import make_bundle, mixed_plan

from engines.targets import CPU
from qvla_export.policies.base import Policy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation


def packed_bundle(policy: Policy, observations: Sequence[Observation], path: Path) -> Bundle:
    """Every width, a scale a group, inputs in float."""
    return make_bundle(policy, mixed_plan(policy), observations, path)


def rounded_bundle(policy: Policy, observations: Sequence[Observation], path: Path) -> Bundle:
    """Every width, scales of two levels, inputs rounded to 8 bits: codes expand to int8."""
    target, plan = CPU.with_two_level_scales(), mixed_plan(policy)
    plan = replace(plan, containers=dict(target.containers), quantizer=spec_for(target))
    ranges = ActivationRanges(8, "max", dict.fromkeys(plan.widths, 6.0))
    return make_bundle(policy, replace(plan, activations=ranges), observations, path)
