"""What `qvla tune` chose is kept beside a bundle, and used only where it holds."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from form_bundles import packed_bundle
from tiny_bundles import make_bundle

from engines.base import Engine, EngineError
from engines.forms.candidates import Candidate, Trial, fastest
from engines.forms.float_layers import all_layers
from engines.forms.tune import TuningSettings, tune
from engines.forms.tuning import (
    TimedForm,
    Tuning,
    find_tuning,
    runtime_versions,
    tuning_key,
    tuning_path,
)
from engines.load import load_engine
from engines.verify import run_engine
from qvla_export.pipeline.bench.tune import tune_bundles
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.sizes import compare_sizes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    folder = tmp_path_factory.mktemp("tuning") / "w4"
    return packed_bundle(tiny_policy, tiny_observations(2), folder / "bundle")


@pytest.fixture
def tuning(bundle: Bundle) -> Tuning:
    part, layers = next(iter(all_layers(bundle).items()))
    chosen = {part: frozenset(sorted(layers)[:3])}
    key, versions = tuning_key(bundle, 1), runtime_versions("ort")
    forms = (
        TimedForm("ort, mixed", 2.5, 2.4, 2.6, 1000),
        TimedForm("openvino, mixed", None, None, None, None, "it is not installed"),
    )
    return Tuning(key, "ort", versions, chosen, 2.5, 1000, 2000, forms)


def test_a_choice_comes_back_and_is_loaded(bundle: Bundle, tuning: Tuning) -> None:
    tuning.save(tuning_path(bundle))
    assert Tuning.load(tuning_path(bundle)) == tuning == find_tuning(bundle, 1)
    with load_engine(bundle, 1, "tuned") as engine:
        assert engine.weight_form == "3 layers in float"
    with load_engine(bundle, 1, "packed") as engine:
        assert engine.weight_form == "packed"


def test_without_a_choice_weights_run_as_stored_and_nothing_is_said(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    tuning_path(bundle).unlink(missing_ok=True)
    feeds = bundle.golden().feeds
    with caplog.at_level(logging.INFO), load_engine(bundle, 1, "tuned") as engine:
        assert engine.weight_form == "packed"
        actions = run_engine(engine, feeds)
    assert not caplog.records
    with load_engine(bundle, 1, "packed") as engine:
        np.testing.assert_array_equal(run_engine(engine, feeds), actions)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"key": {"bundle_digest": "0" * 64}}, "its bundle digest is 0000"),
        ({"key": {"machine": "a Z80"}}, "its machine is a Z80"),
        ({"key": {"threads": 3}}, "its threads is 3"),
        ({"versions": {"onnxruntime": "1.0"}}, "it was made with"),
        ({"runtime": "openvino", "versions": {}}, "openvino"),
        ({"runtime": "abacus"}, "one of ort, openvino is needed"),
        ({"format": "qvla.tuning/0"}, "'qvla.tuning/1' is needed"),
        ({"float_layers": {"policy": "all"}}, "float_layers"),
        ({"resident_bytes": -1}, "resident_bytes"),
    ],
)
def test_what_is_of_others_is_not_used_and_a_line_says_so(
    change: dict[str, object],
    reason: str,
    bundle: Bundle,
    tuning: Tuning,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tuning_path(bundle)
    tuning.save(path)
    value = json.loads(path.read_text())
    for name, new in change.items():
        value[name] = {**value[name], **new} if isinstance(new, dict) and new else new
    path.write_text(json.dumps(value))
    with caplog.at_level(logging.WARNING), load_engine(bundle, 1, "tuned") as engine:
        assert engine.weight_form == "packed"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "engines.forms.tuning"]
    assert reason in line and "qvla tune" in line


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "qvla.tuning/1"}', "\0"])
def test_a_damaged_file_is_not_used(text: str, bundle: Bundle) -> None:
    path = tuning_path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(ArtifactError):
        Tuning.load(path)
    assert find_tuning(bundle, 1) is None


def test_forms_are_timed_bounded_and_written(
    bundle: Bundle, tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    plain = make_bundle(tiny_policy, None, tiny_observations(2), tmp_path / "float" / "bundle")
    tuning_path(bundle).unlink(missing_ok=True)
    settings = TuningSettings(threads=1, rounds=2, layer_passes=1, byte_share=0.9)
    heard: list[Progress] = []
    report = tune_bundles(
        [plain.path, bundle.path], settings, tmp_path / "report.json", heard.append
    )
    first, second = report.bundles
    assert first.name == "float" and second.name == "w4" and heard
    # The float policy's bytes are known from a quantized bundle too.
    assert second.report.float_bytes == pytest.approx(first.report.float_bytes, rel=0.02)
    assert first.speedup is None and first.recommended is None
    for found, own in ((first, plain), (second, bundle)):
        chosen = found.report.tuning
        assert chosen is not None and Tuning.load(tuning_path(own)) == chosen
    tuning = second.report.tuning
    assert tuning is not None and tuning.resident_bytes <= 0.9 * second.report.float_bytes
    by_form = {t.candidate.form: t for t in second.report.trials if t.candidate.runtime == "ort"}
    stored, whole = by_form["as stored"], by_form["in float"]
    assert stored.timed.resident_bytes is not None and whole.timed.resident_bytes is not None
    assert stored.timed.resident_bytes < whole.timed.resident_bytes
    assert compare_sizes([bundle.path]).bundles[0].forms == tuning.lines
    assert second.recommended is not None and second.lines[-1].startswith("  -> ")
    assert json.loads((tmp_path / "report.json").read_text())["bundles"][1]["bundle"] == "w4"


@pytest.mark.parametrize(("moved_by", "reason"), [(0.5, "difference"), (np.nan, "NaN")])
def test_what_acts_otherwise_is_not_taken(
    moved_by: float, reason: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever holds floats moves the action here, and is the fastest there is."""
    open_engine, moved = Candidate.open, []

    def opened(candidate: Candidate, *arguments: Any) -> Engine:
        engine = open_engine(candidate, *arguments)
        if candidate.float_layers:
            moved.append(candidate)
            answer = {n: v + np.float32(moved_by) for n, v in engine.infer(feeds).items()}
            monkeypatch.setattr(engine, "infer", lambda _: answer)
        return engine

    feeds = bundle.golden().feeds[0]
    monkeypatch.setattr(Candidate, "open", opened)
    settings = TuningSettings(threads=1, rounds=2, layer_passes=1, byte_share=1.5)
    report = tune(bundle, settings)
    assert report.tuning is not None and report.tuning.form == "ort, as stored"
    # OpenVINO, where it is, cannot open those that have codes of 2 and 4 bits left.
    others = [t for t in report.trials if t.candidate in moved]
    assert others and all(reason in trial.timed.refusal for trial in others)


