"""Estimators side by side: the sample, the figures, the file; a standard error that stops."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_policies import interrupted_until_done, linear_question
from typer.testing import CliRunner

from calibration.samples import CalibrationSet
from qvla_export.cli.commands import app
from qvla_export.errors import ArtifactError, QvlaError
from qvla_export.estimators.base import Question
from qvla_export.estimators.bench_official import official_proxies
from qvla_export.estimators.comparison import (
    Comparison,
    add_estimator,
    new_comparison,
    time_official,
)
from qvla_export.estimators.first_order import FirstOrderEstimator
from qvla_export.estimators.hessian import HessianEstimator
from qvla_export.estimators.names import Options, find_estimator
from qvla_export.estimators.sampling import stratified_pairs
from qvla_export.layers import layer_shapes
from qvla_export.observation import Observation
from qvla_export.peak_memory import peak_memory
from qvla_export.policies.oft import OftPolicy
from qvla_export.sensitivity import Sensitivities
from qvla_export.standard_errors import empty_sums, wanted_probes

Make = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def many() -> Question:
    """Forty observations, one a batch, so that a bounded measurement looks after 4, 8, ..."""
    return replace(linear_question(40), batch_size=1)


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
    assert Comparison.load(tmp_path / "estimators.json") == replace(
        compared, pairs=[tuple(pair) for pair in compared.pairs]
    )


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "qvla-estimators-1"}', "{"])
def test_damaged_comparisons_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "estimators.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"estimators\.json"):
        Comparison.load(tmp_path / "estimators.json")
    with pytest.raises(ArtifactError, match="not found"):
        Comparison.load(tmp_path / "absent.json")


def test_damage_inside_a_comparison_is_refused(many: Question, tmp_path: Path) -> None:
    path = tmp_path / "estimators.json"
    new_comparison(many, 16, seed=0).save(path)
    value = json.loads(path.read_text())
    for key, wrong in (("pairs", [["first"]]), ("figures", [{"name": "x"}]), ("official", 3)):
        path.write_text(json.dumps({**value, key: wrong}))
        with pytest.raises(ArtifactError, match="is damaged"):
            Comparison.load(path)


def test_the_official_structure_computes_what_one_pass_does(many: Question) -> None:
    slow = official_proxies(many)
    quick = HessianEstimator().table(many)
    assert slow.keys() == quick.values.keys()
    for name, proxies in slow.items():
        np.testing.assert_allclose(proxies.numpy(), quick.values[name], rtol=1e-3)


def measured(question: Question, bound: float | None) -> Sensitivities:
    return FirstOrderEstimator(probes=2, max_standard_error=bound).table(question)


def test_a_standard_error_ends_the_measurement(many: Question) -> None:
    everything = measured(many, None)
    reached = everything.standard_error
    assert reached is not None and everything.samples == 40
    # What is easily reached takes the first look only.
    loose = measured(many, 100.0)
    assert loose.samples == 4 and loose.standard_error.median <= 100
    # The next looks come after half as many observations more, each.
    middle = measured(many, reached.median * 1.5)
    assert middle.samples in (6, 9, 13, 19, 28)
    assert middle.standard_error.median <= reached.median * 1.5
    # Where observations differ most, more probes would not help.
    tight = measured(many, reached.median * 0.6)
    assert tight.samples == 40 and tight.standard_error.median > reached.median * 0.6
    assert tight.settings["max_standard_error"] == reached.median * 0.6


def test_where_only_probes_differ_more_of_them_reach_the_bound(many: Question) -> None:
    alike = replace(many, observations=many.observations[:1] * 40)
    two = measured(alike, None).standard_error
    assert two.layers_by_probes == pytest.approx(two.layers, rel=0.3)
    assert two.median_by_probes == pytest.approx(two.median, rel=0.3)
    for spread in two.by_width.values():
        np.testing.assert_allclose(spread.by_probes, spread.error, rtol=0.3)
    more = measured(alike, two.median / 2)
    assert more.standard_error.median <= two.median / 2 and more.probes == 2


@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_a_stopped_bounded_measurement_goes_on_to_the_same_file(
    many: Question, bound: float, tmp_path: Path
) -> None:
    estimator = FirstOrderEstimator(probes=2, max_standard_error=bound)
    whole = estimator.table(many)
    found, stops = interrupted_until_done(estimator, many, tmp_path / "progress")
    assert stops > 1
    whole.save(tmp_path / "whole")
    found.save(tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "whole").read_bytes()


@given(between=st.floats(0.01, 2), of_probe=st.floats(0.01, 100), bound=st.floats(0.01, 1))
def test_more_probes_the_more_they_differ(between: float, of_probe: float, bound: float) -> None:
    def wanted(of_probe: float) -> int:
        # A hundred observations of mean 1, four probes each.
        sums = empty_sums({"layer": 1}, 1)
        sums["layer"][:] = 100
        sums["layer#moments"][0] = 100 + 99 * (between + of_probe / 4)
        sums["layer#moments"][1] = 100 * of_probe / 4
        return wanted_probes(sums, ["layer"], [(60, 4), (40, 4)], 200, bound)

    assert 2 <= wanted(of_probe) <= wanted(2 * of_probe) <= 64
    # Never fewer than bring the bound about with all observations, where enough could.
    probes, room = wanted(of_probe), 200 * bound**2 - between
    if room > 0 and of_probe / room < 64:
        assert between + of_probe / probes <= 200 * bound**2 * (1 + 1e-9)


def test_few_probes_where_observations_differ_more(many: Question) -> None:
    # Eight probes of each observation, which leave a hundredth of its variance.
    sums = empty_sums({"layer": 3}, 2)
    sums["layer"][:] = 40 / 3
    sums["layer#moments"][0] = 40 + 39 * 1.0
    sums["layer#moments"][1] = 40 * 0.01
    assert wanted_probes(sums, ["layer"], [(40, 8)], 64, 0.2) == 2
    # So it is on policies: later batches have fewer than the first.
    bound = measured(many, None).standard_error.median * 0.6
    fewer = FirstOrderEstimator(probes=16, max_standard_error=bound).table(many)
    always = FirstOrderEstimator(probes=16).table(many)
    assert fewer.standard_error.median_by_probes > 1.5 * always.standard_error.median_by_probes


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
    output = invoked(*common, "--probes", 2, "--standard-error", 1e-6)
    assert "above the 0.0% asked for" in output and "qvla calibrate" in output
    plain = Sensitivities.load(path)
    assert plain.settings == {"probes": 2, "max_standard_error": 1e-6}
    assert summed.method == f"cumulative, {plain.method}"
    written = path.stat().st_mtime_ns
    invoked(*common, "--probes", 2, "--standard-error", 1e-6)
    assert path.stat().st_mtime_ns == written
    for refused, message in (
        (("--method", "guess"), "a method is one of"),
        (("--method", "hessian", "--standard-error", 0.1), "stops .* only"),
        (("--standard-error", 0), "must be above 0"),
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
    first = Comparison.load(output)
    invoked(*common, "--method", "first-order", "--method", "hessian")
    second = Comparison.load(output)
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
