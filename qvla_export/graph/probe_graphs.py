"""Graphs whose time shows what kernels make of a machine: chains of products as bundles have them.

They pass through `qvla_export.graph.lowering`, so that what is timed is what is shipped.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qvla_export.graph.float_graph import LAYER_KEY
from qvla_export.graph.lowering import lower
from qvla_export.latency_model.kernel_rates import Probe
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import QuantizerSpec, spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.target import Target

# A product big enough that its start does not count; enough of them to come from memory.
_WIDTH, _PRODUCTS = 1024, 12
# A product of no size, whose time is its start.
_SMALL_WIDTH, _SMALL_PRODUCTS = 16, 100


def probe_graphs(
    target: Target, width: int = _WIDTH, products: int = _PRODUCTS
) -> tuple[Probe, ...]:
    """Return the probes of a target: float, each stored width, 8-bit activations, launches.

    Args:
        target: whose graphs to make.
        width: inputs and channels of a product, more than those of the tiny ones.
        products: in each chain.
    """
    stored = sorted({c.bits for bits, c in target.containers.items() if 0 < bits < 16})
    return (
        _probe(target, None, width, products),
        *(_probe(target, bits, width, products) for bits in stored),
        _probe(target, 8, width, products, integer=True),
        _probe(target, None, _SMALL_WIDTH, _SMALL_PRODUCTS),
    )


def _probe(
    target: Target, bits: int | None, width: int, products: int, integer: bool = False
) -> Probe:
    graph = _chain(target, width, products)
    names = [f"probe.{i}" for i in range(products)]
    plan = None
    if bits is not None:
        # The scale search changes codes, not times.
        quickly = {b: replace(rule, scale="max") for b, rule in spec_for(target).rules.items()}
        shapes = dict.fromkeys(names, (width, width))
        plan = uniform_plan(shapes, bits, target, "probe", QuantizerSpec(quickly))
    if plan is not None and integer:
        ranges = ActivationRanges(8, "max", dict.fromkeys(names, 4.0))
        plan = replace(plan, activations=ranges)
    model, _ = lower(graph, plan, target)
    data = ir.to_proto(model).SerializeToString()
    return Probe(data, width, products, 32 if bits is None else bits, integer)


def _chain(target: Target, width: int, products: int) -> ir.Model:
    generator = np.random.default_rng(0)
    tape = ir.tape.Tape()
    first = value = ir.val("x", ir.DataType.FLOAT, ("rows", width))
    for i in range(products):
        weight = generator.normal(0, width**-0.5, (width, width)).astype(np.float32)
        constant = tape.initializer(ir.Tensor(weight, name=f"probe.{i}.weight"))
        value = tape.op("MatMul", [value, constant], metadata_props={LAYER_KEY: f"probe.{i}"})
    value.name, value.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [first],
        [value],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": target.opset},
        name="probe",
    )
    return ir.Model(graph, ir_version=target.ir_version)
