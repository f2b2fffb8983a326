"""Several processes measure what one does; a killed one's work is not lost; none waits for ever."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import HELPERS, ROOT
from small_datasets import write_small_dataset
from tiny_policy import write_tiny_checkpoint

from calibration.sources.lerobot import LeRobotDataset
from qvla_export.cli.app import app
from qvla_export.measurement.distributed import Placement, choose_placement
from qvla_export.measurement.sharded_sums import ShardedSums, journal_files
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.tensor_files import read_tensor_file

Make = Callable[..., list[Observation]]
BATCHES = 6  # of 2 observations
SETTINGS = FirstOrder(
    QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()}),
    probes=3,
    batch_size=2,
)


@dataclass(frozen=True)
class Case:
    """A run folder with 11 observations, and what one process measures on them."""

    run: RunFolder
    checkpoint: Path
    alone: Sensitivities

    @property
    def journal(self) -> Path:
        return self.run.sensitivities.with_suffix(".progress")

    @property
    def kept_units(self) -> set[int]:
        found: set[int] = set()
        for path in journal_files(self.journal):
            found |= set(read_tensor_file(path, "qvla-progress-2", "progress")[1]["units"])
        return found

    def measure(self, *more: str) -> Sensitivities:
        """Run the command in this process."""
        app(["sensitivities", *self.arguments, *more], standalone_mode=False)
        return Sensitivities.load(self.run.sensitivities)

    @property
    def arguments(self) -> list[str]:
        found = ["--run-folder", str(self.run.root), "--policy", str(self.checkpoint)]
        # Nearest codes: sums alone are shared, and no moments are measured before.
        return [*found, "--batch-size", "2", "--probes", "2", "--quantizer", "nearest"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("together")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    demos = LeRobotDataset(write_small_dataset(folder / "demos", [6] * 8))
    case = Case(RunFolder(folder / "run"), checkpoint, None)  # type: ignore[arg-type]  # follows
    calibrate(case.run, CalibrationRequest(demos, (), 11, 4))
    return replace(case, alone=case.measure())


@pytest.fixture
def case(measured: Case, tmp_path: Path) -> Case:
    (tmp_path / "calibration").symlink_to(measured.run.calibration)
    return replace(measured, run=RunFolder(tmp_path))


def together(
    case: Case, processes: int, trouble: str = "none -1 0", launcher: str = "", more: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command under torchrun, on loopback and a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", str(HELPERS / "fatal_worker.py"), *trouble.split()]
    command += ["sensitivities", *case.arguments, *more.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def assert_same(found: Sensitivities, expected: Sensitivities) -> None:
    """Sums in float64 in another order: at most the last bit of float32 differs."""
    assert found.samples == expected.samples == 11
    assert found.standard_error == expected.standard_error
    assert list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        np.testing.assert_array_max_ulp(found.values[name], values, maxulp=1)


def test_two_processes_give_the_numbers_of_one(case: Case) -> None:
    done = together(case, 2)
    assert done.returncode == 0, done.stderr
    assert_same(Sensitivities.load(case.run.sensitivities), case.alone)
    assert done.stdout.count("sensitivities: ") == 1, "process 0 speaks for all"
    left = {path.name for path in case.run.root.iterdir()}
    record = "sensitivities.safetensors.work"
    assert left == {"calibration", "sensitivities.safetensors", record}


def test_what_a_killed_process_kept_is_not_measured_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = together(case, 2, "kill 1 2")
    assert done.returncode != 0
    assert not case.run.sensitivities.exists()
    kept = case.kept_units
    assert {1, 3} <= kept < set(range(BATCHES)), "the killed process had marked two"
    marked = []
    original = ShardedSums.mark
    monkeypatch.setattr(ShardedSums, "mark", lambda s, u: (marked.append(u), original(s, u)))
    assert_same(case.measure(), case.alone)
    assert set(marked) == set(range(BATCHES)) - kept
    assert not journal_files(case.journal)


@pytest.mark.slow
@pytest.mark.parametrize("again", [2, 3])
def test_another_number_of_processes_goes_on_after_a_kill(case: Case, again: int) -> None:
    assert together(case, 2, "kill 0 2").returncode != 0
    assert {0, 2} <= case.kept_units
    assert not case.run.sensitivities.exists()
    done = together(case, again)
    assert done.returncode == 0, done.stderr
    assert_same(Sensitivities.load(case.run.sensitivities), case.alone)


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(case: Case) -> None:
    done = together(case, 2, "kill 1 2", "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert_same(Sensitivities.load(case.run.sensitivities), case.alone)
    assert not journal_files(case.journal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("raise 1 1", "error: process 1 of 2: the camera of this observation is upside down"),
        ("hang 1 1", "error: process 0 of 2: another process of this measurement ended or did not"),
    ],
)
def test_trouble_of_one_process_ends_all(case: Case, trouble: str, message: str) -> None:
    done = together(case, 2, trouble, more="--wait-minutes 0.1")
    assert done.returncode != 0
    assert message in done.stderr
    assert not case.run.sensitivities.exists()


@pytest.mark.parametrize(
    ("wanted", "gpus", "rank", "size", "expected"),
    [
        ("auto", 0, 1, 4, Placement("cpu", "gloo")),
        ("auto", 4, 3, 4, Placement("cuda:3", "nccl")),
        ("auto", 2, 0, 1, Placement("cuda:0", "nccl")),
        ("cuda", 1, 0, 1, Placement("cuda:0", "nccl")),
        ("cpu", 2, 3, 4, Placement("cpu", "gloo")),
    ],
)
def test_gpus_talk_over_nccl_and_cpus_over_gloo(
    wanted: str, gpus: int, rank: int, size: int, expected: Placement
) -> None:
    assert choose_placement(wanted, gpus, rank, size) == expected  # type: ignore[arg-type]


def test_processes_without_a_gpu_of_their_own_are_refused() -> None:
    with pytest.raises(QvlaError, match="torch sees none; use --device cpu"):
        choose_placement("cuda", 0)
    with pytest.raises(QvlaError, match=r"3 processes .* 2; .*--nproc-per-node 2"):
        choose_placement("auto", 2, local_rank=0, local_size=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu(case: Case) -> None:
    found = case.measure("--device", "cuda")
    for name, values in case.alone.values.items():
        scale = float(values.max())
        np.testing.assert_allclose(found.values[name], values, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("probes", [None, 2])
def test_groups_of_layers_give_the_same_numbers(
    tiny_policy: OftPolicy, tiny_observations: Make, probes: int | None
) -> None:
    settings = replace(SETTINGS, probes=probes)
    whole = measure_first_order(tiny_policy, tiny_observations(5), "c", settings)
    cut = replace(settings, max_bytes=2_000_000)
    grouped = measure_first_order(tiny_policy, tiny_observations(5), "c", cut)
    for name, values in whole.values.items():
        np.testing.assert_array_equal(grouped.values[name], values)


def test_a_bound_that_no_layer_fits_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    with pytest.raises(QvlaError, match=r"layer .* needs .* GB; the bound leaves .* raise it by"):
        measure_first_order(
            tiny_policy, tiny_observations(2), "c", replace(SETTINGS, max_bytes=1000)
        )
