"""A bundle whose second part repeats: actions [i] = 2 * state + i, one more row a repetition."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.targets import CPU
from qvla_export.graph.bundle_writer import BundleContents, write_bundle
from qvla_export.policies.base import Policy
from qvla_export.shared.bundle import Bundle, Golden
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import PartRuns, Program

ROWS, WIDTH = 4, 4
LOOP = Program(
    (
        PartRuns("start", ("start",)),
        PartRuns(
            "count",
            ("step",),
            times=ROWS,
            start={"x": "begin", "total": "empty"},
            carry={"next_x": "x", "actions": "total"},
        ),
    )
)
_FLOAT = ir.DataType.FLOAT
_ROW, _TOTAL = (1, WIDTH), (1, ROWS, WIDTH)


def _start() -> ir.Model:
    """state -> begin = 2 * state, empty = zeros."""
    tape = ir.tape.Tape()
    state = ir.val("state", _FLOAT, _ROW)
    begin = tape.op("Add", [state, state])
    zeros = tape.initializer(ir.Tensor(np.zeros(_TOTAL, np.float32), name="zeros"))
    nothing = tape.op("Sub", [state, state])
    empty = tape.op("Add", [zeros, nothing])
    return _graph(tape, [state], {"begin": (begin, _ROW), "empty": (empty, _TOTAL)})


def _step() -> ir.Model:
    """x, total -> next_x = x + 1, actions = total without its first row, then x."""
    tape = ir.tape.Tape()
    x, total = ir.val("x", _FLOAT, _ROW), ir.val("total", _FLOAT, _TOTAL)
    one = tape.initializer(ir.Tensor(np.ones(1, np.float32), name="one"))
    limits = [
        tape.initializer(ir.Tensor(np.array([value], np.int64), name=name))
        for name, value in (("from", 1), ("to", ROWS), ("axis", 1))
    ]
    row = tape.op("Unsqueeze", [x, limits[2]])
    kept = tape.op("Slice", [total, *limits])
    joined = tape.op("Concat", [kept, row], {"axis": 1})
    following = tape.op("Add", [x, one])
    return _graph(tape, [x, total], {"next_x": (following, _ROW), "actions": (joined, _TOTAL)})


def _graph(
    tape: ir.tape.Tape,
    inputs: Sequence[ir.Value],
    outputs: Mapping[str, tuple[ir.Value, tuple[int, ...]]],
) -> ir.Model:
    for name, (value, shape) in outputs.items():
        value.name, value.dtype, value.shape = name, _FLOAT, ir.Shape(shape)
    graph = ir.Graph(
        inputs,
        [value for value, _ in outputs.values()],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 21},
        name="part",
    )
    return ir.Model(graph, ir_version=10)


def loop_parts() -> tuple[Part, ...]:
    def specs(**shapes: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())

    return (
        Part("start", specs(state=_ROW), specs(begin=_ROW, empty=_TOTAL)),
        Part("step", specs(x=_ROW, total=_TOTAL), specs(next_x=_ROW, actions=_TOTAL)),
    )


def loop_bundle(
    policy: Policy,
    observations: Sequence[Observation],
    path: Path,
    target: str = CPU.name,
    program: Program = LOOP,
) -> Bundle:
    """Write it for a policy whose processor makes a state of four numbers."""
    feeds = tuple({"state": policy.processor.feeds(item)["state"]} for item in observations)
    rows = [2 * np.concatenate([feed["state"] for feed in feeds])]
    for _ in range(ROWS - 1):
        rows.append(rows[-1] + np.float32(1))  # rounds as the graph does
    actions = np.stack(rows, axis=1)

    def save(folder: Path) -> None:
        for part, model in zip(loop_parts(), (_start(), _step()), strict=True):
            ir.save(model, folder / part.model)

    contents = BundleContents(
        target=target,
        processor=policy.processor,
        inputs=loop_parts()[0].inputs,
        outputs=loop_parts()[1].outputs[1:],
        parts=loop_parts(),
        program=program,
        golden=Golden(feeds, actions, actions),
        policy_digest="0" * 64,
        weight_bytes={"rest": 0},
    )
    return write_bundle(path, contents, save)
