"""Prompts of pi0 and pi0.5: a cleaned instruction, and a state as numbers among the words.

Sources: openpi `models/tokenizer.py`, `PaligemmaTokenizer.tokenize`; lerobot 0.6.1
`policies/pi05/processor_pi05.py`.
"""

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError

INSTRUCTION, STATE = "{instruction}", "{state}"


def require_prompt(template: object, tells_state: bool) -> None:
    """Refuse what cannot be a prompt's template.

    Args:
        template: to be looked at.
        tells_state: whether the state may be in it.

    Raises:
        ArtifactError: it is no text, lacks the instruction, or holds other braces.
    """
    if not isinstance(template, str) or template.count(INSTRUCTION) != 1:
        raise ArtifactError(f"a prompt holds {INSTRUCTION} once, got {template!r:.120}")
    words = template.replace(INSTRUCTION, "").replace(STATE, "", int(tells_state))
    if set(words) & {*"{}"}:
        raise ArtifactError(f"a prompt has no other braces, got {template!r:.120}")


def cleaned_prompt(
    template: str, instruction: str, state: NDArray[np.float32] | None, bins: int
) -> str:
    """Return a template with an instruction and a state in it.

    Args:
        template: holds `{instruction}` once and `{state}` where the state belongs into it.
        instruction: loses blanks around it; underscores and new lines become blanks.
        state: normalized; None where it is not in the prompt.  float32 [n]
        bins: equal ones over [-1, 1] that numbers of the state are told by; those below the first
            are -1, those above the last are in it.
    """
    words = instruction.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return template.replace(INSTRUCTION, words)
    edges = np.linspace(-1.0, 1.0, bins + 1)[:-1]
    numbers = " ".join(str(number) for number in np.digitize(state, edges) - 1)
    # The state first: an instruction may hold the word.
    return template.replace(STATE, numbers).replace(INSTRUCTION, words)
