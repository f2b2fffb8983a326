"""Finished work: recorded with what it cost, refused where a changed option would discard it."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from command_runs import Inputs, Outcome, listing, qvla

from qvla_export.measurement.peak_memory import high_water_bytes, peak_memory
from qvla_export.pipeline.progress import Progress, ignore
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.work.log import ArtifactWork, Value, cpu_s, peak_bytes, recorded_work
from qvla_export.shared.errors import FinishedWork


def make(
    work: ArtifactWork, seconds: float, notes: int = 0, fault: type[BaseException] | None = None
) -> None:
    """Write a work's artifact at a cost; or be stopped, after so many notes of progress."""
    now = [100.0]
    with recorded_work(work, ignore, cpu_now_s=lambda: now[0]) as hear:
        for _ in range(notes):
            now[0] += seconds / notes
            hear(Progress("units"))
        if fault is not None:
            raise fault
        now[0] = 100.0 + seconds
        work.path.write_text(json.dumps(dict(work.options)))


def work_of(run: RunFolder, name: str, options: Mapping[str, Value], *sources: str) -> ArtifactWork:
    return ArtifactWork(run, run.root / name, options, tuple(run.root / s for s in sources))


def test_work_of_a_minute_is_replaced_and_named_and_longer_work_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = RunFolder(tmp_path)
    make(work_of(run, "table", {"--probes": 4, "--seed": 0}), 60)
    assert cpu_s(run, tmp_path / "table") == 60
    assert not caplog.records
    make(work_of(run, "table", {"--probes": 8, "--seed": 0}), 61)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "table is replaced (60 CPU seconds): --probes was 4, is now 8"
    with pytest.raises(FinishedWork) as refused:
        make(work_of(run, "table", {"--probes": 8, "--seed": 1}), 1)
    for part in ("table took 61 CPU seconds", "--seed was 0, is now 1", "--force", "--run"):
        assert part in str(refused.value)
    assert "--probes" not in str(refused.value)
    assert json.loads((tmp_path / "table").read_text())["--seed"] == 0
    # The same options are the same work: where it is made anew, nothing is lost.
    make(work_of(run, "table", {"--probes": 8, "--seed": 0}), 2)
    make(work_of(RunFolder(tmp_path, force=True), "table", {"--probes": 8, "--seed": 1}), 1)
    assert cpu_s(run, tmp_path / "table") == 1


def test_the_memory_of_work_is_recorded_and_the_highest_counts(tmp_path: Path) -> None:
    """Of a block within another, too; the process's own peak stays what it was."""
    run = RunFolder(tmp_path)
    table = work_of(run, "table", {})
    large = np.ones(100_000_000, np.uint8)
    with peak_memory() as outer, recorded_work(table, ignore):
        large = np.ones(50_000_000, np.uint8)
    high = peak_bytes(run, tmp_path / "table")
    del large
    make(table, 1)
    assert high is not None and outer.peak_bytes is not None and outer.extra_bytes is not None
    assert outer.peak_bytes >= high and outer.extra_bytes >= 45_000_000
    assert peak_bytes(run, tmp_path / "table") == high <= high_water_bytes()
    # Records of earlier versions say nothing of it.
    stated = json.loads(table.record.read_text())
    del stated["peak_bytes"]
    table.record.write_text(json.dumps(stated))
    assert peak_bytes(run, tmp_path / "table") is None
    assert cpu_s(run, tmp_path / "table") is not None


