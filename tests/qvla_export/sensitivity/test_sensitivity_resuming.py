"""Sensitivities whose measurement was stopped or killed and goes on."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from tiny_policy import write_tiny_checkpoint

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.shared.observation import Observation

QUANTIZER = QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()})
SETTINGS = FirstOrder(QUANTIZER, batch_size=2)
Make = Callable[..., list[Observation]]


@pytest.mark.parametrize("probes", [None, 3])
def test_an_aborted_measurement_resumes_to_the_same_file(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path, probes: int | None
) -> None:
    observations = tiny_observations(5)
    settings = replace(SETTINGS, probes=probes)
    whole = measure_first_order(tiny_policy, observations, "c", settings)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    progress = tmp_path / "progress.safetensors"
    with pytest.raises(KeyboardInterrupt):
        measure_first_order(tiny_policy, observations, "c", settings, progress, stop)
    calls: list[int] = []
    resumed = measure_first_order(
        tiny_policy, observations, "c", settings, progress, lambda done, _: calls.append(done)
    )
    assert calls == [5]
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_progress_of_another_measurement_is_not_used(
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = tmp_path / "progress"
    observations = tiny_observations(2)
    measure_first_order(tiny_policy, observations, "one", SETTINGS, progress)
    calls: list[int] = []
    measure_first_order(
        tiny_policy, observations, "two", SETTINGS, progress, lambda done, _: calls.append(done)
    )
    assert calls == [2]
    assert "another measurement" in caplog.text


_KILLED = """
import pathlib, pickle, sys, torch
from qvla_export.sensitivity.estimators.first_order import measure_first_order
from qvla_export.shared.observation import Observation
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.oft.policy import load_oft_policy
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
plain, settings = pickle.loads((folder / "arguments").read_bytes())
observations = [Observation(*item) for item in plain]
policy = load_oft_policy(folder / "checkpoint")
measure_first_order(policy, observations, "c", settings, folder / "progress").save(folder / "done")
"""


def test_sigkill_and_rerun_give_the_same_file(tmp_path: Path, tiny_observations: Make) -> None:
    write_tiny_checkpoint(tmp_path / "checkpoint")
    plain = [(dict(o.images), o.instruction, o.state) for o in tiny_observations(40)]
    (tmp_path / "arguments").write_bytes(pickle.dumps((plain, SETTINGS)))
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 600
    while not (tmp_path / "progress").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "done").exists()
    subprocess.run(command, env=environment, check=True)
    resumed = (tmp_path / "done").read_bytes()
    (tmp_path / "progress").unlink()
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "done").read_bytes() == resumed
