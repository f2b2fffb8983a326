"""The plan's bytes are the exported graph's, to the byte, and nothing is read before it must be."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ort_graphs import LAYER, linear_model
from tiny_bundles import float_graph

from engines.targets import CPU, RTX4070
from qvla_export.graph.lowering import lower
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.float_storage import store_exactly
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.packed_storage import bucket_bytes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.target import Target

WIDTHS = [0, 2, 4, 8, 16]


def random_plan(policy: OftPolicy, target: Target, seed: int) -> BitPlan:
    """Layers of many mixtures: some of one width, some all pruned."""
    generator = np.random.default_rng(seed)
    plan = uniform_plan(layer_shapes(policy.layers()), 4, target, policy.digest)
    widths = {}
    for name, layer in plan.widths.items():
        shares = generator.dirichlet(np.full(5, 0.4))
        widths[name] = generator.choice(WIDTHS, len(layer), p=shares).astype(np.int8)
    return replace(plan, widths=widths)


@pytest.mark.parametrize("target", [CPU, RTX4070], ids=lambda target: target.name)
@pytest.mark.parametrize("seed", range(4))
def test_plan_states_the_bytes_of_the_graph(
    target: Target, seed: int, tiny_policy: OftPolicy
) -> None:
    plan = random_plan(tiny_policy, target, seed)
    _, parts = lower(float_graph(tiny_policy), plan, target)
    assert sum(n for part, n in parts.items() if part != "rest") == plan.weight_bytes


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=12),
    inputs=st.integers(1, 300),
    target=st.sampled_from([CPU, RTX4070]),
)
def test_buckets_have_the_stated_bytes(widths: list[int], inputs: int, target: Target) -> None:
    weight = np.ones((len(widths), inputs), np.float32)
    stored: list[int] = []

    def store(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        stored.append(tensor.nbytes)
        return tensor

    layer = {LAYER: np.array(widths, np.int8)}
    bucketize(linear_model(weight, None), layer, spec_for(target), target, store)
    assert sum(stored) == sum(
        bucket_bytes(widths.count(bits), inputs, target.containers[bits])
        for bits in set(widths) - {0}
    )


def test_passes_read_one_layer_at_a_time(tiny_policy: OftPolicy) -> None:
    """A layer's packed constants are handed over before the next layer is read."""
    events: list[str] = []
    graph = float_graph(tiny_policy).clone()
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 4, RTX4070, tiny_policy.digest)
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size < 1000:
            continue

        def read(name: str = name, tensor: ir.TensorProtocol = tensor) -> ir.TensorProtocol:
            events.append(f"read {name}")
            return tensor

        value.const_value = ir.LazyTensor(
            read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )

    def store(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        events.append("store")
        return tensor

    lower(graph, plan, RTX4070, store)
    reads = [event for event in events if event != "store"]
    assert len(reads) == len(set(reads))
    longest = max("".join("s" if e == "store" else "r" for e in events).split("s"), key=len)
    # q, k and v.
    assert len(longest) == 3
    assert events[-1] == "store"


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(np.float16, ir.DataType.FLOAT16), (ml_dtypes.bfloat16, ir.DataType.BFLOAT16), (None, None)],
)
def test_exact_storage_reads_twice_and_keeps_nothing(dtype: type | None, narrow: object) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) * 1e-6
    if dtype is not None:
        weight = weight.astype(dtype).astype(np.float32)
    model = store_exactly(linear_model(weight, None))
    stored = [v.const_value for v in model.graph.initializers.values()]
    assert [t.dtype for t in stored if t is not None] == [narrow or ir.DataType.FLOAT]
    assert all(isinstance(t, ir.LazyTensor) == (narrow is not None) for t in stored)
    assert np.array_equal(stored[0].numpy().astype(np.float32), weight.T)  # type: ignore[union-attr]
