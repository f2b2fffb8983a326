"""Policies that integrate a flow: prefix once, the expert once a step."""

import numpy as np
import pytest

from qvla_export.latency_model.flow_shape import FLOW_GEOMETRIES, find_any_geometry, shape_of
from qvla_export.latency_model.network_shape import NetworkShape
from qvla_export.pipeline.sizing.subject import subject_of_geometry
from qvla_export.shared.errors import QvlaError


def weights_of(network: NetworkShape) -> dict[str, int]:
    return {
        part.name: sum(layer.channels * layer.inputs for layer in part.layers)
        for part in network.parts
    }


def test_pi0_has_its_published_sizes() -> None:
    """3.24 billion weights without the expert's and the language model's output layers."""
    geometry = find_any_geometry("pi0-base")
    weights = weights_of(geometry.network)
    # So400m without positions, biases and norms.
    assert weights["vision"] == pytest.approx(0.412e9 + 1152 * 2048, rel=0.01)
    # Gemma-2B's blocks but the last one, of which keys and values are read.
    block = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 16384
    assert weights["prefix"] == 17 * block + 2 * 256 * 2048
    expert = 2 * 1024 * 2048 + 2 * 256 * 1024 + 3 * 1024 * 4096
    assert weights["flow"] == 18 * expert + 2 * 32 * 1024 + 3 * 1024 * 1024
    embedding, unread = 257152 * 2048, block - 2 * 256 * 2048
    assert sum(weights.values()) + embedding + unread == pytest.approx(3.24e9, rel=0.01)


def test_every_step_reads_the_expert() -> None:
    for name in ("pi0-base", "pi05-base"):
        geometry = FLOW_GEOMETRIES[name]
        vision, prefix, flow = geometry.network.parts
        assert (vision.runs, prefix.runs, flow.runs) == (1, 1, 10), name
        rows = {layer.rows for layer in flow.layers if "self_attn" in layer.name}
        assert rows == {51 if geometry.inputs.state_dim else 50}
        keys = flow.attentions[0].keys
        assert keys == 3 * 256 + geometry.inputs.prompt_tokens + rows.pop()
        assert len(flow.attentions) == 18 and len(prefix.attentions) == 17
    assert len(FLOW_GEOMETRIES["pi05-base"].network.parts[2].layers) == 18 * 7 + 2 + 2 + 37


def test_a_geometry_has_widths_for_every_layer() -> None:
    subject = subject_of_geometry("pi0-base", "4", "none")
    assert set(subject.widths) == set(FLOW_GEOMETRIES["pi0-base"].layers)
    assert all(np.all(widths == 4) for widths in subject.widths.values())
    with pytest.raises(QvlaError, match="unknown"):
        find_any_geometry("pi1")


def test_other_layers_are_refused() -> None:
    inputs = FLOW_GEOMETRIES["pi0-base"].inputs
    with pytest.raises(QvlaError, match="no layer"):
        shape_of({"a": (1, 1)}, inputs)
