"""The noun `Part`: one graph of a bundle, and the tensors it takes and returns."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output."""

    name: str
    # numpy's name: "float32", "int64".
    dtype: str
    # A name instead of a size where any size will do.
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a bundle; it reads the bundle's inputs and what other parts put out."""

    # "vision", "decoder", "head".
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def model(self) -> str:
        """File name of the graph; its weights lie beside it, with `.data` appended."""
        return f"{self.name}.onnx"


def specs_from_json(values: Any) -> tuple[TensorSpec, ...]:
    """Rebuild specifications from what `dataclasses.asdict` made of them."""
    return tuple(
        TensorSpec(value["name"], value["dtype"], tuple(value["shape"])) for value in values
    )


def part_from_json(value: Any) -> Part:
    """Rebuild a part from what `dataclasses.asdict` made of it."""
    return Part(value["name"], specs_from_json(value["inputs"]), specs_from_json(value["outputs"]))
