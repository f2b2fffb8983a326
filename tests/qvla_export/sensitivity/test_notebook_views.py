"""What a notebook or a prompt shows of sensitivities, plans and comparisons: one line, a table."""

from xml.etree import ElementTree

import numpy as np
import pytest

from engines.targets import CPU
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.agreement import Agreement
from qvla_export.sensitivity.estimator_comparison import EstimatorComparison, EstimatorScore
from qvla_export.sensitivity.sensitivities import Sensitivities

SHAPES = {
    "vision_backbone.featurizer.encoder.layer.0.mlp.fc1": (1000, 64),
    "vision_backbone.featurizer.encoder.layer.0.mlp.fc2": (24, 64),
    "language_model.model.layers.0.self_attn.q_proj": (8, 64),
    "<script>.alert": (4, 64),
}


@pytest.fixture
def measured() -> Sensitivities:
    return Sensitivities(
        values={
            name: np.full((2, channels), [[0.5], [0.25]], np.float32)
            for name, (channels, _) in SHAPES.items()
        },
        widths=(2, 8),
        weights_per_channel={name: inputs for name, (_, inputs) in SHAPES.items()},
        method="first order, full",
        samples=6,
        probes=4,
        policy_digest="a" * 64,
        calibration_digest="b" * 64,
        quantizer=spec_for(CPU),
    )


@pytest.fixture
def plan() -> BitPlan:
    planned = uniform_plan(SHAPES, 4, CPU, "a" * 64)
    planned.widths["language_model.model.layers.0.self_attn.q_proj"][:2] = 16
    return planned


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of an HTML table, whose markup must be whole."""
    rows = ElementTree.fromstring(text.replace("<br>", "<br/>")).iter("tr")
    return [[cell.text or "" for cell in row] for row in rows]


def test_sensitivities_are_one_line(measured: Sensitivities) -> None:
    assert repr(measured) == (
        "<Sensitivities: 1,036 channels in 4 layers at 2, 8 bits, first order, full, "
        f"6 observations, digest {measured.digest[:8]}>"
    )


def test_sensitivities_are_a_table_of_modules_in_a_notebook(measured: Sensitivities) -> None:
    text = measured._repr_html_()
    assert table_rows(text) == [
        ["Module", "2 bits", "8 bits"],
        ["DINOv2 MLP", "512", "256"],
        ["Language attention", "4", "2"],
        ["<script>.alert", "2", "1"],
    ]
    assert "<script" not in text
    for fact in ("first order, full", "6 observations", "a" * 64, "b" * 64, "numpy"):
        assert fact in text


def test_a_plan_is_one_line(plan: BitPlan) -> None:
    assert repr(plan) == (
        f"<BitPlan: 1,036 channels in 4 layers, {plan.mean_bits_per_channel:.2f} bits per channel, "
        f"{plan.weight_bytes:,} bytes ({plan.ratio:.1%} of float16) on cpu, "
        f"digest {plan.digest[:8]}>"
    )


def test_a_plan_is_a_table_of_widths_in_a_notebook(plan: BitPlan) -> None:
    text = plan._repr_html_()
    assert table_rows(text) == [
        ["Module", "Channels", "0 bits", "2 bits", "4 bits", "8 bits", "16 bits", "Mean bits"],
        ["DINOv2 MLP", "1,024", "0", "0", "1,024", "0", "0", "4.00"],
        ["Language attention", "8", "0", "0", "6", "0", "2", "7.00"],
        ["<script>.alert", "4", "0", "0", "4", "0", "0", "4.00"],
        ["All", "1,036", "0", "0", "1,034", "0", "2", "4.02"],
    ]
    for fact in (plan.budget, "a" * 64, "numpy"):
        assert fact in text


def test_what_holds_many_pairs_is_one_line() -> None:
    pairs = [("layer", channel, 2) for channel in range(500)]
    agreement = Agreement(
        spearman=0.987,
        spearman_by_width={"2": 0.987},
        samples=6,
        exact_pair_seconds=1.0,
        exact_all_seconds=500.0,
        first_order_seconds=1.0,
        policy_digest="a" * 64,
        sensitivities_digest="c" * 64,
        pairs=[(*pair, 0.1, 0.1) for pair in pairs],
    )
    assert repr(agreement) == (
        "<Agreement: Spearman 0.9870 on 500 pairs, 6 observations, sensitivities cccccccc>"
    )
    score = EstimatorScore(
        "exact", "exact", {}, 6, 1.0, {"2": 1.0}, 5.0, 5.0, False, None, [0.125] * 500
    )
    comparison = EstimatorComparison({"policy_digest": "a" * 64}, pairs, 1000, (score,))
    assert repr(comparison) == (
        "<EstimatorComparison: exact on 500 of 1,000 pairs, policy aaaaaaaa>"
    )
    assert "0.125" not in repr(score)
