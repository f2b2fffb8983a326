"""The noun `Observation`: what a robot policy sees at one moment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief

_NO_STATE = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Observation:
    """Camera images, proprioceptive state and instruction of one moment.

    Raises:
        InvalidObservation: an image is not uint8 [h, w, 3], the state is not a finite vector,
            the instruction is missing, or the history is no tuple of whole numbers.
    """

    # Camera name -> RGB image, primary camera first.  uint8 [h, w, 3]
    images: Mapping[str, NDArray[np.uint8]]
    # What the policy should do, in words; empty for one that does not read.
    instruction: str
    # Proprioceptive state in physical units; empty where a policy takes none.  float32 [n]
    state: NDArray[np.float32] = field(default_factory=lambda: _NO_STATE)
    # Tokens that the policy chose at the step before, where its prompt repeats them: `history` of
    # that step's chunk; none in an episode's first step.
    history: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.images, Mapping) or not self.images:
            raise InvalidObservation(
                "an observation needs at least one named image uint8 [h, w, 3], got none"
            )
        for name, image in self.images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                kind = getattr(image, "dtype", type(image).__name__)
                raise InvalidObservation(
                    f"image {name!r} must be a uint8 array, got {kind}; "
                    "send RGB bytes 0..255, not floats"
                )
            if image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1:
                raise InvalidObservation(
                    f"image {name!r} must have shape [h, w, 3] (RGB), got {list(image.shape)}"
                )
        text = self.instruction
        if not isinstance(text, str) or (text and not text.strip()):
            raise InvalidObservation(
                f"an instruction is required, got {brief(self.instruction)}; say what to do"
            )
        state = np.asarray(self.state)
        if state.dtype.kind not in "fiu" or state.ndim != 1:
            raise InvalidObservation(
                f"state must be a vector of numbers, got {state.dtype} {list(state.shape)}"
            )
        with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
            state = state.astype(np.float32)
        if not np.isfinite(state).all():
            bad = np.flatnonzero(~np.isfinite(state)).tolist()
            raise InvalidObservation(f"state must be finite, got NaN or infinity at {bad}")
        if not isinstance(self.history, tuple) or not all(type(n) is int for n in self.history):
            raise InvalidObservation(
                f"history must be a tuple of whole numbers, got {brief(self.history)}"
            )
        object.__setattr__(self, "images", MappingProxyType(dict(self.images)))
        object.__setattr__(self, "state", state)

    def __repr__(self) -> str:
        images = ", ".join(
            f"{name} {'x'.join(map(str, image.shape[:2]))}" for name, image in self.images.items()
        )
        return f"<Observation: {self.instruction!r}, {images}, state of {len(self.state)} numbers>"
