"""The noun `HistorySpec`: a prompt that repeats the tokens which a policy chose at the step before.

Source: UniVLA `experiments/robot/openvla_utils.py`, `get_vla_latent_action`. What is repeated comes
with the observation and goes with the chunk, so that policies and engines keep nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvla_export.shared.errors import InvalidObservation

_MOST_TOKENS, _MOST_CHOICES = 256, 1 << 10


@dataclass(frozen=True)
class HistorySpec:
    """How many tokens are repeated, and how many there are to choose from."""

    tokens: int
    choices: int

    def told(self, prompt: str, tokens: Sequence[int]) -> str:
        """Return a prompt's template that says what was chosen at the step before.

        Args:
            prompt: the template, whose first line is the question.
            tokens: that the step before chose; none in an episode's first step.

        Raises:
            InvalidObservation: there are neither none nor as many as a step has, or one is unknown.
        """
        if not tokens:
            return prompt
        if len(tokens) != self.tokens or not all(0 <= token < self.choices for token in tokens):
            raise InvalidObservation(
                f"an observation's history is empty or {self.tokens} numbers from 0 to "
                f"{self.choices - 1}, got {tokens!r:.120}; hand on what the chunk before has"
            )
        question, line, answer = prompt.partition("\n")
        return f"{question} History action {''.join(token_names(tokens))}{line}{answer}"

    def next(self, tokens: Sequence[float]) -> tuple[int, ...]:
        """Return the history of the step after one that chose these tokens."""
        return tuple(round(token) for token in tokens)


def token_names(tokens: Sequence[int]) -> list[str]:
    """Return what tokenizers call latent tokens."""
    return [f"<ACT_{token}>" for token in tokens]


def history_from_json(value: Mapping[str, Any] | None) -> HistorySpec | None:
    """Rebuild what `dataclasses.asdict` made of a specification.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return None
    spec = HistorySpec(**value)
    sizes = ((spec.tokens, 1, _MOST_TOKENS), (spec.choices, 2, _MOST_CHOICES))
    if not all(type(size) is int and low <= size <= high for size, low, high in sizes):
        raise ValueError(f"no history that a prompt can repeat: {value!r:.200}")
    return spec
