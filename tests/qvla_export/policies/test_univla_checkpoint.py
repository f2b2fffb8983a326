"""UniVLA checkpoints: recognized from their files, whole or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import openvla_observations, stored_weights
from safetensors.torch import save_file
from univla_cases import DIM, HORIZON, write_tiny_univla

from jetson.doctor.examination import DoctorRequest
from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.pipeline.robot.doctor import examine_machine
from qvla_export.policies.families import (
    describe_checkpoint,
    family_with_size,
    load_policy,
    recognize,
)
from qvla_export.policies.layers import replaced_weights
from qvla_export.policies.univla.policy import UniVlaPolicy, load_univla_policy
from qvla_export.policies.univla.random_checkpoint import write_random_checkpoint
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import load_interface

SMALL = Geometry(
    dino=TransformerSize(64, 128, 2),
    siglip=TransformerSize(64, 192, 2),
    llama=TransformerSize(128, 320, 3),
    patch_size=14,
    inputs=PolicyInputs(1, 28, 30, 5, 7, head="latent", autoregressive=True, latent_tokens=4),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_univla(tmp_path_factory.mktemp("univla") / "checkpoint")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> UniVlaPolicy:
    return load_univla_policy(checkpoint)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "qvla_policy.json").read_text())
    (folder / "qvla_policy.json").write_text(json.dumps({**config, **values}))


def test_the_family_is_told_by_files(folder: Path) -> None:
    assert recognize(folder).name == "univla"
    (folder / "qvla_policy.json").unlink()
    assert recognize(folder).name == "univla"
    interface = load_interface(folder)
    assert interface.cameras == ("full_image",)
    assert (interface.horizon, interface.action_dim, interface.state_dim) == (HORIZON, DIM, 0)
    (folder / "action_decoder.pt").unlink()
    assert recognize(folder).name == "openvla"


def test_what_is_assumed_is_said(folder: Path) -> None:
    whole = describe_checkpoint(folder)
    assert whole == f"{folder}: univla with action_decoder.pt, 12 actions of 7"
    (folder / "qvla_policy.json").write_text(json.dumps({"vision_heads": [2, 2]}))
    told = describe_checkpoint(folder)
    assert "; assumed: cameras full_image, horizon 12, action_dim 7" in told
    assert "center_crop True" in told and "vision_heads" not in told
    found = {f.what: f.observed for f in examine_machine(DoctorRequest(checkpoint=folder)).findings}
    assert "assumed" not in found["policy description"]
    (folder / "qvla_policy.json").unlink()
    found = {f.what: f.observed for f in examine_machine(DoctorRequest(checkpoint=folder)).findings}
    assert "12 actions of 7, state 0; assumed, as no qvla_policy" in found["policy description"]


def test_a_preset_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / "qvla_policy.json").unlink()
    with pytest.raises(CheckpointError, match="preset 'libero' is for OpenVLA-OFT's: leave it out"):
        load_policy(folder, preset="libero")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"horizon": 8}, "puts out 84 numbers, not 8 actions of 7; write horizon"),
        ({"decoder_heads": 5}, "width 64 does not divide into 5 heads; write decoder_heads"),
        ({"state_dim": 8}, "one camera and takes no state"),
        ({"codebook": 64}, "have no room for them; check pad_to_multiple_of"),
        ({"codebook": 1}, "codebook must be a whole number from 2"),
        ({"color": 1}, "is not a policy configuration"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100"),
        ({"temperature": 1e-6}, "temperature must be 0, which takes the likeliest token, or 0.01"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": 0.75, "top_p": 0}, "top_p must be a number from 0.01 to 1"),
        ({"top_p": 0.9}, "at temperature 0 none is drawn; write temperature, 0.75"),
        ({"temperature": 1, "codebook": 1025}, "drawn from a codebook of 1024"),
        ({"history": 2}, "history must be 0, or 1 for a prompt that repeats"),
        ({"history": True}, "history must be 0, or 1"),
        ({"history": 1, "codebook": 1025}, "and repeated in the prompt, got 1025; write"),
        ({"noise_seed": -1}, "noise_seed must be a whole number from 0"),
    ],
)
def test_what_is_configured_wrongly_is_refused(
    folder: Path, values: dict[str, object], says: str
) -> None:
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=says):
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("projector.fc1.bias"), r"missing \(1\): \['projector.fc1.bias'\]"),
        (lambda w: w.update(extra=torch.zeros(2)), r"unexpected \(1\): \['extra'\]"),
        (lambda w: w.update({"projector.fc1.bias": torch.zeros(3)}), r"wrong shape \(1\)"),
        (lambda w: w.pop("language_model.lm_head.weight"), "missing .*lm_head"),
    ],
)
def test_keys_of_the_body_must_fit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    weights = stored_weights(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("visual_pool.latents"), "missing .*action_decoder.visual_pool.latents"),
        (lambda d: d.update(extra=torch.zeros(2)), r"unexpected .*\['action_decoder.extra'\]"),
        (lambda d: d.update({"visual_pool.attn_norm.g": torch.zeros(3)}), r"wrong shape \(1\)"),
        (lambda d: d.pop("proj.0.weight"), "has no weights .*proj.0.weight"),
        (
            lambda d: d.update({"proprio_proj.0.weight": torch.zeros(2, 2)}),
            "stores proprio_proj.0.weight, of an action decoder for real robots",
        ),
        (lambda d: d.update({"proj.0.bias": torch.full((84,), torch.nan)}), "NaN or infinite"),
    ],
)
def test_keys_of_the_action_decoder_must_fit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    decoder = torch.load(folder / "action_decoder.pt", weights_only=True)
    change(decoder)
    torch.save(decoder, folder / "action_decoder.pt")
    with pytest.raises(CheckpointError, match=says):
        load_policy(folder)
    with pytest.raises(CheckpointError, match=says):
        recognize(folder).check(folder, None, None)


def test_files_that_nothing_reads_are_refused(folder: Path) -> None:
    recognize(folder).check_files(folder, None)
    (folder / "latent_action_model-5.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="what made the latent tokens in training"):
        load_policy(folder)
    (folder / "latent_action_model-5.ckpt").rename(folder / "action_decoder-5.pt")
    with pytest.raises(CheckpointError, match="exactly one action_decoder"):
        recognize(folder).check_files(folder, None)


def test_weights_on_disk_are_the_same_weights(folder: Path, policy: UniVlaPolicy) -> None:
    stored = load_univla_policy(folder, resident=False)
    assert stored.digest == policy.digest
    back, [seen] = stored.in_memory(), openvla_observations(1)
    assert np.array_equal(back.infer(seen).actions, policy.infer(seen).actions)
    decoder = torch.load(folder / "action_decoder.pt", weights_only=True)
    torch.save({k: v + 1e-3 for k, v in decoder.items()}, folder / "action_decoder.pt")
    assert load_univla_policy(folder).digest != policy.digest


def test_actions_are_of_the_tokens_that_were_chosen_before(policy: UniVlaPolicy) -> None:
    """A batch keeps its tokens: only what comes of the weights moves with them."""
    batch, layers = policy.batch(openvla_observations(2)), policy.layers()
    name = next(name for name in layers if name.endswith("down_proj"))
    zeros = np.zeros(tuple(layers[name].weight.shape), np.float32)
    with torch.no_grad():
        whole = policy.normalized_actions(batch)
        torch.testing.assert_close(whole, policy.greedy_actions(batch), rtol=0, atol=1e-5)
        with replaced_weights(layers, {name: zeros}):
            assert batch.tokens is not None
            again = policy.batch(openvla_observations(2)).tokens
            assert again is not None and not torch.equal(again, batch.tokens)
            moved = policy.normalized_actions(batch)
    assert (moved - whole).abs().max() > 1e-3
    assert not any(name.startswith(("projector", "action_decoder")) for name in layers)
    assert sum(name.startswith("language_model.") for name in layers) == 2 * 7


def test_what_may_choose_another_token_moves_the_action(policy: UniVlaPolicy) -> None:
    """By as much as the expectation of the tokens does, and the gradient says so beforehand."""
    batch, head = policy.batch(openvla_observations(2)), policy.module.language_model.lm_head
    change = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    change *= 1e-3 * head.weight.norm() / change.norm()
    before = policy.normalized_actions(batch)
    head.weight.requires_grad_(True)
    try:
        (slope,) = torch.autograd.grad(policy.normalized_actions(batch).sum(), head.weight)
    finally:
        head.weight.requires_grad_(False)
    foretold = (slope * change).sum()
    assert abs(foretold) > 1e-4
    with replaced_weights({"head": head}, {"head": (head.weight + change).numpy()}):
        moved = (policy.normalized_actions(batch) - before).sum()
        given = policy.module.act(policy.teacher_forced(batch)) - before
    torch.testing.assert_close(moved, foretold, rtol=0.05, atol=0)
    # Given the tokens themselves, the layer that chooses among them is never felt.
    assert given.abs().max() < 1e-6


def test_a_random_checkpoint_of_a_size_is_recognized_and_acts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, SMALL, shard_bytes=1 << 22)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert recognize(folder).name == "univla"
    with pytest.raises(CheckpointError, match="puts out 35 numbers, not 12 actions of 7"):
        load_policy(folder)
    (folder / "qvla_policy.json").write_text(json.dumps({"horizon": 5}))
    opened = load_policy(folder)
    shapes = {
        name: (layer.weight.shape[0], layer.weight[0].numel())
        for name, layer in opened.layers().items()
    }
    assert shapes == SMALL.layers
    actions = opened.infer(openvla_observations(1)[0]).actions
    assert actions.shape == (5, 7) and np.isfinite(actions).all()
    assert family_with_size("univla-7b").name == "univla"