def test_versions_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that brings it may be onnxruntime-gpu."""

    def no_package(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("engines.forms.tuning.version", no_package)
    assert runtime_versions("ort") == {"onnxruntime": onnxruntime.__version__}


def test_a_runtime_that_cannot_be_imported_is_an_engine_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "engines.openvino", None)
    with pytest.raises(EngineError, match="cannot be imported"):
        Candidate("openvino", "as stored").open(bundle, 1)


def test_only_the_cpu_target_is_tuned(bundle: Bundle) -> None:
    other = replace(bundle, manifest={**bundle.manifest, "target": "rtx4070"})
    with pytest.raises(EngineError, match="picks its own kernels"):
        tune(other, TuningSettings())


@pytest.mark.parametrize("wrong", [{"rounds": 1}, {"byte_share": 0.0}, {"clock": "cpu"}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(EngineError):
        TuningSettings(**wrong)  # type: ignore[arg-type]


def test_what_is_refused_is_never_the_fastest() -> None:
    some = Candidate("ort", "as stored")
    slow = Trial(some, TimedForm(some.name, 2.0, 1.9, 2.1, 10))
    quick = Trial(some, TimedForm(some.name, 1.0, 0.9, 1.1, 10, "drifts"))
    absent = Trial(some, TimedForm(some.name, None, None, None, None))
    assert fastest([quick, slow]) is slow
    assert fastest([quick, absent]) is None
