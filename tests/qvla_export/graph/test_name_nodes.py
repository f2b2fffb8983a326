"""Nodes are named after the layer they compute for, however deep the graph is."""

import numpy as np
import onnx_ir as ir

from qvla_export.graph.passes.name_nodes import name_nodes

BLOCKS = 2000


def test_a_deep_network_is_named_to_its_end() -> None:
    """Of 24 blocks of 1024 channels: what a node reads was walked back to the pictures."""
    tape = ir.tape.Tape()
    weight = tape.initializer(ir.Tensor(np.ones((4, 4), np.float32), name="vision.fc.weight"))
    x = value = ir.val("x", ir.DataType.FLOAT, (1, 4, 4))
    for _ in range(BLOCKS):
        value = tape.op("Add", [value, x])
    turned = tape.op("Transpose", [value], {"perm": [0, 2, 1]})
    joined = tape.op("Concat", [turned, turned], {"axis": 1})
    product = tape.op("MatMul", [joined, weight])
    graph = ir.Graph(
        [x], [product], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 20}
    )
    name_nodes(ir.Model(graph, ir_version=10))
    producer = product.producer()
    assert producer is not None and producer.name == "vision.fc/MatMul"
    sums = [node.name or "" for node in graph if node.op_type == "Add"]
    assert len(sums) == BLOCKS and not any(name.startswith("vision") for name in sums)
