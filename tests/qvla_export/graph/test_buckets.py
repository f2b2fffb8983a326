"""Channel buckets: order, runs and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qvla_export.graph.buckets import bucket_channels
from qvla_export.shared.errors import QvlaError

WIDTH_VECTORS = hnp.arrays(np.int8, st.integers(0, 60), elements=st.sampled_from([0, 2, 4, 8, 16]))


@given(WIDTH_VECTORS)
def test_inverse_restores_the_layer(widths: NDArray[np.int8]) -> None:
    buckets = bucket_channels(widths)
    outputs = np.arange(1.0, len(widths) + 1)
    runs = [outputs[buckets.order[start:stop]] for bits, start, stop in buckets.runs if bits]
    dropped = np.zeros(len(widths) - buckets.computed_channels)
    restored = np.concatenate([*runs, dropped])[buckets.inverse]
    np.testing.assert_array_equal(restored, np.where(widths == 0, 0.0, outputs))
    np.testing.assert_array_equal(buckets.inverse[buckets.order], np.arange(len(widths)))


@given(WIDTH_VECTORS)
def test_runs_cover_the_order_by_falling_width(widths: NDArray[np.int8]) -> None:
    buckets = bucket_channels(widths)
    assert [stop for _, _, stop in buckets.runs][:-1] == [start for _, start, _ in buckets.runs][1:]
    assert sum(stop - start for _, start, stop in buckets.runs) == len(widths)
    bits = [bits for bits, _, _ in buckets.runs]
    assert bits == sorted(set(widths.tolist()), reverse=True)
    for width, start, stop in buckets.runs:
        channels = buckets.order[start:stop]
        assert (widths[channels] == width).all()
        assert (np.diff(channels) > 0).all()
        np.testing.assert_array_equal(buckets.channels(width), channels)


def test_absent_width_has_no_channels() -> None:
    assert bucket_channels(np.array([4, 4], np.int8)).channels(2).tolist() == []


def test_other_widths_are_refused() -> None:
    with pytest.raises(QvlaError, match=r"got \[3\]"):
        bucket_channels(np.array([4, 3], np.int8))
    with pytest.raises(QvlaError, match="vector"):
        bucket_channels(np.zeros((2, 2), np.int8))
