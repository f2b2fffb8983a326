"""A policy that decodes latent tokens: its graphs, run as the program says, are torch's chunk."""

from pathlib import Path

import numpy as np
import pytest
from graph_checks import require_clean
from openvla_cases import openvla_observations
from rtx_parser import builds
from tiny_bundles import exported_oracle, mixed_plan
from traced_graphs import traced
from univla_cases import CASES, CODEBOOK, Case, write_tiny_univla

from engines.ort import OrtEngine
from engines.targets import CPU, find_target
from engines.verify import judge
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.univla.policy import UniVlaPolicy, load_univla_policy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.inputs.noise import NoiseSpec

CALLS = {"prefix": 1, "prefill": 1, "visual": 1, "decode": 3, "action": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> UniVlaPolicy:
    return load_univla_policy(write_tiny_univla(tmp_path_factory.mktemp("tiny") / "checkpoint"))


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> UniVlaPolicy:
    """The same network, drawing tokens as UniVLA's evaluation does."""
    folder = tmp_path_factory.mktemp("drawing") / "checkpoint"
    return load_univla_policy(write_tiny_univla(folder, temperature=0.75, top_p=0.9, noise_seed=3))


@pytest.fixture(scope="module")
def bundles(
    policy: UniVlaPolicy, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """A float and a quantized bundle of the same graphs."""
    options = ExportOptions(traced(policy, CPU))
    folder, seen = tmp_path_factory.mktemp("bundles"), openvla_observations(3)
    whole = export_bundle(policy, None, CPU, seen, folder / "float", options)
    mixed = export_bundle(policy, mixed_plan(policy), CPU, seen, folder / "mixed", options)
    for bundle in (whole, mixed):
        require_clean(bundle)
    return whole, mixed


def test_an_engine_makes_torchs_chunk(bundles: tuple[Bundle, Bundle], policy: UniVlaPolicy) -> None:
    for bundle in bundles:
        with OrtEngine(bundle, threads=1) as engine:
            assert judge(bundle, engine).passed
            assert engine.part_calls == CALLS
    whole, seen = bundles[0], openvla_observations(3)
    with OrtEngine(whole, threads=1) as engine:
        for observation in seen:
            feeds = whole.processor.feeds(observation)
            expected = policy.greedy_actions(policy.inputs([observation])).numpy()
            got = engine.infer(feeds)["actions"]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layers_per_part", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_an_engine_draws_torchs_tokens(
    drawing: UniVlaPolicy, tmp_path: Path, layers_per_part: int | None
) -> None:
    """Noise is an input that the manifest describes; whole graphs and cut ones draw alike."""
    seen, options = openvla_observations(6, seed=4), ExportOptions(layers_per_part=layers_per_part)
    bundle = export_bundle(drawing, None, CPU, seen[:2], tmp_path / "bundle", options)
    require_clean(bundle)
    spec = Bundle.load(bundle.path).processor.spec
    assert spec.noise == NoiseSpec("noise", (4, CODEBOOK), "gumbel", seed=3)
    assert [item.name for item in bundle.inputs][-1] == "noise"
    with OrtEngine(bundle, threads=1) as engine:
        assert judge(bundle, engine).passed
        for observation in seen:
            got = engine.infer(bundle.processor.feeds(observation))["actions"]
            expected = drawing.greedy_actions(drawing.inputs([observation])).numpy()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


def test_the_decoder_is_stored_once(bundles: tuple[Bundle, Bundle], policy: UniVlaPolicy) -> None:
    whole, mixed = bundles
    assert [part.name for part in whole.parts] == ["prefix", "decoder", "visual", "action"]
    assert whole.program.calls == {"prefix": 1, "decoder": 4, "visual": 1, "action": 1}
    numbers = {name: weight.numel() for name, weight in policy.module.named_parameters()}
    # The last block of a tower reaches nothing; the action decoder's weights are float32.
    dead = sum(n for name, n in numbers.items() if "vision" in name and ".2." in name)
    exact = sum(n for name, n in numbers.items() if name.startswith("action_decoder."))
    halves = sum(numbers.values()) - dead - exact
    assert sum(whole.weight_bytes.values()) < 1.02 * (2 * halves + 4 * exact)  # and some constants
    layers = sum(layer.weight.numel() for layer in policy.layers().values())
    assert sum(mixed.weight_bytes[bits] for bits in ("2", "4", "8", "16")) < 2 * layers


@pytest.mark.slow
@pytest.mark.skipif(not CASES, reason="no whole network is there")
@pytest.mark.parametrize("layers_per_part", [None, 1])
def test_oracle_cases_through_the_engine(tmp_path: Path, layers_per_part: int | None) -> None:
    """Upstream's chunks come out of ONNX Runtime, from whole graphs and from cut ones."""
    cases = [Case(path) for path in CASES if path.parent == CASES[0].parent]
    donor = load_univla_policy(write_tiny_univla(tmp_path / "donor"))
    bundle = exported_oracle(cases[0].policy, donor, tmp_path / "b", layers_per_part)
    with OrtEngine(bundle, threads=1) as engine:
        for case in cases:
            feeds = {
                "pixel_values": case.golden["pixel_values"],
                "input_ids": case.batch().input_ids.numpy(),
            }
            got = engine.infer(feeds)["actions"]
            np.testing.assert_allclose(got, case.golden["decoder_chunk"], rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["greedy", "drawn"])
def test_tensorrt_targets_take_every_part(
    choice: str, policy: UniVlaPolicy, drawing: UniVlaPolicy, tmp_path: Path
) -> None:
    policy, target = policy if choice == "greedy" else drawing, find_target("rtx4070")
    options = ExportOptions(traced(policy, target))
    bundle = export_bundle(
        policy, None, target, openvla_observations(2), tmp_path / "float", options
    )
    for checked in ("rtx4070", "orin-jp7", "orin-jp6"):
        require_clean(bundle, find_target(checked))
    prefix, decoder, visual, action = bundle.parts
    assert builds(bundle.model_path(prefix), [{"input_ids": 20}])
    # One engine for both: 20 tokens behind 4 patches, then one at a time with room for 3 more.
    caches = {spec.name: 27 for spec in decoder.inputs if "room" in spec.shape}
    both = [{**caches, "hidden": rows} for rows in (24, 1)]
    assert builds(bundle.model_path(decoder), both)
    assert builds(bundle.model_path(visual), [{"states": 24}])
    assert builds(bundle.model_path(action), [{}])
