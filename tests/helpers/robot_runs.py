"""Python in a process of its own, as a robot starts it."""

import subprocess
import sys

from places import ROOT


def run_on_robot(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
