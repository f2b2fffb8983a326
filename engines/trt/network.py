"""A part's graph -> TensorRT's network, and the shapes of everything that goes in and out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.trt.log import Log
from engines.trt.modules import BuildError, TrtModule
from engines.trt.shapes import Shape, ShapeRange
from qvla_export.shared.target import Target

_MAX_SHOWN = 3


@dataclass(frozen=True)
class Network:
    """A parsed part; the builder and the parser own the memory of its weights."""

    builder: Any
    parser: Any
    definition: Any

    @property
    def dynamic(self) -> bool:
        """Whether the graph leaves a size of an input open, however it is to be built."""
        return any(size < 0 for tensor in _inputs(self) for size in tensor.shape)


def parse_part(module: TrtModule, model: Path, target: Target, log: Log) -> Network:
    """Parse a graph and the weights beside it.

    Raises:
        BuildError: the parser refuses it; the message names node, operator and reason.
    """
    api = module.api
    builder = api.Builder(log.logger)
    # Required on 10.x, always on and ignored from 11 on.
    flag = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = api.OnnxParser(definition, log.logger)
    # From the file, so that the weights are found beside it and mapped instead of copied.
    with log.native_errors():
        parsed = parser.parse_from_file(str(model))
    if not parsed:
        raise BuildError(_refusal(parser, model, target, module))
    return Network(builder, parser, definition)


def part_inputs(
    network: Network, known: Mapping[str, ShapeRange], model: Path
) -> dict[str, ShapeRange]:
    """Return the shape ranges of a network's inputs.

    Args:
        network: a parsed part.
        known: ranges of the bundle's inputs and of what earlier parts put out.
        model: names the part in errors.

    Raises:
        BuildError: nothing provides an input, or its shape contradicts the graph.
    """
    found = {}
    for tensor in _inputs(network):
        given = known.get(tensor.name)
        if given is None:
            raise BuildError(
                f"{model} reads {tensor.name!r}, which is no input of the bundle and no output of "
                f"an earlier part ({sorted(known)}); export the bundle anew"
            )
        shape = tuple(tensor.shape)
        fixed = [size if size >= 0 else low for size, low in zip(shape, given.min, strict=False)]
        static_fits = all(
            size < 0 or size == low == high
            for size, low, high in zip(shape, given.min, given.max, strict=False)
        )
        if len(shape) != len(given.min) or not static_fits:
            raise BuildError(
                f"{model} reads {tensor.name!r} with shape {list(shape)}, given are "
                f"{list(given.min)} to {list(given.max)} (such as {fixed}); export the bundle anew"
            )
        found[tensor.name] = given
    return found


def part_outputs(network: Network, inputs: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
    """Return the shapes of a network's outputs where its inputs are smallest, best, largest.

    The network infers them itself when its inputs are fixed for a moment; dynamic sizes of later
    parts (tokens = prompt + patches + actions) are known only this way.
    """
    tensors = _inputs(network)
    original = [tuple(tensor.shape) for tensor in tensors]
    outputs = [network.definition.get_output(i) for i in range(network.definition.num_outputs)]
    found: list[list[Shape]] = [[] for _ in outputs]
    try:
        for which in ("min", "opt", "max"):
            for tensor in tensors:
                tensor.shape = getattr(inputs[tensor.name], which)
            for shapes, output in zip(found, outputs, strict=True):
                shapes.append(tuple(output.shape))
    finally:
        for tensor, shape in zip(tensors, original, strict=True):
            tensor.shape = shape
    for output, shapes in zip(outputs, found, strict=True):
        if any(size < 0 for shape in shapes for size in shape):
            raise BuildError(
                f"the size of output {output.name!r} depends on values, not only on input sizes "
                f"(got {shapes}); buffers cannot be allocated ahead, export it with fixed sizes"
            )
    return {o.name: ShapeRange(*shapes) for o, shapes in zip(outputs, found, strict=True)}


def _inputs(network: Network) -> list[Any]:
    return [network.definition.get_input(i) for i in range(network.definition.num_inputs)]


def _refusal(parser: Any, model: Path, target: Target, module: TrtModule) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = []
    for error in errors[:_MAX_SHOWN]:
        node, operator = error.node_name(), error.node_operator()
        place = f"node {node!r} ({operator})" if operator or node else "the graph as a whole"
        lines.append(f"\n- {place}: {_reason(error)}")
    more = f"\nand {len(errors) - _MAX_SHOWN} more" if len(errors) > _MAX_SHOWN else ""
    return (
        f"the ONNX parser of {module.name} {module.version} refuses {model}:{''.join(lines)}{more}"
        f"\nCheck the graph against the target: qvla check --target {target.name}. A bundle of "
        "another version or target must be exported anew."
    )


def _reason(error: Any) -> str:
    """The parser's words; where a check of an operator failed they are just "false"."""
    text = str(error.desc()).strip()
    place = f"{error.func()} at {error.file()}:{error.line()}"
    code = str(error.code()).rpartition(".")[2]
    return f"{code} in {place}" if text in ("", "false") else f"{text} [{code}, {place}]"
