"""Graphs of every family keep the rules of both Jetsons, and TensorRT-RTX builds their parts.

Token by token, and pi0: see `test_export_program`, `test_export_latent_tokens`, `test_export_pi`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from family_cases import FAMILY_CASES
from graph_checks import require_clean
from rtx_parser import builds

from engines.targets import find_target
from qvla_export.graph.export import export_bundle
from qvla_export.policies.families import load_policy
from qvla_export.policies.layers import layer_shapes
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import TensorSpec

TARGETS = ("rtx4070", "orin-jp7", "orin-jp6")
FAMILIES = ("diffusion", "tokens", "pi05", "smolvla", "act")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", ["w4", "w8a8", "w4a8, expanded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_take_every_part(family: str, setting: str, tmp_path: Path) -> None:
    case = FAMILY_CASES[family]
    policy, target = load_policy(case.write(tmp_path / "checkpoint")), find_target("rtx4070")
    if "expanded" in setting:
        target = target.with_two_level_scales()
    shapes = layer_shapes(policy.layers())
    plan = uniform_plan(shapes, int(setting[1]), target, policy.digest)
    if "a8" in setting:
        ranges = ActivationRanges(8, "max", dict.fromkeys(shapes, 2.0))
        plan = replace(plan, activations=ranges)
    bundle = export_bundle(policy, plan, target, case.observations(1), tmp_path / "bundle")
    for name in TARGETS:
        require_clean(bundle, find_target(name))
    for part in bundle.parts:
        sizes = open_sizes(bundle, part.inputs)
        assert builds(bundle.model_path(part), [sizes] if sizes else []), part.name


def open_sizes(bundle: Bundle, inputs: Iterable[TensorSpec]) -> dict[str, int]:
    """Return what each open size of inputs is with the prompt of the golden observation."""
    ids = bundle.golden().feeds[0].get("input_ids")
    prompt = 0 if ids is None else ids.shape[1]
    named = {"prompt": prompt}
    for part in bundle.parts:
        for spec in part.outputs:
            for size in spec.shape:
                name, plus, more = str(size).partition("+")
                if plus and name == "prompt":
                    named[str(size)] = prompt + int(more)
                    if spec.name.startswith("keys_"):
                        named["places"] = prompt + int(more)
    return {
        spec.name: named[size] for spec in inputs for size in spec.shape if isinstance(size, str)
    }
