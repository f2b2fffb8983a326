"""Texts to measure on: drawn by a seed, judged by others of other topics."""

import pytest

from calibration.texts import draw_texts
from qvla_export.shared.errors import QvlaError


def test_draws_are_the_seeds_and_share_nothing() -> None:
    drawn = draw_texts(7, 6, 3, "blank")
    assert drawn.digest == draw_texts(7, 6, 3, "blank").digest
    assert drawn.digest != draw_texts(7, 6, 4, "blank").digest
    assert (len(drawn.observations), len(drawn.held_out)) == (7, 6)
    assert drawn.episode_lengths == (2, 2, 2, 1)
    said = [item.instruction for item in (*drawn.observations, *drawn.held_out)]
    assert len(set(said)) == 13
    # Whole words, far more of them than a model is fed.
    assert all(600 < len(text) < 800 and text == " ".join(text.split()) for text in said)
    assert drawn.source["texts"] == "pydoc_data.topics"


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(QvlaError, match="at least 1 each, got 0, 4 and 2"):
        draw_texts(0, 4, 0, "blank")
    with pytest.raises(QvlaError, match="ask for fewer"):
        draw_texts(500, 500, 0, "blank")