def test_what_was_made_of_an_artifact_counts_with_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make(work_of(run, "set", {"--count": 8}), 1)
    make(work_of(run, "moments", {"set": "a"}, "set"), 30)
    make(work_of(run, "codes", {"moments": "m"}, "moments"), 40)
    make(work_of(run, "other", {}), 1000)
    with pytest.raises(FinishedWork, match=r"set with what was made of it \(moments, codes\)"):
        make(work_of(run, "set", {"--count": 16}), 1)
    forced = RunFolder(tmp_path, force=True)
    make(work_of(forced, "set", {"--count": 16}), 1)
    # Who gave the set up gave its followers up as well, and is not asked again.
    make(work_of(run, "moments", {"set": "b"}, "set"), 30)
    make(work_of(run, "codes", {"moments": "n"}, "moments"), 40)
    with pytest.raises(FinishedWork, match="other took 1000"):
        make(work_of(run, "other", {"--seed": 1}), 1)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_interrupted_work_is_counted_and_goes_on(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(fault):
        make(work_of(run, "table", {"--seed": 0}), 50, notes=5, fault=fault)
    assert cpu_s(run, tmp_path / "table") == 50
    make(work_of(run, "table", {"--seed": 0}), 20)
    assert cpu_s(run, tmp_path / "table") == 70
    with pytest.raises(FinishedWork, match="70 CPU seconds"):
        make(work_of(run, "table", {"--seed": 1}), 1)


def test_a_kill_forgets_no_more_than_some_seconds(tmp_path: Path) -> None:
    run, now = RunFolder(tmp_path), [0.0]
    work = work_of(run, "table", {"--seed": 0})
    with recorded_work(work, ignore, cpu_now_s=lambda: now[0]) as hear:
        for second in range(101):
            now[0] = float(second)
            hear(Progress("units", second, 100))
        noted = cpu_s(run, work.path)
    assert noted is not None and 93 <= noted <= 100


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "qvla.work/1"}', "\0"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    work = work_of(run, "table", {"--seed": 0})
    work.record.write_text(text)
    assert cpu_s(run, work.path) is None
    make(work, 5)
    assert cpu_s(run, work.path) == 5


# Stage -> the option that is changed, and the words of the refusal.
_CHANGES = {
    "calibrate --count 4 --held-out 6": ("calibration", "--count was 6, is now 4"),
    "sensitivities --probes 2": ("sensitivities", "--probes was 4, is now 2"),
    "sensitivities --quantizer nearest": ("sensitivities", "--quantizer was compensated"),
    "moments --largest-block 16": ("moments", "--largest-block was 4096, is now 16"),
    "plan --setting w4 --budget-by weight --budget 3": ("settings/w4/plan.json", "budget was"),
    "export --setting w4 --accuracy-level 4": ("settings/w4/bundle", "--accuracy-level was 0"),
    "deploy --samples 6": ("latency.json", "--samples was 5, is now 6"),
}


def _price(run: Path, seconds: float) -> None:
    """Record other costs of a run's artifacts."""
    for record in run.rglob("*.work"):
        value = json.loads(record.read_text())
        record.write_text(json.dumps({**value, "cpu_s": seconds}))


def _command(text: str, run: Path, inputs: Inputs) -> Outcome:
    name, *options = text.split()
    if name == "deploy":
        return inputs.deploy(run, *options)
    if name == "calibrate":
        options += ["--dataset", str(inputs.dataset)]
    elif name != "plan":
        options += ["--policy", str(inputs.checkpoint)]
    return qvla(name, "--run", run, *options)


@pytest.mark.parametrize("text", _CHANGES)
def test_every_stage_refuses_to_discard_dear_work(
    deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path, text: str
) -> None:
    run = shutil.copytree(deployed[0], tmp_path / "run")
    _price(run, 61)
    before = {name: digest for name, digest in listing(run).items() if name != "run.json"}
    outcome = _command(text, run, inputs)
    artifact, words = _CHANGES[text]
    assert outcome.code == 2
    assert artifact in outcome.error and words in outcome.error and "--force" in outcome.error
    assert before.items() <= listing(run).items()


def test_force_replaces_and_cheap_work_is_named(
    deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path
) -> None:
    run = shutil.copytree(deployed[0], tmp_path / "run")
    _price(run, 61)
    forced = _command("sensitivities --probes 2 --force", run, inputs)
    assert forced.code == 0, forced.err
    assert re.search(r"^sensitivities, first order, full: made, \d+ s$", forced.err, re.M)
    again = _command("sensitivities --probes 2", run, inputs)
    assert "sensitivities, first order, full: kept, 0 s" in again.err
    # What followed from the old ones was given up with them.
    assert _command("plan --setting w4", run, inputs).code == 0
