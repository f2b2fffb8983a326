"""Policies that integrate a flow: prefix once, a step as often as there are, as torch computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_checks import require_clean
from pi_cases import CASES, Case, folder_of, pi_observations, write_tiny_pi
from rtx_parser import builds
from tiny_bundles import mixed_plan
from traced_graphs import traced

from engines.ort import OrtEngine
from engines.targets import CPU, find_target
from engines.verify import judge
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.pi.policy import PiPolicy, load_pi_policy
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation
from qvla_export.shared.program import PartRuns, run_program

Bundles = tuple[Bundle, Bundle]


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PiPolicy:
    return load_pi_policy(write_tiny_pi(tmp_path_factory.mktemp("tiny") / "c", request.param))


@pytest.fixture(scope="module")
def bundles(policy: PiPolicy, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """A float and a quantized bundle of the same graphs."""
    options = ExportOptions(traced(policy, CPU))
    folder, seen = tmp_path_factory.mktemp("bundles"), pi_observations(2)
    whole = export_bundle(policy, None, CPU, seen, folder / "float", options)
    mixed = export_bundle(policy, mixed_plan(policy), CPU, seen, folder / "mixed", options)
    return whole, mixed


@torch.no_grad()
def test_the_program_of_the_parts_is_the_policy(policy: PiPolicy) -> None:
    """In torch: the parts, run as the program says, compute the actions."""
    parts = {part.name: part for part in policy.parts()}
    reads = {name: list(part.inputs) for name, part in parts.items()}
    (seen,) = pi_observations(1)
    calls: list[str] = []

    def call(run: PartRuns, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(name)
        outputs = parts[name].module(*(inputs[source] for source in parts[name].inputs))
        return dict(zip(parts[name].outputs, outputs, strict=True))

    feeds = {n: torch.from_numpy(v) for n, v in policy.processor.feeds(seen).items()}
    values = run_program(policy.program(), reads, feeds, call)
    assert calls == ["prefix", *["step"] * 4]
    expected = policy.greedy_actions(policy.batch([seen]))
    torch.testing.assert_close(values["actions"], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_engine_computes_torchs_actions(bundles: Bundles, policy: PiPolicy) -> None:
    for bundle in bundles:
        require_clean(bundle)
        with OrtEngine(bundle, threads=1) as engine:
            verdict = judge(bundle, engine)
            assert verdict.passed and verdict.drift.worst < 1e-3
            # One prefix a chunk.
            assert engine.part_calls == {"prefix": 1, "flow": 4}
            golden = bundle.golden()
            for feeds, expected in zip(golden.feeds, golden.reference, strict=True):
                found = engine.infer(feeds)["actions"][0]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_noise_is_an_input_that_the_manifest_describes(
    bundles: Bundles, policy: PiPolicy
) -> None:
    bundle = bundles[0]
    (noise,) = (spec for spec in bundle.inputs if spec.name == "noise")
    assert noise.shape == (1, 4, 32) and noise.dtype == "float32"
    stated = bundle.manifest["processor"]["spec"]["noise"]
    assert stated["distribution"] == "normal" and stated["seed_policy"] == "observation"
    (seen,) = pi_observations(1)
    ours, theirs = policy.processor.feeds(seen), bundle.processor.feeds(seen)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.slow
def test_weights_are_stored_once_and_small_layers_in_16_bits(
    bundles: Bundles, policy: PiPolicy
) -> None:
    whole, mixed = bundles
    assert whole.program.calls == {"prefix": 1, "step": 4}
    read = sum(weight.numel() for weight in policy.module.parameters())
    # What is not quantized is in float32 on this target where 16 bits would round.
    assert sum(whole.weight_bytes.values()) < 4 * 1.03 * read
    layers = sum(layer.weight.numel() for layer in policy.layers().values())
    assert sum(mixed.weight_bytes[bits] for bits in ("2", "4", "8", "16")) < 2 * layers


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_tensorrt_takes_every_part(policy: PiPolicy, quantized: bool, tmp_path: Path) -> None:
    """Its rules on both Jetsons, and the parser and the builder of TensorRT for RTX.

    In float with a camera that may be absent, so that positions are counted.
    """
    target = find_target("rtx4070")
    if not quantized:
        spec = policy.processor.spec
        spec = replace(spec, optional_cameras=spec.cameras[1:])
        policy = replace(policy, processor=replace(policy.processor, spec=spec))
    shapes = layer_shapes(policy.layers())
    plan = uniform_plan(shapes, 4, target, policy.digest) if quantized else None
    bundle = export_bundle(policy, plan, target, pi_observations(1), tmp_path / "b")
    for name in ("rtx4070", "orin-jp7", "orin-jp6"):
        require_clean(bundle, find_target(name))
    prompt = bundle.golden().feeds[0]["input_ids"].shape[1]
    places = 2 * policy.module.arch.image_tokens + prompt
    for part in bundle.parts:
        sizes = {s.name: prompt if s.name == "input_ids" else places for s in part.inputs}
        assert builds(bundle.model_path(part), [sizes]), part.name


def test_a_flow_is_not_cut(policy: PiPolicy) -> None:
    with pytest.raises(CheckpointError, match="prefix and step"):
        policy.parts(1)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in CASES if "case0" in p.name], ids=str)
def test_oracle_cases_through_the_engine(path: Path, tmp_path: Path) -> None:
    """Upstream's actions come out of ONNX Runtime, given upstream's own inputs and noise."""
    case = Case(path)
    policy = load_pi_policy(folder_of(case, tmp_path / "c"))
    cameras = policy.processor.spec.cameras
    black = {name: np.zeros((28, 28, 3), np.uint8) for name in cameras}
    state = np.zeros(policy.processor.spec.state_dim, np.float32)
    seen = [Observation(black, "go", state)]
    bundle = export_bundle(policy, None, CPU, seen, tmp_path / "b")
    inputs = case.inputs(policy.module)
    feeds = {
        "pixel_values": inputs.pixel_values[:, : 3 * len(cameras)].numpy(),
        "input_ids": inputs.input_ids[:, : int(inputs.prompt_lengths[0])].numpy(),
        "image_mask": inputs.image_mask[:, : len(cameras)].numpy(),
        "noise": case.golden["noise"],
    }
    if inputs.state is not None:
        feeds["state"] = inputs.state.numpy()
    with OrtEngine(bundle, threads=1) as engine:
        actions = engine.infer(feeds)["actions"]
        assert engine.part_calls == {"prefix": 1, "flow": int(case.golden["num_steps"])}
    expected = case.golden["actions_normalized" if case.lerobot else "actions"]
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_cameras_absence_is_an_input(tmp_path: Path) -> None:
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    checkpoint = write_tiny_pi(tmp_path / "c", optional_cameras=cameras[1:], flow_steps=1)
    policy = load_pi_policy(checkpoint)
    seen = [pi_observations(1)[0], pi_observations(1, cameras=cameras[:1])[0]]
    bundle = export_bundle(policy, None, CPU, seen, tmp_path / "b")
    require_clean(bundle)
    with OrtEngine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst < 1e-3
        assert engine.part_calls == {"prefix": 1, "flow": 1}
    masks = [feeds["image_mask"].tolist() for feeds in bundle.golden().feeds]
    assert masks == [[[True, True]], [[True, False]]]
