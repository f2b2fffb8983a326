"""Ridge regression: the normal equations, and no change where nothing predicts better."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_export.quantizer.ridge_regression import RIDGES, least_changes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9))
def test_changes_are_those_of_a_ridge_regression(rows: int, scales: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    slopes = generator.standard_normal((2 * rows, scales)).astype(np.float32)
    misses = slopes.astype(np.float64) @ generator.standard_normal(scales)
    fold = np.repeat([0, 1], rows)
    changes = least_changes(slopes, misses, fold)
    found = np.square(misses + slopes @ changes).sum()
    assert found <= np.square(misses).sum()
    # In the space of scales: the normal equations of one of the ridges, or no change.
    wide = slopes.astype(np.float64)
    square = wide.T @ wide
    unit = np.trace(square) / len(wide)
    solved = [
        np.linalg.solve(square + ridge * unit * np.eye(scales), -wide.T @ misses)
        for ridge in RIDGES
    ]
    assert not changes.any() or any(
        np.allclose(changes, one, rtol=1e-3, atol=1e-4) for one in solved
    )


def test_what_predicts_nothing_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    slopes = generator.standard_normal((16, 40)).astype(np.float32)
    fold = np.repeat([0, 1, 2, 3], 4)
    # Each run of rows asks for the contrary of the one before it.
    slopes[4:] = np.tile(slopes[:4], (3, 1))
    misses = np.tile(generator.standard_normal(4), 4) * np.repeat([1, -1, 1, -1], 4)
    assert not least_changes(slopes, misses, fold).any()
    assert not least_changes(0 * slopes, misses, fold).any()
