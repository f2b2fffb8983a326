"""torch walks bundles' graphs with ONNX Runtime's numbers; what it does not know it refuses."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from family_cases import FAMILY_CASES, FamilyCase
from loop_bundles import loop_bundle
from openvla_cases import openvla_observations
from ort_graphs import LAYER, linear_model, run_model
from tiny_bundles import make_bundle, mixed_plan
from torch import nn
from univla_cases import write_tiny_univla

from engines.base import EngineError, InvalidFeeds
from engines.load import load_engine
from engines.targets import CPU
from engines.torch.onnx_operators import OPERATORS
from engines.torch.part_graph import PartGraph
from engines.torch.torch_engine import TorchEngine
from engines.verify import judge
from qvla_export.graph.export import export_bundle
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.policies.families import load_policy
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("torch") / "mixed"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), folder)


def require_equal(bundle: Bundle, engine: TorchEngine) -> None:
    """Both runtimes pass verification, and lie as near to each other as to torch's policy."""
    verdict = judge(bundle, engine)
    verdict.require_passed()
    with load_engine(bundle, threads=1, runtime="ort") as other:
        theirs = judge(bundle, other)
    bound = verdict.drift.worst + theirs.drift.worst + 1e-6
    assert np.abs(verdict.actions - theirs.actions).max() <= bound
    assert engine.part_calls == other.part_calls


@pytest.fixture(scope="module")
def loop(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("torch") / "loop"
    return loop_bundle(tiny_policy, tiny_observations(2), folder)


@pytest.mark.parametrize(
    "ranges",
    [
        None,
        ActivationRanges(8, "max", {LAYER: 2.5}),
        ActivationRanges(8, "token", {LAYER: 1.0}, frozenset({LAYER})),
    ],
    ids=["packed", "expanded", "expanded, by tokens"],
)
def test_layers_of_all_widths_have_onnx_runtimes_numbers(
    ranges: ActivationRanges | None, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(150, 200)).astype(np.float32)
    widths = generator.choice([0, 2, 4, 8, 16], 150).astype(np.int8)
    leveled = CPU.with_two_level_scales()
    model = linear_model(weight, None)
    if ranges is not None:
        model = quantize_activations(model, ranges, leveled)
    rounded = ranges is not None
    model = bucketize(model, {LAYER: widths}, spec_for(leveled), leveled, rounded_inputs=rounded)
    x = generator.normal(size=(2, 7, 200)).astype(np.float32)
    expected = run_model(model, x, tmp_path)
    ir.save(model, tmp_path / "layer.onnx")
    graph = PartGraph(tmp_path / "layer.onnx", torch.device("cpu"), tiled=False)
    (found,) = graph.run({"x": torch.from_numpy(x)}).values()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_mixed_bundle_has_onnx_runtimes_numbers(bundle: Bundle) -> None:
    with load_engine(bundle, runtime="torch") as engine:
        assert isinstance(engine, TorchEngine)
        require_equal(bundle, engine)
        assert engine.runtime.startswith("torch ")


def test_loops_of_a_program_run(loop: Bundle) -> None:
    with load_engine(loop, runtime="torch") as engine:
        assert isinstance(engine, TorchEngine)
        outputs = [engine.infer(feeds)["actions"] for feeds in loop.golden().feeds]
        np.testing.assert_allclose(np.concatenate(outputs), loop.golden().reference, rtol=1e-6)
        with pytest.raises(InvalidFeeds, match="missing"):
            engine.infer({})
    with pytest.raises(EngineError, match="closed"):
        engine.infer(loop.golden().feeds[0])


def test_an_unknown_operator_is_refused_by_name(loop: Bundle, tmp_path: Path) -> None:
    for part in loop.parts:
        (tmp_path / part.model).write_bytes(loop.model_path(part).read_bytes())
    changed = tmp_path / loop.parts[0].model
    model = onnx.load(changed)
    model.graph.node[0].op_type = "Erf"
    onnx.save(model, changed)
    with pytest.raises(EngineError, match=r"operators \['Erf'\].*--runtime ort"):
        TorchEngine(replace(loop, path=tmp_path), "cpu")
    changed.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot read graph"):
        TorchEngine(replace(loop, path=tmp_path), "cpu")


@pytest.mark.parametrize("stored", [None, b"short"])
def test_a_graph_without_its_weights_is_refused(stored: bytes | None, tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones(16, np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, "w.bin", offset=0, length=64)
    weight.ClearField("raw_data")
    graph = onnx.helper.make_graph([], "part", [], [], [weight])
    (tmp_path / "part.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    if stored is not None:
        (tmp_path / "w.bin").write_bytes(stored)
    with pytest.raises(EngineError, match="cannot read graph"):
        PartGraph(tmp_path / "part.onnx", torch.device("cpu"), tiled=False)


def test_without_a_gpu_it_says_so(loop: Bundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="sees no NVIDIA GPU"):
        TorchEngine(loop, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_captured_action_is_the_cpus(bundle: Bundle) -> None:
    with TorchEngine(bundle, "cuda") as engine:
        verdict = judge(bundle, engine)
        verdict.require_passed()
        np.testing.assert_array_equal(judge(bundle, engine).actions, verdict.actions)
        assert set(engine.part_ms) == {"action"}


def operators_of(bundle: Bundle) -> set[str]:
    return {
        node.op_type
        for part in bundle.parts
        for node in onnx.load(bundle.model_path(part), load_external_data=False).graph.node
    }


_DRAWN = partial(write_tiny_univla, temperature=0.75, top_p=0.9, noise_seed=3)
CASES = {**FAMILY_CASES, "drawn": FamilyCase(_DRAWN, openvla_observations)}


@pytest.fixture(scope="module")
def bundles_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Bundle]]:
    """Return a family's bundles: float, of all widths, with inputs rounded, and by tokens."""

    @cache
    def made(family: str) -> list[Bundle]:
        folder, leveled = tmp_path_factory.mktemp(family), CPU.with_two_level_scales()
        case = CASES[family]
        policy = load_policy(case.write(folder / "checkpoint"))
        plan = replace(
            mixed_plan(policy),
            containers=dict(leveled.containers),
            quantizer=spec_for(leveled),
        )
        ranges = ActivationRanges(8, "max", dict.fromkeys(plan.widths, 2.0))
        tokens = {n for n, layer in policy.layers().items() if isinstance(layer, nn.Linear)}
        by_tokens = replace(ranges, method="token", per_token=frozenset(tokens))
        plans = (None, plan, *(replace(plan, activations=each) for each in (ranges, by_tokens)))
        return [
            export_bundle(
                policy, one, leveled if one else CPU, case.observations(1), folder / str(number)
            )
            for number, one in enumerate(plans)
        ]

    return made


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", CASES)
def test_a_familys_bundles_have_the_actions_they_must(
    family: str, bundles_of: Callable[[str], list[Bundle]]
) -> None:
    for made in bundles_of(family):
        with TorchEngine(made, "cpu") as engine:
            judge(made, engine).require_passed()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bundles_hold_the_listed_operators_and_no_others(
    bundles_of: Callable[[str], list[Bundle]],
) -> None:
    found = {name for family in CASES for made in bundles_of(family) for name in operators_of(made)}
    assert found == set(OPERATORS)
