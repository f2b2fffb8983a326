"""`qvla compare`: a tiny comparison end to end, what it keeps, what everybody plays."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_datasets import write_small_dataset
from typer.testing import CliRunner, Result

from calibration.benchmarks.evaluation import CONTROLS, EpisodeResult, Evaluation, RolloutConfig
from qvla_export.allocation.setting import Setting
from qvla_export.cli.app import app
from qvla_export.comparison.bars import bars
from qvla_export.comparison.comparison import Comparison
from qvla_export.comparison.contestants import TABLES
from qvla_export.pipeline import evaluate, fake_quantized
from qvla_export.pipeline.compare import seed_folder
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.errors import QvlaError

CONTESTANTS = "w4@nearest,w4-rtn,w4-layer@nearest,w4a4@nearest,w4@2+nearest,w4,w4-gptq"
Compare = Callable[..., Result]


@pytest.fixture(scope="module")
def compare(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    demos = write_small_dataset(tmp_path_factory.mktemp("compare") / "demos", [6] * 12)

    def run(folder: Path, *more: object) -> Result:
        arguments = [
            *("compare", "--policy", tiny_checkpoint, "--dataset", demos, "--run", folder),
            *("--contestants", CONTESTANTS, "--seeds", "0,3", "--episodes", 0, "--count", 4),
            *("--held-out", 3, "--along-episodes", 6, "--environment", folder / "none", *more),
        ]
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="module")
def compared(compare: Compare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "run"
    done = compare(folder)
    assert done.exit_code == 0, (done.output, done.exception)
    return folder


def artifacts(folder: Path) -> dict[Path, tuple[int, str]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder): (p.stat().st_mtime_ns, sha256_file(p)) for p in files}


def test_every_contestant_is_measured_in_every_seed(compared: Path) -> None:
    found = Comparison.load(compared / "comparison.json")
    # The library's environment is missing: it is left out, the others are there.
    assert {row.name for row in found.rows} == {"float", *CONTESTANTS.split(",")[:-1]}
    for row in found.rows:
        assert [seed.seed for seed in row.seeds] == [0, 3]
        # Only uniform widths depend on nothing that a seed draws.
        assert len({seed.digest for seed in row.seeds}) == (1 if row.name == "w4-rtn" else 2)
        assert all(seed.held_out == 3 for seed in row.seeds)
    by_name = {row.name: row for row in found.rows}
    assert by_name["float"].rms < 1e-5 < by_name["w4"].rms < by_name["w4a4@nearest"].rms
    assert by_name["w4-rtn"].mean_cost("bits_per_channel") == 4
    assert by_name["w4"].weight_bytes <= by_name["w4-rtn"].weight_bytes
    # Stages that were kept have the seconds of the run that made them.
    assert {"sensitivities", "plan"} <= set(by_name["w4@nearest"].seeds[0].seconds)
    assert set(by_name["w4-rtn"].seeds[0].seconds) == {"plan"}
    compensated = by_name["w4"].seeds[0].seconds
    assert set(compensated) == {"moments", "sensitivities", "plan", "rounding"}
    assert (compared / "seed-0" / "first-2" / "settings" / "w4" / "plan.json").is_file()
    assert {tuple(sums) for sums in found.modules.values()} == {tuple(found.channels)}
    assert all(len(values) == 101 for values in found.channels.values())
    assert found.ranks is not None
    assert found.ranks.observations == (4, 6)
    assert 0 < found.ranks.near_diagonal <= 1


def test_what_is_there_is_kept(compare: Compare, compared: Path) -> None:
    before = artifacts(compared)
    for more in ((), ("--page-only",)):
        assert compare(compared, *more).exit_code == 0
        after = artifacts(compared)
        pages = {path for path in before if after[path] != before[path]}
        # Pages are drawn anew, and say the same.
        assert {str(path) for path in pages} <= {"comparison.html", "comparison.md"}
        assert {k: digest for k, (_, digest) in after.items()} == {
            k: digest for k, (_, digest) in before.items()
        }


def test_a_run_that_died_goes_on(compare: Compare, compared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compared, tmp_path / "run")
    before = artifacts(folder)
    # As if killed within the second seed, before anything of the whole was written.
    (folder / "comparison.json").unlink()
    shutil.rmtree(folder / "seed-3" / "settings" / "w4")
    (folder / "seed-3" / "settings" / "w4-layer" / "action_error.json").write_text("{")
    again = compare(folder)
    assert again.exit_code == 0, (again.output, again.exception)
    found, wanted = (Comparison.load(f / "comparison.json") for f in (folder, compared))
    for row, expected in zip(found.rows, wanted.rows, strict=True):
        assert (row.name, row.rms, row.weight_bytes) == (
            expected.name,
            expected.rms,
            expected.weight_bytes,
        )
    kept = Path("seed-0") / "sensitivities.safetensors"
    assert artifacts(folder)[kept] == before[kept]


def test_a_kill_between_stages_loses_one_stage(
    compare: Compare, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compared, tmp_path / "run")
    shutil.rmtree(folder / "seed-0" / "first-2" / "settings")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(seed_folder, "_folder_of_first", die)
        assert compare(folder).exit_code != 0
    kept = Comparison.load(folder / "comparison.json")
    assert kept.row("w4@nearest") is not None
    assert compare(folder).exit_code == 0
    found = Comparison.load(folder / "comparison.json")
    expected = Comparison.load(compared / "comparison.json").row("w4@2+nearest")
    assert expected is not None
    again = found.row("w4@2+nearest")
    assert again is not None
    assert (again.rms, again.weight_bytes) == (expected.rms, expected.weight_bytes)


def test_all_play_the_same_episodes(
    compare: Compare, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compared, tmp_path / "run")
    played: list[tuple[str, str, int]] = []

    def play(
        run: RunFolder, setting: Setting, config: RolloutConfig, source: Any, workers: int, _: Any
    ) -> Evaluation:
        played.append((setting.name, config.control, config.seed))
        tasks = config.runnable().tasks
        results = tuple(
            EpisodeResult(task, config.seed + i, setting.kind == "float", 8, (0.25, 0.5))
            for i in range(config.episodes)
            for task in tasks
        )
        return Evaluation(setting.name, "digest", config, results, {})

    monkeypatch.setattr(evaluate, "rollouts", play)
    monkeypatch.setattr(fake_quantized, "rollouts", play)
    told = ("--episodes", 2, "--tasks", "drawer-open,handle-press", "--along-episodes", 0)
    done = compare(folder, *told, "--episodes-for", "w4,w4a4@nearest")
    assert done.exit_code == 0, (done.output, done.exception)
    found = Comparison.load(folder / "comparison.json")
    seeds = [1_000_000, 1_030_000]
    assert played == [
        *(("float", control, seed) for control in CONTROLS for seed in seeds),
        *((name, "none", seed) for name in ("w4", "w4a4") for seed in seeds),
    ]
    engines = {row.name: row.engines for row in found.rows}
    assert (engines["w4"], engines["w4a4@nearest"], engines["w4-rtn"]) == (
        "onnxruntime",
        "torch",
        "torch",
    )
    reference, ours = found.row("float"), found.row("w4")
    assert reference is not None
    assert ours is not None
    paired = ours.against(reference)
    assert paired is not None
    assert (paired.episodes, paired.lost, ours.success) == (8, 8, 0)
    assert ours.cumulative == (0.25, 0.75)
    # One of the two tasks shares its scene with another.
    assert {name: len(o) for name, o in found.controls.items()} == {
        "blank-image": 8,
        "wrong-instruction": 4,
    }
    # Episodes of the same thing stay where only errors are measured again.
    played.clear()
    assert compare(folder, *told, "--episodes-for", "float").exit_code == 0
    kept = Comparison.load(folder / "comparison.json").row("w4a4@nearest")
    assert kept is not None
    assert kept.success == 0


def test_the_page_has_every_table_and_figure(compared: Path) -> None:
    page = (compared / "comparison.html").read_text()
    for table in TABLES:
        assert f"Table {table.number}: {table.title}" in page
    for figure in ("Fig. 1a", "Fig. 1b", "Fig. 7", "Error against bytes"):
        assert f"<h3>{figure}" in page
    assert not re.search(r"(src|href)=\"http", page)
    text = (compared / "comparison.md").read_text()
    assert re.search(r"\| 2, weights only, 4 bits \| w4 [\d.e-]+ \(", text)
    for bar in bars(Comparison.load(compared / "comparison.json")):
        assert f"{bar.requirement}: **{bar.verdict}** ({bar.result})" in text


def test_wrong_options_are_refused(compare: Compare, tmp_path: Path) -> None:
    for more, told in (
        (("--seeds", "0,x"), "--seeds takes numbers"),
        (("--contestants", "w4-nothing"), "a setting is"),
        (("--contestants", "w4-rtn@4"), "only planned"),
    ):
        refused = compare(tmp_path / "run", *more)
        assert isinstance(refused.exception, QvlaError)
        assert told in str(refused.exception)
    assert not (tmp_path / "run").exists()
