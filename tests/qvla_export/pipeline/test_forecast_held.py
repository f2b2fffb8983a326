"""What `qvla deploy --plan-only` says of a policy read part by part, against what is then taken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_writer import Episode, write_dataset
from qvla_export.allocation.setting import parse_setting
from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.work.log import peak_bytes
from qvla_export.policies.oft.random_checkpoint import write_random_checkpoint

SIDE, CAMERAS, W4 = 112, ("full_image", "wrist_image"), parse_setting("w4")
# Large enough that what the steps take is not lost beside the libraries.
MIDDLE = Geometry(
    dino=TransformerSize(64, 256, 2),
    siglip=TransformerSize(64, 256, 2),
    llama=TransformerSize(640, 1728, 2),
    patch_size=14,
    inputs=PolicyInputs(2, SIDE, 30, 8, 7, state_dim=8),
)


def write_demonstrations(path: Path) -> Path:
    with write_dataset(path, 20, "franka") as writer:
        for number in range(4):
            random = np.random.default_rng(number)
            pictures = {
                name: [encode_png(p) for p in random.integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)]
                for name in CAMERAS
            }
            states = np.cumsum(random.normal(0, 0.05, (4, 8)), axis=0).astype(np.float32)
            actions = np.sin(7 * states[:, :7]).astype(np.float32)
            writer.add(Episode("put the bowl on the plate", pictures, states, actions))
    return path


def deploy(folder: Path, *more: str) -> str:
    """Run the command in a process of its own, whose memory is nobody else's."""
    cameras = [f"--camera={name}=observation.images.{name}" for name in CAMERAS]
    line = [sys.executable, "-m", "qvla_export", "deploy", *cameras, "--target", "orin-jp7"]
    line += ["--policy", str(folder / "checkpoint"), "--dataset", str(folder / "demos")]
    line += ["--run", str(folder / "run"), "--count", "4", "--held-out", "2", "--probes", "1"]
    line += ["--settings", "w4", "--max-memory-gb", "0.9", *more]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_and_disk_are_foretold_within_a_quarter(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", MIDDLE)
    write_demonstrations(tmp_path / "demos")
    forecast = json.loads(deploy(tmp_path, "--plan-only", "--json"))
    assert "part by part" in forecast["holding"]
    deploy(tmp_path)
    run = RunFolder(tmp_path / "run")
    written = sum(path.stat().st_size for path in run.root.rglob("*") if path.is_file())
    assert forecast["total"]["disk_bytes"] == pytest.approx(written, rel=0.25)
    artifacts = {
        "calibration": run.calibration,
        "sensitivities": run.sensitivities,
        "w4: plan": run.plan(W4),
        "w4: rounding": run.rounding(W4),
        "w4: bundle": run.bundle(W4),
        "w4: action error": run.action_error(W4),
    }
    peaks = {name: peak_bytes(run, path) for name, path in artifacts.items()}
    foretold = {step["name"]: step["memory_bytes"] for step in forecast["steps"]}
    assert {*foretold} - {*peaks} == {"report"}
    for name, peak in peaks.items():
        assert foretold[name] == pytest.approx(peak, rel=0.25), name
    # Beside what the process has in memory anyway, such as when it draws up a plan.
    for name in ("sensitivities", "w4: rounding"):
        own, idle = peaks[name], peaks["w4: plan"]
        assert own is not None and idle is not None
        assert foretold[name] - foretold["w4: plan"] == pytest.approx(own - idle, rel=0.25), name
