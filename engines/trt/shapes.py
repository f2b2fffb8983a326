"""Shapes an engine is built for: smallest, best and largest of every dynamic input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.trt.modules import BuildError
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import TensorSpec
from qvla_export.shared.program import Program

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PromptRange:
    """Prompt lengths that an engine takes, in tokens; it is fastest at `opt`."""

    min: int = 2
    opt: int = 32
    max: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise BuildError(
                f"prompt lengths must be 1 <= min <= opt <= max, "
                f"got {self.min}, {self.opt}, {self.max}"
            )


def require_straight(bundle: Bundle) -> None:
    """Refuse a bundle whose parts repeat: its engines would need a profile for each run.

    Raises:
        BuildError: it has a program.
    """
    names = tuple(part.name for part in bundle.parts)
    if bundle.program != Program.straight(names):
        raise BuildError(
            f"{bundle.path} runs parts several times ({dict(bundle.program.calls)}), which "
            "TensorRT engines do not do in this version; qvla verify --runtime ort runs its "
            "graphs, and targets of ONNX Runtime serve it"
        )


@dataclass(frozen=True)
class ShapeRange:
    """One tensor's shape at the smallest, the best and the largest prompt."""

    min: Shape
    opt: Shape
    max: Shape

    def admits(self, shape: Sequence[int]) -> bool:
        """Say whether an engine built for this range takes a shape."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


def input_ranges(inputs: Sequence[TensorSpec], prompt: PromptRange) -> dict[str, ShapeRange]:
    """Return the ranges of a bundle's inputs.

    A named dimension is "prompt", its length in tokens, or "prompt+N": the whole sequence.

    Raises:
        BuildError: another name.
    """

    def at(spec: TensorSpec, length: int) -> Shape:
        return tuple(_size(size, length) if isinstance(size, str) else size for size in spec.shape)

    return {
        spec.name: ShapeRange(*(at(spec, n) for n in (prompt.min, prompt.opt, prompt.max)))
        for spec in inputs
    }


def _size(name: str, prompt: int) -> int:
    base, _, more = name.partition("+")
    if base != "prompt" or (more and not more.isdigit()):
        raise BuildError(
            f"a dynamic dimension must be named 'prompt' or 'prompt+N', got {name!r}; "
            "export the bundle with this version"
        )
    return prompt + int(more or 0)


def ranges_to_json(ranges: Mapping[str, ShapeRange]) -> dict[str, list[list[int]]]:
    """Return name -> [min, opt, max]."""
    return {name: [list(s) for s in (r.min, r.opt, r.max)] for name, r in ranges.items()}


def ranges_from_json(value: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, ShapeRange]:
    """Read what `ranges_to_json` wrote."""
    return {
        name: ShapeRange(*(tuple(int(size) for size in shape) for shape in shapes))
        for name, shapes in value.items()
    }
