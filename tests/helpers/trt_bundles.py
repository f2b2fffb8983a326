"""Small bundles for a TensorRT target, made of graphs written by hand; one repeats a part."""

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import PartRuns, Program, run_program

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
        return self.model_of(inputs, {name: (output, dtype)})

    def model_of(self, inputs: Sequence[Value], outputs: dict[str, tuple[Value, Any]]) -> ir.Model:
        for name, (output, dtype) in outputs.items():
            output.name, output.dtype = name, dtype
        graph = ir.Graph(
            inputs,
            [output for output, _ in outputs.values()],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": 21},
            name="+".join(outputs),
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


def start(seed: int) -> ir.Model:
    """State -> the number of the first step, int64 [1], of what the graph computes."""
    graph = PartGraph(seed)
    state = ir.val("state", _FLOAT, (1, 4))
    largest = graph.op("ReduceMax", [state, graph.ints("axis", 1)], keepdims=0)
    whole = graph.op("Cast", [largest], to=_LONG)
    first = graph.op("Sub", [whole, whole])
    first.shape = ir.Shape((1,))
    return graph.model([state], first, "first_index", _LONG)


def step(seed: int) -> ir.Model:
    """A context, a flow float32 [1, 4, 4], the step's number -> actions, those of the next."""
    graph = PartGraph(seed)
    context = ir.val("context", _HALF, (1, "places", WIDTH))
    flow, index = ir.val("flow", _FLOAT, (1, 4, 4)), ir.val("index", _LONG, (1,))
    mean = graph.op("ReduceMean", [context, graph.ints("axes", 1)], keepdims=0)
    way = graph.op("MatMul", [mean, graph.weights("way", WIDTH, 16)])
    way = graph.op("Reshape", [way, graph.ints("shape", 1, 4, 4)])
    time = graph.op("Gather", [graph.weights("times", STEPS, 4), index], axis=0)
    moved = graph.op("Cast", [graph.op("Mul", [way, time])], to=_FLOAT)
    following = graph.op("Tanh", [graph.op("Add", [flow, moved])])
    actions = graph.op("Neg", [following])
    number = graph.op("Add", [index, graph.ints("one", 1)])
    following.shape = actions.shape = ir.Shape((1, 4, 4))
    number.shape = ir.Shape((1,))
    made = {"actions": (actions, _FLOAT), "next_flow": (following, _FLOAT)}
    return graph.model_of([context, flow, index], {**made, "next_index": (number, _LONG)})


STEPS, AGAIN = 5, 2
_CARRY = {"next_flow": "flow", "next_index": "index"}
# The step repeats; what it begins with is an input of the bundle, or made by other parts. Then it
# goes on in another run, where its context has another shape.
FLOW = Program(
    (
        *Program.straight(["vision", "decoder", "start"]).runs,
        PartRuns(
            "flow",
            ("step",),
            STEPS,
            {"flow": "noise", "index": "first_index", "context": "hidden"},
            _CARRY,
        ),
        PartRuns(
            "again",
            ("step",),
            AGAIN,
            {"flow": "next_flow", "index": "first_index", "context": "patches"},
            _CARRY,
        ),
    )
)
PARTS: dict[str, Callable[[int], ir.Model]] = {
    "vision": vision,
    "decoder": decoder,
    "head": head,
}
FLOW_PARTS: dict[str, Callable[[int], ir.Model]] = {
    "vision": vision,
    "decoder": decoder,
    "start": start,
    "step": step,
}


def bundle_of_parts(
    policy: Policy,
    observations: Sequence[Observation],
    path: Path,
    target: str = "rtx4070",
    seed: int = 0,
    parts: dict[str, Callable[[int], ir.Model]] | None = None,
    program: Program | None = None,
) -> Bundle:
    """Write a bundle whose inputs the policy's processor makes.

    Its golden actions are ONNX Runtime's. A program's noise is one of the inputs.
    """
    models = {name: make(seed) for name, make in (parts or PARTS).items()}
    processor = policy.processor
    if program is not None:
        spec = replace(processor.spec, noise=NoiseSpec("noise", (4, 4)))
        processor = replace(processor, spec=spec)
    program = program or Program.straight(models)
    specs = tuple(
        Part(name, _specs(model.graph.inputs), _specs(model.graph.outputs))
        for name, model in models.items()
    )
    made = {spec.name for part in specs for spec in part.outputs}
    read = {spec.name: spec for part in specs for spec in part.inputs}
    started = [item for run in program.runs for item in run.start.items()]
    inputs = {n: s for n, s in read.items() if n not in made | {name for name, _ in started}}
    inputs |= {s: replace(read[name], name=s) for name, s in started if s not in made}

    def save(folder: Path) -> None:
        save_parts(models, folder)

    scratch = path.with_name(f"{path.name}-graphs")
    scratch.mkdir(parents=True)
    save(scratch)
    feeds = tuple(processor.feeds(observation) for observation in observations)
    actions = np.concatenate([run_parts(specs, scratch, feed, program) for feed in feeds])
    parts = BundleContents(
        target=target,
        processor=processor,
        inputs=tuple(inputs.values()),
        outputs=specs[-1].outputs[:1],
        program=program,
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


def run_parts(
    parts: Sequence[Part], folder: Path, feeds: Any, program: Program
) -> NDArray[np.float32]:
    """Return what the last part puts out first, by ONNX Runtime."""
    by_name = {part.name: part for part in parts}
    sessions = {
        part.name: onnxruntime.InferenceSession(
            str(folder / part.model), providers=["CPUExecutionProvider"]
        )
        for part in parts
    }

    def call(_: PartRuns, name: str, taken: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [spec.name for spec in by_name[name].outputs]
        return dict(zip(names, sessions[name].run(names, taken), strict=True))

    reads = {part.name: [spec.name for spec in part.inputs] for part in parts}
    values = run_program(program, reads, feeds, call)
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
