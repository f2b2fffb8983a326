"""Bundles of the tiny policy, made once for all test files that want them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from graph_checks import require_clean
from openvla_cases import openvla_observations
from traced_graphs import traced

from engines.targets import CPU
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.prismatic.policy import PrismaticPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.bundle import MANIFEST, Bundle, manifest_digest
from qvla_export.shared.observation import Observation


def float_graph(policy: Policy) -> ir.Model:
    """Return the policy's only float graph."""
    return traced(policy, CPU)["policy"]


def mixed_plan(policy: Policy, seed: int = 0) -> BitPlan:
    """Every layer has every width, except one layer of each single width."""
    shapes = layer_shapes(policy.layers())
    generator = np.random.default_rng(seed)
    widths = {
        name: generator.choice([0, 2, 4, 8, 16], channels, p=[0.05, 0.2, 0.5, 0.2, 0.05])
        for name, (channels, _) in shapes.items()
    }
    for name, bits in zip(list(widths)[:4], (4, 8, 2, 16), strict=True):
        widths[name][:] = bits
    return BitPlan(
        widths={name: w.astype(np.int8) for name, w in widths.items()},
        weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
        target=CPU.name,
        containers=dict(CPU.containers),
        quantizer=spec_for(CPU),
        budget="random",
        policy_digest=policy.digest,
    )


def make_bundle(
    policy: Policy,
    plan: BitPlan | None,
    observations: Sequence[Observation],
    path: Path,
) -> Bundle:
    bundle = export_bundle(
        policy, plan, CPU, observations, path, ExportOptions({"policy": float_graph(policy)})
    )
    require_clean(bundle)
    return bundle


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest as someone would who also mends its digest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest.pop("digest")
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def exported_oracle(
    policy: PrismaticPolicy, donor: PrismaticPolicy, path: Path, layers_per_part: int | None
) -> Bundle:
    """Export an oracle's policy in float; it has no tokenizer, `donor`'s makes the bundle whole."""
    processor = replace(policy.processor, tokenizer=donor.processor.tokenizer)
    policy = replace(policy, processor=processor)
    side = isqrt(processor.spec.pixels)
    black = {"full_image": np.zeros((side, side, 3), np.uint8)}
    seen = [replace(openvla_observations(1)[0], images=black)]
    options = ExportOptions(layers_per_part=layers_per_part)
    return export_bundle(policy, None, CPU, seen, path, options)
