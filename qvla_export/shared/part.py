"""The noun `Part`: one graph of a bundle, and the tensors it takes and returns."""

from dataclasses import dataclass
from typing import Any

from qvla_export.shared.json_documents import Node

# Output of a policy whose next prompt repeats the tokens that it chose, as whole numbers.
CHOSEN_TOKENS = "tokens"
# numpy's names of what graphs take and return.
_DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


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
    """Rebuild specifications from what `dataclasses.asdict` made of them.

    Raises:
        ArtifactError: a name, a type or a size is none.
    """
    return tuple(
        _spec_from_json(node) for node in Node(values, "the manifest's tensors").elements()
    )


def part_from_json(value: Any) -> Part:
    """Rebuild a part from what `dataclasses.asdict` made of it.

    Raises:
        ArtifactError: as `specs_from_json`.
    """
    part = Node(value, "the manifest's parts")
    name = part.field("name").text(200)
    return Part(name, specs_from_json(value["inputs"]), specs_from_json(value["outputs"]))


def _spec_from_json(node: Node) -> TensorSpec:
    dtype = node.field("dtype")
    if dtype.text() not in _DTYPES:
        raise dtype.wrong(f"one of {', '.join(_DTYPES)} is needed")
    shape = node.field("shape").elements()
    sizes = tuple(s.text(200) if isinstance(s.value, str) else s.whole(0, 1 << 40) for s in shape)
    return TensorSpec(node.field("name").text(200), dtype.text(), sizes)
