"""`qvla bench weights`: a published network, quantized by us and by others at equal bytes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_backbones import install_tiny_backbones
from typer.testing import CliRunner

from calibration.texts import draw_texts
from qvla_export.allocation.setting import parse_setting
from qvla_export.baselines.environment import BaselineEnvironment
from qvla_export.cli.app import app
from qvla_export.pipeline.bench.changed_outputs import change_under, outputs_of
from qvla_export.pipeline.bench.weights import bench_weights
from qvla_export.pipeline.bench.weights_figures import WeightsComparison, WeightsRequest
from qvla_export.pipeline.policy_source import open_checkpoint
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies import families
from qvla_export.policies.backbones.text_policy import TextPolicy
from qvla_export.policies.families import find_backbone
from qvla_export.policies.layers import replaced_weights, weight_rows
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.errors import CheckpointError, QvlaError

# As they are before this module makes tiny ones known.
REAL = dict(families.BACKBONES)
NOWHERE = BaselineEnvironment(Path("nowhere"))


@pytest.fixture(scope="module", autouse=True)
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install_tiny_backbones(tmp_path_factory.mktemp("site"), patch)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("weights") / "run")


@pytest.fixture(scope="module")
def compared(run: RunFolder) -> WeightsComparison:
    request = WeightsRequest("texts", (4, 2), ("rtn", "fisher"), count=8, held_out=6)
    return bench_weights(run, request, NOWHERE)


def test_ours_is_no_larger_and_nearer(compared: WeightsComparison) -> None:
    rows = {(row.bits, row.method): row for row in compared.rows}
    assert list(rows) == [(b, m) for b in (4, 2) for m in ("ours", "rtn", "fisher")]
    for bits in (4, 2):
        ours, other = rows[bits, "ours"], rows[bits, "rtn"]
        assert 0.9 * other.weight_bytes < ours.weight_bytes <= other.weight_bytes
        assert 0 < ours.relative_error < other.relative_error
        assert ours.cosine > other.cosine
        assert ours.ours_over is None and other.ours_over is not None
        ratio = other.ours_over
        assert ratio.low < ratio.value < min(1, ratio.high)
    assert rows[4, "rtn"].relative_error < rows[2, "rtn"].relative_error
    assert compared.float_nll is not None and rows[2, "rtn"].nll != compared.float_nll


def test_finished_work_is_kept_and_the_command_prints_it(
    compared: WeightsComparison, run: RunFolder
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*.safetensors")}
    assert {run.moments, run.sensitivities} < set(before)
    words = ["bench", "weights", "--run", str(run.root), "--model", "texts", "--bits", "4, 2"]
    words += ["--methods", "rtn,fisher", "--count", "8", "--held-out", "6"]
    outcome = CliRunner().invoke(app, [*words, "--json"])
    assert outcome.exit_code == 0, outcome.output
    printed = json.loads(outcome.stdout)
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*.safetensors")} == before
    assert json.loads((run.root / "weights.json").read_text()) == printed
    expected = json.loads(json.dumps(compared.to_json()))
    assert printed["rows"] == expected["rows"]
    text = CliRunner().invoke(app, words).stdout
    assert "nats a token" in text and "6 held-out observations" in text
    outcome = CliRunner().invoke(app, [*words[:-1], "4"])
    assert "name another run folder" in str(outcome.exception).lower()


def test_our_codes_are_tuned_where_that_is_asked_for(
    compared: WeightsComparison, run: RunFolder
) -> None:
    request = replace(compared.request, bits=(2,), tune_codes=True)
    ours, other, _ = bench_weights(run, request, NOWHERE).rows
    assert BitPlan.load(run.plan(parse_setting("w2"))).quantizer.tuned_codes
    before = next(row for row in compared.rows if (row.bits, row.method) == (2, "ours"))
    assert ours.weight_bytes == before.weight_bytes
    assert ours.relative_error != before.relative_error
    assert ours.relative_error < other.relative_error


def test_what_cannot_be_done_is_refused_before_work(tmp_path: Path) -> None:
    def refusal(kind: type[QvlaError], request: WeightsRequest) -> str:
        with pytest.raises(kind) as caught:
            bench_weights(RunFolder(tmp_path / "run"), request, NOWHERE)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "one of pictures, texts" in refusal(CheckpointError, WeightsRequest("x", (4,), ("rtn",)))
    assert "got 3 bits; max" in refusal(QvlaError, WeightsRequest("texts", (3,), ("rtn",)))
    assert "gptq is run at" in refusal(QvlaError, WeightsRequest("texts", (5,), ("gptq",)))
    assert "must be one of" in refusal(QvlaError, WeightsRequest("texts", (4,), ("hqq",)))
    assert "at least one width" in refusal(QvlaError, WeightsRequest("texts", (), ("rtn",)))
    assert "make baselines-env" in refusal(QvlaError, WeightsRequest("texts", (4,), ("gptq",)))
    outcome = CliRunner().invoke(app, ["bench", "weights", "--run", "r", "--bits", "four"])
    assert "as in 4,3,2; got 'four'" in str(outcome.exception)


def test_a_change_is_counted_of_each_observation(tmp_path: Path) -> None:
    find_backbone("texts").put(tmp_path / "network")
    policy = open_checkpoint(tmp_path / "network")
    assert isinstance(policy, TextPolicy)
    seen = draw_texts(5, 1, 0, "blank").observations
    before = outputs_of(policy, seen)
    assert before.surprise is not None and before.surprise.shape == (5,)
    name = "language_model.layers.0.mlp.down_proj"
    layers = policy.layers()
    doubled = replaced_weights(layers, {name: 2 * weight_rows(layers[name])})
    change = change_under(policy, seen, before, doubled)
    batch = policy.batch(seen)
    with replaced_weights(layers, {name: 2 * weight_rows(layers[name])}):
        after = policy.normalized_actions(batch).double().numpy()
        logits = policy.token_logits(batch)
    old = before.values.astype(np.float64)
    lengths = np.linalg.norm((after - old).reshape(5, -1), axis=1)
    expected = lengths / np.linalg.norm(old.reshape(5, -1), axis=1)
    np.testing.assert_allclose(change.relative, expected, rtol=1e-4)
    assert (change.cosine < 1).all() and (change.cosine > -1).all()
    assert logits is not None and change.surprise is not None
    log_shares = logits.double().log_softmax(dim=-1).numpy()
    said = batch.input_ids.numpy()
    of_third = [-log_shares[2, t, said[2, t + 1]] for t in range(said.shape[1] - 1)]
    np.testing.assert_allclose(change.surprise[2], np.mean(of_third), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the packages are installed: they load, read, and ours is nearer at 2 bits."""
    monkeypatch.setattr(families, "BACKBONES", REAL)
    for name in REAL:
        try:
            find_backbone(name).file.path()
        except CheckpointError as error:
            pytest.skip(str(error))
    find_backbone("smollm2-135m").put(tmp_path / "network")
    read = outputs_of(open_checkpoint(tmp_path / "network"), draw_texts(8, 1, 0, "blank").held_out)
    assert read.surprise is not None and read.surprise.mean() < 4.5
    request = WeightsRequest("dinov2-small", (2,), ("rtn",), count=4, held_out=4)
    ours, other = bench_weights(RunFolder(tmp_path / "run"), request, NOWHERE).rows
    assert ours.weight_bytes <= other.weight_bytes
    assert ours.relative_error < other.relative_error
