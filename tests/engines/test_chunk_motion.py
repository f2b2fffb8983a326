"""How smooth chunks are: figures of a drawn chunk by hand, what does not change them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from engines.chunk_motion import chunk_motion
from qvla_export.shared.normalization import Affine, Bounds

CHUNKS = arrays(np.float32, (3, 5, 4), elements=st.floats(-1, 1, width=32))


def bounds_of(low: list[float], high: list[float], mask: list[bool]) -> Bounds:
    return Bounds(np.array(low), np.array(high), np.array(mask))


FOUR = bounds_of([-1.0] * 4, [1.0] * 4, [True] * 4)


def test_a_parabola_s_jerk_is_its_second_difference_and_the_gripper_s_is_left_out() -> None:
    steps = np.arange(6, dtype=np.float32)
    chunk = np.zeros((1, 6, 4), np.float32)
    chunk[0, :, 0] = 0.01 * steps * steps
    chunk[0, :, 3] = [1, -1, -1, 1, 1, -1]
    motion = chunk_motion(np.concatenate([chunk, 0 * chunk]), FOUR)
    # 0.02 in one of three dimensions, in one of two observations.
    assert motion.jerk_rms == pytest.approx(0.02 / np.sqrt(6), rel=1e-5)
    assert (motion.gripper_flips, motion.grippers) == (1.5, (3,))


def test_grippers_are_the_named_ones_in_their_own_range() -> None:
    """OpenVLA's seven, whose gripper is 0 or 1 and not normalized; z-scores whose mean is 0.7."""
    chunk = np.zeros((1, 4, 7), np.float32)
    chunk[0, :, 6] = [0.1, 0.4, 0.6, 0.9]
    seven = bounds_of([-1.0] * 6 + [0.0], [1.0] * 6 + [1.0], [True] * 6 + [False])
    motion = chunk_motion(chunk, seven)
    assert (motion.grippers, motion.gripper_flips, motion.jerk_rms) == ((6,), 1.0, 0.0)
    score = np.array([[[-0.6], [-0.4], [-0.1], [0.1]]], np.float32)
    ones = np.ones(1)
    affine = Affine(0 * ones, ones, np.array([True]), 0.7 * ones, ones, ones)
    # From 0.1, 0.3, 0.6, 0.8.
    assert chunk_motion(score, affine).gripper_flips == 1.0


@pytest.mark.parametrize("horizon", [1, 2])
def test_chunks_too_short_for_a_jerk_have_none(horizon: int) -> None:
    motion = chunk_motion(np.ones((2, horizon, 4), np.float32), FOUR)
    assert (motion.jerk_rms, motion.gripper_flips) == (None, 0.0)
    assert motion.against(motion, "float") == "gripper (3) flips 0.000 times, float 0.000"


def test_motion_is_told_beside_another_s() -> None:
    chunk = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    rough = chunk.copy()
    rough[:, :, :3] *= 1.5
    text = chunk_motion(rough, FOUR).against(chunk_motion(chunk, FOUR), "full precision")
    assert "+50.0% of full precision's; gripper (3) flips " in text


@given(CHUNKS, st.permutations(range(3)), st.floats(-0.5, 0.5, width=32))
def test_where_a_chunk_begins_and_the_order_of_observations_change_nothing(
    chunks: NDArray[np.float32], order: Any, moved: float
) -> None:
    motion = chunk_motion(chunks, FOUR)
    assert motion.jerk_rms is not None and 0 <= motion.gripper_flips <= 4
    elsewhere = chunks[order].copy()
    elsewhere[:, :, :3] += np.float32(moved)
    again = chunk_motion(elsewhere, FOUR)
    assert again.jerk_rms == pytest.approx(motion.jerk_rms, abs=1e-6)
    assert again.gripper_flips == motion.gripper_flips
