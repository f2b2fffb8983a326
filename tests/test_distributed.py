"""Several processes measure what one does; a killed one's work is not lost."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_checkpoint

from qvla_export.errors import QvlaError
from qvla_export.first_order import FirstOrder, measure_first_order
from qvla_export.observation import Observation
from qvla_export.policies.oft import OftPolicy
from qvla_export.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity import Sensitivities
from qvla_export.sharded_sums import journal_files, remove_journals

QUANTIZER = QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()})
SETTINGS = FirstOrder(QUANTIZER, probes=3, batch_size=2)
Make = Callable[..., list[Observation]]

# Process `fatal` dies after its second batch; -1 for none.
_SHARE = """
import os, pathlib, pickle, sys, torch
from qvla_export.distributed import joined_world
from qvla_export.first_order import measure_first_order
from qvla_export.observation import Observation
from qvla_export.policies.oft import load_oft_policy
torch.set_num_threads(1)
folder, fatal = pathlib.Path(sys.argv[1]), int(sys.argv[2])
plain, settings = pickle.loads((folder / "arguments").read_bytes())
observations = [Observation(*item) for item in plain]
policy = load_oft_policy(folder / "checkpoint")
calls = []
def tell(done, whole):
    calls.append(done)
    if fatal == int(os.environ["RANK"]) and len(calls) == 2:
        os.kill(os.getpid(), 9)
with joined_world() as world:
    table = measure_first_order(
        policy, observations, "c", settings, folder / "progress", tell, world
    )
    (folder / f"calls.{world.rank}").write_text(str(len(calls)))
    if world.rank == 0:
        table.save(folder / "done")
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_observations: Make) -> Path:
    write_tiny_checkpoint(tmp_path / "checkpoint")
    plain = [(dict(o.images), o.instruction, o.state) for o in tiny_observations(11)]
    (tmp_path / "arguments").write_bytes(pickle.dumps((plain, SETTINGS)))
    return tmp_path


def together(folder: Path, processes: int, fatal: int = -1) -> int:
    script = folder / "share.py"
    script.write_text(_SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script), str(folder), str(fatal)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode


def assert_same(found: Sensitivities, expected: Sensitivities) -> None:
    """Sums in float64 in another order: at most the last bit of float32 differs."""
    assert found.samples == expected.samples
    for name, values in expected.values.items():
        np.testing.assert_array_max_ulp(found.values[name], values, maxulp=1)


def test_two_processes_give_the_numbers_of_one(
    folder: Path, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    assert together(folder, 2) == 0
    alone = measure_first_order(tiny_policy, tiny_observations(11), "c", SETTINGS)
    assert_same(Sensitivities.load(folder / "done"), alone)
    # Six batches, three each.
    assert [(folder / f"calls.{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


@pytest.mark.parametrize("again", [1, 2])
def test_a_killed_process_loses_nothing_and_another_number_goes_on(
    folder: Path, tiny_policy: OftPolicy, tiny_observations: Make, again: int
) -> None:
    assert together(folder, 2, fatal=1) != 0
    assert not (folder / "done").exists()
    kept = journal_files(folder / "progress")
    assert folder / "progress.1" in kept
    assert together(folder, again) == 0
    calls = sum(int((folder / f"calls.{rank}").read_text()) for rank in range(again))
    assert calls <= 4  # the killed process had written two of six batches
    alone = measure_first_order(tiny_policy, tiny_observations(11), "c", SETTINGS)
    assert_same(Sensitivities.load(folder / "done"), alone)
    remove_journals(folder / "progress")
    assert not list(folder.glob("progress*"))


@pytest.mark.parametrize("probes", [None, 2])
def test_groups_of_layers_give_the_same_numbers(
    tiny_policy: OftPolicy, tiny_observations: Make, probes: int | None
) -> None:
    settings = replace(SETTINGS, probes=probes)
    whole = measure_first_order(tiny_policy, tiny_observations(5), "c", settings)
    cut = replace(settings, max_bytes=1_000_000)
    grouped = measure_first_order(tiny_policy, tiny_observations(5), "c", cut)
    for name, values in whole.values.items():
        np.testing.assert_array_equal(grouped.values[name], values)


def test_a_bound_that_no_layer_fits_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    with pytest.raises(QvlaError, match=r"alone needs .* GB, more than the bound"):
        measure_first_order(
            tiny_policy, tiny_observations(2), "c", replace(SETTINGS, max_bytes=1000)
        )
