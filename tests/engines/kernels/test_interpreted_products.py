"""The kernel's numbers, under Triton's interpreter: exact over widths, edges and hostile codes."""

import subprocess
import sys

import pytest
from places import HELPERS, ROOT

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")


def interpreted(count: int, start: int) -> int:
    """Return how many drawn products were equal; the script fails at the first that is not."""
    script = HELPERS / "interpreted_products.py"
    run = subprocess.run(
        [sys.executable, script, str(count), str(start)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return int(run.stdout.split()[0])


def test_drawn_products_are_exact() -> None:
    assert interpreted(25, 0) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2, 3, 4, 5])
def test_many_drawn_products_are_exact(start: int) -> None:
    assert interpreted(100, start) >= 100
