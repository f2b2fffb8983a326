"""A layer of all widths, as bundles store it, is one launch with the numbers of its graph."""

import pytest
from interpreter_runs import run_interpreted

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")


def test_a_layer_is_one_launch_under_the_interpreter() -> None:
    assert run_interpreted("interpreted_layers.py", timeout_s=300).splitlines() == [
        "expanded: [2, 4, 8, 16]",
        "halves: [2, 4, 8, 16]",
        "rounded halves: [2, 4, 8, 16]",
    ]
