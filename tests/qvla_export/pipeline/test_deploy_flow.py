"""A checkpoint that integrates a flow goes all the way to a served bundle."""

from pathlib import Path

import pytest
from command_runs import qvla
from pi_cases import SLOTS, write_tiny_pi
from small_datasets import write_small_dataset

from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.bundle import Bundle


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])
def test_deploy_of_a_flow(adaptive: bool, tmp_path: Path) -> None:
    checkpoint = write_tiny_pi(tmp_path / "checkpoint", adaptive, state_dim=7, cameras=SLOTS[:1])
    demonstrations = write_small_dataset(tmp_path / "demos", [6] * 10, dims=7)
    run = tmp_path / "run"
    done = qvla(
        *("deploy", "--policy", checkpoint, "--dataset", demonstrations, "--run", run),
        *("--settings", "float,w4,w8a8", "--episodes", 0, "--count", 6, "--held-out", 6),
        *("--camera", f"{SLOTS[0]}=observation.images.image"),
        *("--check-pairs", 6, "--samples", 5),
    )
    assert done.code == 0, done.err
    assert RunFolder(run).report.is_file()
    for setting in ("float", "w4", "w8a8"):
        bundle = Bundle.load(run / "settings" / setting / "bundle")
        assert bundle.program.calls == {"prefix": 1, "step": 4}
    told = qvla("profile", run / "settings" / "w4" / "bundle", "--samples", 3)
    assert told.code == 0 and "engine.flow" in told.out
