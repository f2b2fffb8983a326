"""A layer of all widths, as bundles store it, is one launch with the numbers of its graph."""

import os
import subprocess
import sys

import pytest
from places import HELPERS, ROOT

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")


def test_a_layer_is_one_launch_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, HELPERS / "interpreted_layers.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{HELPERS}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines() == [
        "expanded: [2, 4, 8, 16]",
        "halves: [2, 4, 8, 16]",
        "rounded halves: [2, 4, 8, 16]",
    ]
