"""Golden data of upstream OpenVLA-OFT's FiLM and diffusion head: features, every step, actions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oft_variants import CASE_IDS, CASES, FOLDER, Variant

from qvla_export.policies.families import describe_checkpoint, load_policy, recognize
from qvla_export.policies.oft.diffusion import Ddim
from qvla_export.policies.oft.policy import load_oft_policy
from qvla_export.shared.errors import CheckpointError

INPUTS = ("noisy", "noise")
TOLERANCE = 1e-4  # absolute, float32, as the other cases of the family


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return Variant(request.param, tmp_path_factory.mktemp("variant"))


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_instruction_modulates_what_is_seen(case: Variant) -> None:
    module, batch = case.policy.module, case.batch()
    language = module.language(module.text(batch.input_ids))
    close(module.seen(batch.pixel_values, language), case.golden["projected_features"])
    other = module.seen(batch.pixel_values, language + 1)
    changed = (other - module.seen(batch.pixel_values, language)).abs().max()
    assert (changed > 100 * TOLERANCE) == case.film


@torch.no_grad()
def test_every_step_is_upstreams(case: Variant) -> None:
    module, batch = case.policy.module, case.batch()
    text = module.text(batch.input_ids)
    context = module.context(module.seen(batch.pixel_values, module.language(text)), batch.state)
    if not case.steps:
        hidden = module.hidden(context, text, None, None)
        close(hidden, case.golden["actions_hidden_states"])
        return
    noisy, ddim = batch.noise, module.ddim
    assert noisy is not None and ddim is not None and len(ddim.times) == case.steps
    for number, expected in enumerate(case.golden["after_step"]):
        noisy = module.denoise(context, text, noisy, torch.tensor([number]))
        close(noisy[0], expected)


def test_actions_are_upstreams(case: Variant) -> None:
    actions = case.policy.greedy_actions(case.batch())[0].numpy()
    got = case.policy.processor.chunk(actions).actions
    np.testing.assert_allclose(got, case.golden["actions"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_steps_of_the_scheduler_are_upstreams(steps: int) -> None:
    ddim = Ddim(50, steps, 16)
    with np.load(FOLDER / "ddim.npz") as golden:
        np.testing.assert_allclose(ddim.times.numpy(), golden[f"times_{steps}"], atol=1e-5)
        for number in range(steps):
            noisy, noise = (torch.from_numpy(golden[f"{n}_{steps}"][number]) for n in INPUTS)
            got = ddim.step(noise, noisy, torch.tensor([number]))
            np.testing.assert_allclose(got.numpy(), golden[f"after_{steps}"][number], atol=1e-5)


@torch.no_grad()
def test_a_padded_row_acts_as_alone(case: Variant) -> None:
    single, policy = case.batch(), case.policy
    padded = torch.nn.functional.pad(single.input_ids, (0, 4), value=1)
    lengths = torch.tensor([single.input_ids.shape[1]])
    batch = replace(single, input_ids=padded, prompt_lengths=lengths)
    got, expected = policy.normalized_actions(batch), policy.normalized_actions(single)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_layers_are_those_of_towers_and_decoder(case: Variant) -> None:
    names = set(case.policy.layers())
    assert not any(name.startswith(("film.", "noisy_", "action_head")) for name in names)
    assert "vision_backbone.featurizer.encoder.layer.0.mlp.fc1" in names
    sources = {place.source for place in case.policy.migrations()}
    assert any(source.startswith("vision_backbone.") for source in sources) != case.film


def test_variants_are_told_by_their_files(case: Variant) -> None:
    folder = case.checkpoint
    config = {k: v for k, v in vars(case.policy.config).items() if k != "head"}
    (folder / "qvla_policy.json").write_text(json.dumps(config))
    opened = load_policy(folder)
    assert opened.digest == case.policy.digest
    told = describe_checkpoint(folder)
    assert ("vision_backbone--5" in told) == case.film
    assert ("head diffusion" in told) == bool(case.steps)
    if (folder / "tokenizer.json").exists():
        recognize(folder).check(folder, None, None)
    else:
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            recognize(folder).check(folder, None, None)
    recognize(folder).check_files(folder, None)
    if case.steps:
        with pytest.raises(CheckpointError, match=r"noisy_action_projector.*set head to"):
            load_oft_policy(folder, None, replace(case.policy.config, head="l1"))


def test_the_towers_file_must_be_whole(tmp_path: Path) -> None:
    case = Variant(next(path for path in CASES if "film_l1" in path.stem), tmp_path)
    (file,) = case.checkpoint.glob("vision_backbone--*")
    tensors = torch.load(file, weights_only=True)
    key = "vision_backbone.featurizer.blocks.0.scale.weight"
    scale = tensors.pop(key)
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing .*film\.featurizer\.0\.scale\.weight"):
        load_oft_policy(case.checkpoint, None, case.config())
    torch.save({**tensors, key: scale, "vision_backbone.extra": scale}, file)
    with pytest.raises(CheckpointError, match=r"unexpected .*vision_backbone\.extra"):
        load_oft_policy(case.checkpoint, None, case.config())
