"""Scripts of this folder under Triton's interpreter, each in a process of its own."""

import os
import subprocess
import sys

from places import ROOT

_HELPERS = ROOT / "tests" / "helpers"


def run_interpreted(script: str, *arguments: object, timeout_s: int = 570) -> str:
    """Return what a script prints; it fails at the first number that is wrong.

    `make kernels` has QVLA's packages by a path, so QVLA itself must be named to the process.
    """
    run = subprocess.run(
        [sys.executable, _HELPERS / script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{_HELPERS}"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
