"""A layer behind a norm, as traced policies have it, with rounded inputs."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from ort_graphs import LAYER, constant, model_of

from qvla_export.graph.float_graph import LAYER_KEY
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.compute_type import to_compute_type
from qvla_export.graph.passes.integer_products import keep_integer_products
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.target import Target

NORMS = ("none", "rms", "layer")


def normed_layer(norm: str, widths: NDArray[np.int8], inputs: int, target: Target) -> ir.Model:
    """x [B, M, inputs] -> y [B, M, channels] of a norm, a rounding and a layer of some widths."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(len(widths), inputs)).astype(np.float32)
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ("B", "M", inputs))
    normal = _normal(tape, norm, x, inputs)
    product = tape.op(
        "MatMul", [normal, constant(tape, "w", weight.T)], metadata_props={LAYER_KEY: LAYER}
    )
    bias = generator.normal(size=len(widths)).astype(np.float32)
    model = model_of(tape, x, tape.op("Add", [product, constant(tape, "b", bias)]))
    model = quantize_activations(model, ActivationRanges(8, "max", {LAYER: 2.5}), target)
    spec = spec_for(target)
    model = bucketize(model, {LAYER: widths}, spec, target, rounded_inputs=True)
    model = keep_integer_products(model)
    return model if target.compute == "float32" else to_compute_type(model, target)


def up_to_codes(model: ir.Model) -> ir.Model:
    """Return a graph whose output is the codes of its layer's rows."""
    roundings = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    (codes,) = [n.outputs[0] for n in roundings if not n.attributes.get_int("block_size", 0)]
    model.graph.outputs[0] = codes
    return model


def _normal(tape: ir.tape.Tape, norm: str, x: ir.Value, inputs: int) -> ir.Value:
    if norm == "none":
        return x
    generator = np.random.default_rng(1)
    weights, biases = generator.normal(1, 0.2, (2, inputs)).astype(np.float32)
    if norm == "layer":
        parameters = [constant(tape, "gain", weights), constant(tape, "shift", biases - 1)]
        normal = tape.op("LayerNormalization", [x, *parameters], {"axis": -1, "epsilon": 1e-6})
    else:
        two, axes = np.array(2, np.float32), np.array([-1], np.int64)
        square = tape.op("Pow", [x, constant(tape, "two", two)])
        mean = tape.op("ReduceMean", [square, constant(tape, "axes", axes)], {"keepdims": 1})
        least = constant(tape, "least", np.array(1e-6, np.float32))
        root = tape.op("Sqrt", [tape.op("Add", [mean, least])])
        inner = tape.op("Mul", [x, tape.op("Reciprocal", [root])])
        normal = tape.op("Mul", [constant(tape, "gain", weights), inner])
    normal.type, normal.shape = x.type, x.shape
    return normal
