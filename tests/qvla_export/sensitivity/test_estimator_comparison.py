"""Estimators side by side: the sample, the figures, the file; what the commands take."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_policies import linear_question
from report_runs import edit_json
from typer.testing import CliRunner

from calibration.calibration_set import CalibrationSet
from qvla_export.cli.app import app
from qvla_export.measurement.peak_memory import peak_memory
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.moments import SHARES
from qvla_export.sensitivity.estimator_comparison import (
    EstimatorComparison,
    add_estimator,
    new_comparison,
    time_official,
)
from qvla_export.sensitivity.estimators.base import Question
from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator
from qvla_export.sensitivity.estimators.hessian import HessianEstimator
from qvla_export.sensitivity.estimators.registry import Options, find_estimator
from qvla_export.sensitivity.estimators.sampling import stratified_pairs
from qvla_export.sensitivity.official_timing import official_proxies
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def many() -> Question:
    return linear_question(40)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    count=st.integers(3, 400),
    seed=st.integers(0, 5),
)
def test_a_sample_covers_every_layer_and_width(sizes: list[int], count: int, seed: int) -> None:
    shapes = {f"layer{i}": (channels, 3) for i, channels in enumerate(sizes)}
    pairs = stratified_pairs(shapes, (0, 4), count, seed)
    assert len(set(pairs)) == len(pairs) >= min(count, 2 * sum(sizes))
    assert len(pairs) < count + 2 * len(sizes)
    assert {(p.layer, p.bits) for p in pairs} == {(n, b) for n in shapes for b in (0, 4)}
    assert all(0 <= p.channel < shapes[p.layer][0] for p in pairs)
    assert pairs == stratified_pairs(shapes, (0, 4), count, seed)


def test_figures_of_all_estimators(many: Question, tmp_path: Path) -> None:
    compared = new_comparison(many, 16, seed=0)
    with pytest.raises(QvlaError, match="exact values; measure those before hessian"):
        add_estimator(compared, "hessian", HessianEstimator(), many)
    for name in ("exact", "first-order", "hessian", "two-stage"):
        estimator = find_estimator(name, Options(probes=None, share=0.25))
        compared = add_estimator(compared, name, estimator, many)
    exact, first, hessian, both = compared.figures
    assert (exact.spearman, exact.scaled, first.scaled, both.scaled) == (1.0, True, False, True)
    assert first.spearman > 0.999 and first.spearman_by_width.keys() == {"0", "2", "4", "8"}
    assert hessian.spearman < first.spearman
    assert exact.whole_seconds == pytest.approx(exact.seconds * 32 / len(compared.pairs))
    assert first.whole_seconds == first.seconds
    np.testing.assert_allclose(first.values, exact.values, rtol=1e-4, atol=1e-9)
    compared = replace(compared, official=time_official(many, "first-order", FirstOrderEstimator()))
    assert compared.official is not None and len(compared.official.estimator_seconds) == 3
    compared.save(tmp_path / "estimators.json")
    assert EstimatorComparison.load(tmp_path / "estimators.json") == replace(
        compared, pairs=[tuple(pair) for pair in compared.pairs]
    )


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "qvla-estimators-1"}', "{"])
def test_damaged_comparisons_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "estimators.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"estimators\.json"):
        EstimatorComparison.load(tmp_path / "estimators.json")
    with pytest.raises(ArtifactError, match="not found"):
        EstimatorComparison.load(tmp_path / "absent.json")


def test_damage_inside_a_comparison_is_refused(many: Question, tmp_path: Path) -> None:
    path = tmp_path / "estimators.json"
    new_comparison(many, 16, seed=0).save(path)
    value = json.loads(path.read_text())
    for key, wrong in (("pairs", [["first"]]), ("figures", [{"name": "x"}]), ("official", 3)):
        path.write_text(json.dumps({**value, key: wrong}))
        with pytest.raises(ArtifactError, match="is damaged"):
            EstimatorComparison.load(path)


def test_the_official_structure_computes_what_one_pass_does(many: Question) -> None:
    slow = official_proxies(many)
    quick = HessianEstimator().table(many)
    assert slow.keys() == quick.values.keys()
    for name, proxies in slow.items():
        np.testing.assert_allclose(proxies.numpy(), quick.values[name], rtol=1e-3)


def test_where_only_probes_differ_they_make_the_standard_error(many: Question) -> None:
    alike = replace(many, observations=many.observations[:1] * 40)
    found = FirstOrderEstimator(probes=2).table(alike).standard_error
    assert found.layers_by_probes == pytest.approx(found.layers, rel=0.3)
    assert found.median_by_probes == pytest.approx(found.median, rel=0.3)
    for spread in found.by_width.values():
        np.testing.assert_allclose(spread.by_probes, spread.error, rtol=0.3)


def test_peak_memory_is_what_a_block_took() -> None:
    with peak_memory() as found:
        held = np.ones(4_000_000)
        held += 1
    if found.extra_bytes is not None:
        assert 25e6 < found.extra_bytes < 500e6


def invoked(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if isinstance(result.exception, QvlaError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def run(tmp_path: Path, tiny_observations: Make) -> Path:
    drawn = tuple(tiny_observations(5))
    CalibrationSet(drawn[:4], drawn[4:], {"test": 1}, (3, 1)).save(tmp_path / "run" / "calibration")
    return tmp_path / "run"


def test_commands_take_methods_and_refuse_what_does_not_fit(
    run: Path, tiny_checkpoint: Path
) -> None:
    common = ("sensitivities", "--run", run, "--policy", tiny_checkpoint)
    path = run / "sensitivities.safetensors"
    assert "input Hessian proxy" in invoked(*common, "--method", "hessian")
    assert Sensitivities.load(path).method == "input Hessian proxy"
    invoked(*common, "--method", "cumulative-first-order", "--probes", 2)
    summed = Sensitivities.load(path)
    assert "of the median layer and width, probes make" in invoked(*common, "--probes", 2)
    plain = Sensitivities.load(path)
    assert plain.settings == {"probes": 2, "shares": SHARES}
    assert summed.method == f"cumulative, {plain.method}"
    # Files of before name a bound; null bounded nothing.
    for bound, kept in (
        ({}, True),
        ({"max_standard_error": None}, True),
        ({"max_standard_error": 0.3}, False),
    ):
        replace(plain, settings={**plain.settings, **bound}).save(path)
        written = path.stat().st_mtime_ns
        invoked(*common, "--probes", 2)
        assert (path.stat().st_mtime_ns == written) == kept
    # Exact ones have no settings, and are kept as well.
    replace(summed, method="exact", settings={}, probes=0).save(path)
    written = path.stat().st_mtime_ns
    invoked(*common, "--method", "exact")
    assert path.stat().st_mtime_ns == written
    for refused, message in (
        (("--method", "guess"), "a method is one of"),
        (("--method", "two-stage", "--exact-share", 0), r"must be in \(0, 1\]"),
    ):
        with pytest.raises(QvlaError, match=message):
            invoked(*common, *refused)


def test_the_comparing_command_goes_on_where_it_stopped(
    run: Path, tiny_checkpoint: Path, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    output = tmp_path / "estimators.json"
    common = ("estimators", "--run", run, "--policy", tiny_checkpoint, "--output", output)
    common = (*common, "--pairs", 3, "--observations", 1, "--no-official")
    text = invoked(*common, "--method", "first-order")
    assert "first-order" in text and "(scaled)" in text
    first = EstimatorComparison.load(output)
    options = first.question["options"]
    # As files of before have it.
    edit_json(output, asked={**first.question, "options": {**options, "max_standard_error": None}})
    invoked(*common, "--method", "first-order", "--method", "hessian")
    second = EstimatorComparison.load(output)
    assert [f.name for f in second.figures] == ["exact", "first-order", "hessian"]
    assert second.figures[:2] == first.figures
    layers = layer_shapes(tiny_policy.layers())
    assert {(layer, bits) for layer, _, bits in second.pairs} == {
        (name, bits) for name in layers for bits in (0, 2, 4, 8)
    }
    with pytest.raises(QvlaError, match="need --episodes"):
        invoked(*common, "--method", "cumulative")
    third = invoked(*common, "--method", "cumulative-first-order", "--episodes", run)
    assert "cumulative-first-order" in third
