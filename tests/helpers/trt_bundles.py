"""Small bundles of three parts for a TensorRT target, made of graphs written by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from qvla_export.graph.bundle_writer import BundleContents, write_bundle
from qvla_export.graph.external_data import ExternalData
from qvla_export.policies.base import Policy
from qvla_export.shared.bundle import Bundle, Golden
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import Program

WIDTH = 32
_HALF, _FLOAT, _LONG = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
_NAMES = {_HALF: "float16", _FLOAT: "float32", _LONG: "int64"}
Value = ir.Value


class PartGraph:
    """A graph under construction, with seeded weights."""

    def __init__(self, seed: int) -> None:
        self.tape = ir.tape.Tape()
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, inputs: Sequence[Value], **attributes: Any) -> Value:
        return self.tape.op(kind, inputs, attributes)

    def weights(self, name: str, *shape: int) -> Value:
        values = self._random.normal(0, shape[0] ** -0.5, shape).astype(np.float16)
        return self.tape.initializer(ir.Tensor(values, name=name))

    def ints(self, name: str, *values: int) -> Value:
        return self.tape.initializer(ir.Tensor(np.array(values, np.int64), name=name))

    def model(self, inputs: Sequence[Value], output: Value, name: str, dtype: Any) -> ir.Model:
        output.name, output.dtype = name, dtype
        graph = ir.Graph(
            inputs,
            [output],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": 21},
            name=name,
        )
        return ir.Model(graph, ir_version=10)


def vision(seed: int) -> ir.Model:
    """pixel_values [1, 6, 28, 28] -> patches float16 [1, 4, WIDTH]."""
    graph = PartGraph(seed)
    pixels = ir.val("pixel_values", _FLOAT, (1, 6, 28, 28))
    flat = graph.op("Reshape", [pixels, graph.ints("shape", 1, 4, 1176)])
    half = graph.op("Cast", [flat], to=_HALF)
    patches = graph.op("MatMul", [half, graph.weights("embed", 1176, WIDTH)])
    patches.shape = ir.Shape((1, 4, WIDTH))
    return graph.model([pixels], patches, "patches", _HALF)


def decoder(seed: int) -> ir.Model:
    """Patches, prompt and state -> hidden float16 [1, 4 + prompt + 1, WIDTH]."""
    graph = PartGraph(seed)
    patches = ir.val("patches", _HALF, (1, 4, WIDTH))
    ids = ir.val("input_ids", _LONG, (1, "prompt"))
    state = ir.val("state", _FLOAT, (1, 4))
    words = graph.op("Gather", [graph.weights("words", 300, WIDTH), ids], axis=0)
    half = graph.op("Cast", [state], to=_HALF)
    token = graph.op("MatMul", [half, graph.weights("state_in", 4, WIDTH)])
    token = graph.op("Unsqueeze", [token, graph.ints("axis", 1)])
    hidden = graph.op("Concat", [patches, words, token], axis=1)
    hidden = graph.op("MatMul", [hidden, graph.weights("mix", WIDTH, WIDTH)])
    hidden = graph.op("Relu", [hidden])
    hidden.shape = ir.Shape((1, "tokens", WIDTH))
    return graph.model([patches, ids, state], hidden, "hidden", _HALF)


def head(seed: int) -> ir.Model:
    """Hidden -> actions float32 [1, 4, 4]."""
    graph = PartGraph(seed)
    hidden = ir.val("hidden", _HALF, (1, "tokens", WIDTH))
    mean = graph.op("ReduceMean", [hidden, graph.ints("axes", 1)], keepdims=0)
    actions = graph.op("MatMul", [mean, graph.weights("out", WIDTH, 16)])
    actions = graph.op("Reshape", [actions, graph.ints("shape", 1, 4, 4)])
    actions = graph.op("Cast", [graph.op("Tanh", [actions])], to=_FLOAT)
    actions.shape = ir.Shape((1, 4, 4))
    return graph.model([hidden], actions, "actions", _FLOAT)


PARTS: dict[str, Callable[[int], ir.Model]] = {
    "vision": vision,
    "decoder": decoder,
    "head": head,
}


def bundle_of_parts(
    policy: Policy,
    observations: Sequence[Observation],
    path: Path,
    target: str = "rtx4070",
    seed: int = 0,
    parts: dict[str, Callable[[int], ir.Model]] | None = None,
) -> Bundle:
    """Write a bundle whose inputs the policy's processor makes.

    Its golden actions are ONNX Runtime's.
    """
    models = {name: make(seed) for name, make in (parts or PARTS).items()}
    specs = tuple(
        Part(name, _specs(model.graph.inputs), _specs(model.graph.outputs))
        for name, model in models.items()
    )
    made = {spec.name for part in specs for spec in part.outputs}
    inputs = {s.name: s for part in specs for s in part.inputs if s.name not in made}

    def save(folder: Path) -> None:
        save_parts(models, folder)

    scratch = path.with_name(f"{path.name}-graphs")
    scratch.mkdir(parents=True)
    save(scratch)
    feeds = tuple(policy.processor.feeds(observation) for observation in observations)
    actions = np.concatenate([run_parts(specs, scratch, feed) for feed in feeds])
    parts = BundleContents(
        target=target,
        processor=policy.processor,
        inputs=tuple(inputs.values()),
        outputs=specs[-1].outputs,
        program=Program.straight(models),
        parts=specs,
        golden=Golden(feeds, actions, actions),
        policy_digest="0" * 64,
        weight_bytes={"rest": sum((scratch / f"{n}.onnx.data").stat().st_size for n in models)},
    )
    return write_bundle(path, parts, save)


def save_parts(models: dict[str, ir.Model], folder: Path) -> None:
    for name, model in models.items():
        with ExternalData(folder / f"{name}.onnx") as data:
            data.save(model.clone())


def run_parts(parts: Sequence[Part], folder: Path, feeds: Any) -> NDArray[np.float32]:
    """Return the last part's output by ONNX Runtime."""
    values = dict(feeds)
    for part in parts:
        session = onnxruntime.InferenceSession(
            str(folder / part.model), providers=["CPUExecutionProvider"]
        )
        taken = {spec.name: values[spec.name] for spec in part.inputs}
        values[part.outputs[0].name] = session.run(None, taken)[0]
    result: NDArray[np.float32] = values[parts[-1].outputs[0].name]
    return result


def _specs(values: Sequence[Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            str(value.name),
            _NAMES[value.dtype],
            tuple(d if isinstance(d, int) else str(d.value) for d in value.shape),
        )
        for value in values
    )
