"""A checkpoint that decodes token by token goes all the way to a served bundle."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import qvla
from openvla_cases import write_tiny_openvla
from small_datasets import write_small_dataset
from univla_cases import write_tiny_univla

from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.bundle import Bundle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "calls"),
    [
        (write_tiny_openvla, {"prefix": 1, "decoder": 7}),
        (write_tiny_univla, {"prefix": 1, "decoder": 4, "visual": 1, "action": 1}),
    ],
)
def test_deploy_of_a_policy_that_decodes(
    tmp_path: Path, write: Callable[[Path], Path], calls: dict[str, int]
) -> None:
    checkpoint = write(tmp_path / "checkpoint")
    demonstrations = write_small_dataset(tmp_path / "demos", [6] * 10, dims=7)
    run = tmp_path / "run"
    done = qvla(
        *("deploy", "--policy", checkpoint, "--dataset", demonstrations, "--run", run),
        *("--settings", "float,w4,w8a8", "--episodes", 0, "--count", 6, "--held-out", 6),
        *("--camera", "full_image=observation.images.image", "--state-column", ""),
        *("--check-pairs", 6, "--samples", 5),
    )
    assert done.code == 0, done.err
    assert RunFolder(run).report.is_file()
    for setting in ("float", "w4", "w8a8"):
        bundle = Bundle.load(run / "settings" / setting / "bundle")
        assert bundle.program.calls == calls
    told = qvla("profile", run / "settings" / "w4" / "bundle", "--samples", 3)
    assert told.code == 0 and "engine.decode" in told.out
