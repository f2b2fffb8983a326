"""Shapes an engine is built for: smallest, best and largest of every dynamic input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.trt.modules import BuildError
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import TensorSpec

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


def require_fillable(bundle: Bundle) -> None:
    """Refuse a program whose runs fill an input that is something else's memory, too.

    A part sees the same shapes in every repetition of a run, which `Bundle.load` has looked at; in
    another run it may see others, for which its engine has another profile.

    Raises:
        BuildError: an input is filled that a part puts out or that the bundle takes, or that is
            carried on and nothing fills at first.
    """
    made = {spec.name for part in bundle.parts for spec in part.outputs}
    made |= {spec.name for spec in bundle.inputs}
    for run in bundle.program.runs:
        filled = {*run.carry.values()}
        if shared := sorted((made & {*run.start, *filled}) | (filled - {*run.start})):
            raise BuildError(
                f"run {run.name!r} of {bundle.path} fills {', '.join(shared)}, which other parts "
                "read, too, or nothing fills at first; export the bundle anew"
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


def united(ranges: Sequence[Mapping[str, ShapeRange]]) -> dict[str, ShapeRange]:
    """Return ranges, by tensor, that hold all given ones; the first one's shape is the best."""
    found: dict[str, ShapeRange] = {}
    for each in ranges:
        for name, other in each.items():
            known = found.setdefault(name, other)
            low = tuple(min(sizes) for sizes in zip(known.min, other.min, strict=True))
            high = tuple(max(sizes) for sizes in zip(known.max, other.max, strict=True))
            found[name] = ShapeRange(low, known.opt, high)
    return found


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
