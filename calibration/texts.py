"""Texts to measure a language model on: Python's own reference, which comes with it.

`pydoc_data.topics` is what `help("while")` shows: prose about the language, installed with every
Python and fetched from nowhere.
"""

import platform
from collections.abc import Iterator

import numpy as np

from calibration.calibration_set import FRAMES_PER_EPISODE, CalibrationSet
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# Of a passage; at the four letters of an English token more than twice what a model is fed.
_LETTERS = 640


def draw_texts(
    count: int, held_out: int, seed: int, camera: str, per_topic: int = FRAMES_PER_EPISODE
) -> CalibrationSet:
    """Draw passages to measure on, and others, of other topics, to judge by.

    Args:
        count: passages to measure on.
        held_out: passages to judge by.
        seed: decides topics and passages.
        camera: name of the picture of one black pixel that stands beside each.
        per_topic: passages of one topic.

    Raises:
        QvlaError: nothing is asked for, or there are too few topics.
    """
    if min(count, held_out, per_topic) < 1:
        raise QvlaError(
            "texts to measure on, to judge by and of one topic must be at least 1 each, got "
            f"{count}, {held_out} and {per_topic}"
        )
    random = np.random.default_rng(seed)
    blank = {camera: np.zeros((1, 1, 3), np.uint8)}
    topics = _topics(per_topic)
    parts: list[tuple[Observation, ...]] = []
    names = [str(name) for name in random.permutation(sorted(topics))]
    for size in (count, held_out):
        drawn: list[Observation] = []
        while len(drawn) < size:
            if not names:
                raise QvlaError(
                    f"{count} + {held_out} texts, {per_topic} of a topic, need more topics than "
                    f"the {len(topics)} that are long enough; ask for fewer"
                )
            passages = topics[names.pop()]
            chosen = sorted(random.choice(len(passages), per_topic, replace=False))
            drawn += [Observation(blank, passages[int(place)]) for place in chosen]
        parts.append(tuple(drawn[:size]))
    source = {
        "texts": "pydoc_data.topics",
        "python": platform.python_version(),
        "seed": seed,
        "count": count,
        "held_out": held_out,
        "frames_per_episode": per_topic,
    }
    lengths = [per_topic] * (count // per_topic) + [count % per_topic] * (count % per_topic > 0)
    return CalibrationSet(parts[0], parts[1], source, tuple(lengths))


def _topics(least: int) -> dict[str, list[str]]:
    """Return the passages of every topic that has so many, each text once."""
    from pydoc_data.topics import topics

    by_topic = {name: list(_passages(topics[name])) for name in sorted(topics)}
    first: dict[str, str] = {}
    for name, passages in by_topic.items():
        if len(passages) >= least:
            first.setdefault(passages[0], name)
    return {name: by_topic[name] for name in first.values()}


def _passages(text: str) -> Iterator[str]:
    """Cut a text, its spaces single, into passages of whole words."""
    letters, words = 0, []
    for word in text.split():
        words.append(word)
        letters += len(word) + 1
        if letters >= _LETTERS:
            yield " ".join(words)
            letters, words = 0, []
