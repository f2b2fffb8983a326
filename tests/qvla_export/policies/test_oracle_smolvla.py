"""Golden data of LeRobot's SmolVLA: pictures, words, every intermediate result, the actions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from smolvla_cases import CAMERAS, CASES, SmolVlaCase

from engines.ort import OrtEngine
from engines.targets import CPU
from qvla_export.graph.export import export_bundle
from qvla_export.policies.flow.module import PrefixInputs
from qvla_export.policies.smolvla.module import SmolVlaModule

TOLERANCE, ACTIONS = 1e-4, 3e-4  # absolute, float32: the oracle's README

pytestmark = pytest.mark.skipif(
    not CASES, reason="the golden checkpoint is in QVLA_ORACLES only: 2 MB"
)


@pytest.fixture(scope="module", params=CASES, ids=[case.stem for case in CASES])
def case(request: pytest.FixtureRequest) -> SmolVlaCase:
    return SmolVlaCase(request.param)


def same(found: object, expected: np.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance, err_msg=name)


def inputs_of(case: SmolVlaCase) -> PrefixInputs:
    batch = case.batch()
    assert batch.state is not None
    return PrefixInputs(
        batch.pixel_values, batch.input_ids, batch.state, batch.image_mask, batch.prompt_lengths
    )


@torch.no_grad()
def test_what_the_network_reads(case: SmolVlaCase) -> None:
    golden, inputs, module = case.golden, inputs_of(case), case.policy.module
    dims = golden["state"].shape[1]
    same(inputs.state[:, :dims], golden["state_normalized"], "state")
    assert not inputs.state[:, dims:].any()
    for i, (tokens, mask) in enumerate(
        zip(golden["lang_tokens"], golden["lang_masks"], strict=True)
    ):
        assert inputs.input_ids[i, : mask.sum()].tolist() == tokens[mask].tolist()
    frames = inputs.pixel_values.unflatten(1, (-1, 3)).transpose(0, 1)
    for number, (pictures, masks) in enumerate(
        zip(golden["images_prepared"], golden["image_masks"], strict=True)
    ):
        if number < len(frames):
            same(frames[number][masks], pictures[masks], "pictures")
            features = module.features(frames[number][masks])
            same(features, golden["vision_features"][number][masks], "features")
            same(
                module.images(frames[number][masks]), golden["image_embs"][number][masks], "images"
            )
        else:  # the blank camera, which is not there at all here
            assert not masks.any()


@torch.no_grad()
def test_what_the_prefix_hands_on(case: SmolVlaCase) -> None:
    golden, module, inputs = case.golden, case.policy.module, inputs_of(case)
    hidden, seen = module.embed(inputs)
    prefix = module.prefix(inputs)
    masks = golden["prefix_pad_masks"]
    for i, mask in enumerate(masks):
        rows = np.ones(hidden.shape[1], bool) if seen is None else seen[i].numpy()
        assert int(prefix.length[i]) == int(mask.sum())
        # Upstream multiplies images and words by the root of the width on their way in, too.
        same(hidden[i].numpy()[rows], golden["prefix_embs"][i][mask], "embeddings")
        for block in range(0, len(prefix.pairs), module.arch.self_attention_every):
            for found, name in zip(prefix.pairs[block], ("keys", "values"), strict=True):
                expected = golden[f"prefix_{name}"][block, i][:, mask]
                same(found[i][:, rows], expected, name)


@torch.no_grad()
def test_every_step_of_the_flow(case: SmolVlaCase) -> None:
    golden, module = case.golden, case.policy.module
    np.testing.assert_array_equal(module.arch.flow.time_points(), golden["time"][:, 0])
    prefix = module.prefix(inputs_of(case))
    for number, (flow, expected) in enumerate(zip(golden["x_t"], golden["v_t"], strict=True)):
        velocity = module.velocity(prefix, torch.from_numpy(flow), torch.tensor([number]))
        same(velocity, expected, f"velocity {number}")
    first = module.suffix(torch.from_numpy(golden["x_t"][0]), torch.tensor([0]))
    same(first, golden["suffix_embs_step0"], "suffix")


@torch.no_grad()
def test_actions_are_upstreams(case: SmolVlaCase) -> None:
    golden, policy = case.golden, case.policy
    normalized = policy.greedy_actions(case.batch())
    same(normalized, golden["actions_normalized"], "normalized", ACTIONS)
    for found, expected in zip(normalized, golden["actions"], strict=True):
        same(policy.processor.chunk(found.numpy()).actions, expected, "actions", ACTIONS)
    for name in ("rope_theta_of_config", "bidirectional_suffix"):
        control = golden[f"actions_normalized_NEGATIVE_CONTROL_{name}"]
        assert np.abs(normalized.numpy() - control).max() > 100 * ACTIONS


@pytest.mark.slow
def test_the_graph_s_actions_are_upstreams(case: SmolVlaCase, tmp_path: Path) -> None:
    """Given upstream's noise; observations that lack a camera are another policy's."""
    golden, seen = case.golden, case.observations()
    bundle = export_bundle(case.policy, None, CPU, seen, tmp_path / "bundle")
    whole = np.all([golden[f"image_mask_{name}"] for name in CAMERAS], axis=0)
    assert whole.any()
    with OrtEngine(bundle, threads=1) as engine:
        for row in np.flatnonzero(whole):
            feeds = bundle.processor.feeds(seen[row]) | {"noise": golden["noise"][row][None]}
            found = engine.infer(feeds)["actions"][0]
            expected = golden["actions_normalized"][row]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_noise_is_an_input(case: SmolVlaCase) -> None:
    module: SmolVlaModule = case.policy.module
    assert not any("noise" in name for name in module.state_dict())
    first, second = (case.policy.infer(case.observations()[0]) for _ in range(2))
    np.testing.assert_array_equal(first.actions, second.actions)
