"""What we export for TensorRT keeps the rules of every TensorRT target."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graph_checks import require_clean
from traced_graphs import traced

from engines.targets import find_target
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.observation import Observation

TARGET = find_target("rtx4070")
# Warnings that no export can avoid, with the documents as they are.
EXPECTED = {
    "graph.opset-undocumented": "TensorRT 10.3 documents 20, int4 needs 21",
    "quantization.int8-weight-only": "8-bit weights beside float activations",
    "type.compute": "what stays in float32 on purpose",
}


def plans(policy: OftPolicy) -> dict[str, BitPlan | None]:
    shapes = layer_shapes(policy.layers())
    w8, w4 = (uniform_plan(shapes, bits, TARGET, policy.digest) for bits in (8, 4))
    generator = np.random.default_rng(0)
    mixed = {
        name: generator.choice([0, 2, 4, 8, 16], channels, p=[0.05, 0.2, 0.5, 0.2, 0.05])
        for name, (channels, _) in shapes.items()
    }
    ranges = ActivationRanges(8, "max", dict.fromkeys(shapes, 2.0))
    return {
        "float": None,
        "w8": w8,
        "w4": w4,
        "mixed": replace(w4, widths={name: w.astype(np.int8) for name, w in mixed.items()}),
        "w8a8": replace(w8, activations=ranges),
    }


@pytest.mark.parametrize("setting", ["float", "w8", "w4", "mixed", "w8a8"])
def test_exported_bundles_are_clean(
    setting: str,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plan = plans(tiny_policy)[setting]
    path = tmp_path_factory.mktemp("exported") / setting
    graph = traced(tiny_policy, TARGET)
    bundle = export_bundle(
        tiny_policy, plan, TARGET, tiny_observations(1), path, ExportOptions(graph)
    )
    for name in ("rtx4070", "orin-jp7", "orin-jp6"):
        warnings = require_clean(bundle, find_target(name))
        assert {finding.rule for finding in warnings} <= set(EXPECTED)
