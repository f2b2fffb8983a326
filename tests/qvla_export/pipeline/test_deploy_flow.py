"""A checkpoint whose program repeats a step goes all the way to a served bundle; so does ACT's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from act_cases import SIDES, write_tiny_act
from command_runs import qvla
from family_cases import FAMILY_CASES
from pi_cases import SLOTS, write_tiny_pi
from small_datasets import write_small_dataset
from smolvla_cases import ACTION, CAMERAS, STATE, write_tiny_smolvla

from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.bundle import Bundle


@dataclass(frozen=True)
class Deployed:
    write: Callable[[Path], Path]
    # Numbers of a demonstrated state and action.
    dims: tuple[int, int]
    cameras: tuple[str, ...]
    # Height and width of a demonstrated picture.
    sides: tuple[int, int] = field(default=(28, 28), kw_only=True)
    # Calls of each part for one action, and the span of the repeated one; "" for none.
    calls: dict[str, int]
    span: str


def write_pi0(path: Path) -> Path:
    return write_tiny_pi(path, state_dim=7, cameras=SLOTS[:1])


def write_pi05(path: Path) -> Path:
    return write_tiny_pi(path, adaptive=True, state_dim=7, cameras=SLOTS[:1])


_FLOW = {"prefix": 1, "step": 4}
POLICIES = {
    "pi0": Deployed(write_pi0, (7, 7), SLOTS[:1], _FLOW, "flow"),
    "pi05": Deployed(write_pi05, (7, 7), SLOTS[:1], _FLOW, "flow"),
    "smolvla": Deployed(
        write_tiny_smolvla, (STATE, ACTION), CAMERAS, {"prefix": 1, "step": 3}, "flow"
    ),
    "diffusion": Deployed(FAMILY_CASES["diffusion"].write, (4, 4), ("image",), _FLOW, "denoise"),
    "act": Deployed(write_tiny_act, (STATE, ACTION), CAMERAS, {"policy": 1}, "", sides=SIDES),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", POLICIES)
def test_deploy_of_a_policy(name: str, tmp_path: Path) -> None:
    case = POLICIES[name]
    checkpoint = case.write(tmp_path / "checkpoint")
    state_dim, action_dim = case.dims
    demonstrations = write_small_dataset(
        tmp_path / "demos", [6] * 10, case.sides, state_dim, action_dim, case.cameras
    )
    run, settings = tmp_path / "run", ("float", "w4", "w8a8", "w4a8")
    columns = [("--camera", f"{camera}=observation.images.{camera}") for camera in case.cameras]
    done = qvla(
        *("deploy", "--policy", checkpoint, "--dataset", demonstrations, "--run", run),
        *("--settings", ",".join(settings), "--episodes", 0, "--count", 6, "--held-out", 6),
        *(text for column in columns for text in column),
        *("--check-pairs", 6, "--samples", 5),
    )
    assert done.code == 0, done.err
    assert "Layers that stay in 16 bits" in RunFolder(run).report.read_text()
    kept = Sensitivities.load(RunFolder(run).kept_layers)
    assert all(np.isfinite(values).all() for values in kept.values.values())
    for setting in settings:
        bundle = Bundle.load(run / "settings" / setting / "bundle")
        assert bundle.program.calls == case.calls
    packed = run / "settings" / "w4" / "bundle"
    told = qvla("profile", packed, "--samples", 3)
    assert told.code == 0 and (f"engine.{case.span}" if case.span else "engine") in told.out
    predicted = qvla("predict", packed, "--target", "orin-jp7")
    assert predicted.code == 0, predicted.err
    assert "predicted, not measured" in predicted.out and " ms " in predicted.out
