"""The kernel's numbers, under Triton's interpreter: exact over widths, edges and hostile codes."""

import pytest
from interpreter_runs import run_interpreted

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")


def equal_products(count: int, start: int) -> int:
    """Return how many drawn products were equal."""
    return int(run_interpreted("interpreted_products.py", count, start).split()[0])


def test_drawn_products_are_exact() -> None:
    assert equal_products(25, 0) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2, 3, 4, 5])
def test_many_drawn_products_are_exact(start: int) -> None:
    assert equal_products(100, start) >= 100
