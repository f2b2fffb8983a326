"""ACT checkpoints: strict loading, what is refused, which layers reach the action, its graphs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from act_cases import ACTION, HORIZON, SIDES, act_observations, write_tiny_act
from changed_checkpoints import Change, Weights, changed, configured
from openvla_cases import copied

from engines.ort import OrtEngine
from engines.targets import find_target
from jetson.doctor.statistics import check_config, read_checkpoint
from qvla_export.allocation.random_plan import draw_plan
from qvla_export.graph.export import export_bundle
from qvla_export.policies.act.attention import SelfAttention
from qvla_export.policies.act.policy import ActPolicy, load_act_policy
from qvla_export.policies.families import describe_checkpoint, load_policy, recognize
from qvla_export.policies.layers import layer_shapes
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_act(tmp_path_factory.mktemp("act") / "checkpoint", decoder_layers=2)


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> ActPolicy:
    return load_act_policy(checkpoint, None, None)


def test_it_is_recognized_and_acts(checkpoint: Path) -> None:
    assert recognize(checkpoint).name == "act"
    loaded = load_policy(checkpoint)
    first, second = (loaded.infer(o) for o in act_observations(2))
    assert first.actions.shape == (HORIZON, ACTION)
    assert np.abs(first.actions - second.actions).max() > 1e-3
    # Batches of several give what one gives.
    batch = loaded.batch(act_observations(2))
    together = loaded.greedy_actions(batch).numpy()
    np.testing.assert_allclose(together[1], second.normalized, atol=1e-5)


def test_what_was_found_is_said(checkpoint: Path, tmp_path: Path) -> None:
    whole = describe_checkpoint(checkpoint)
    assert whole == (
        f"{checkpoint}: act, 5 actions of 4, cameras top/wrist, state 6; LeRobot executes 5 of a "
        "chunk: qvla run --mode receding --execute 5"
    )
    folder = copied(checkpoint, tmp_path / "ensembling")
    configured(0.01, "temporal_ensemble_coeff")(folder)
    assert describe_checkpoint(folder).endswith("qvla run --mode ensemble --ensemble-decay 0.01")
    facts = read_checkpoint(checkpoint, None)
    assert check_config(facts).observed == "cameras top, wrist; 5 actions of 4, state 6"


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4000])


def _infinite(weights: Weights) -> None:
    weights["model.encoder.layers.0.self_attn.in_proj_weight"][40, 0] = torch.inf


HEAD = "model.action_head.bias"
QK = "model.encoder.layers.1.self_attn.in_proj_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(lambda w: w.pop(HEAD)), r"missing \(1\): \['action_head.bias'\]"),
        (changed(lambda w: w.pop(QK)), r"missing \(2\): .*qk_proj.bias.*v_proj.bias"),
        (
            changed(lambda w: w.update({"model.extra": torch.zeros(2)})),
            r"unexpected .*extra",
        ),
        (changed(lambda w: w.update({"stray": torch.zeros(2)})), "none of the policy's: .*stray"),
        (changed(lambda w: w.update({HEAD: torch.zeros(9)})), r"file \(9,\), policy \(4,\)"),
        (changed(_infinite), "NaN or infinite"),
        (_cut, "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "weights not found"),
        (lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"), "would not be"),
        (configured(True, "pre_norm"), "pre_norm"),
        (configured(2, "n_obs_steps"), "n_obs_steps"),
        (configured("gelu", "feedforward_activation"), "feedforward_activation"),
        (configured(5, "n_heads"), "must divide into n_heads 5"),
        (configured(3, "n_encoder_layers"), r"missing \(\d+\): .*encoder.layers.2"),
    ],
)
def test_what_would_act_wrongly_is_refused(
    change: Change, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = copied(checkpoint, tmp_path / "changed")
    change(folder)
    with pytest.raises(QvlaError, match=message):
        load_policy(folder)


def test_options_of_other_layouts_are_refused(checkpoint: Path) -> None:
    with pytest.raises(QvlaError, match="leave --unnorm-key libero out"):
        load_policy(checkpoint, "libero")
    with pytest.raises(QvlaError, match="leave --preset aloha out"):
        load_policy(checkpoint, preset="aloha")


def test_pictures_of_another_size_are_refused(policy: ActPolicy) -> None:
    seen = act_observations(1)[0]
    wrong = {name: np.zeros((SIDES[1], SIDES[0], 3), np.uint8) for name in seen.images}
    with pytest.raises(QvlaError, match=r"16 x 24 pixels .* got 24 x 16"):
        policy.infer(Observation(wrong, "", seen.state))


def test_what_cannot_move_the_action_is_no_layer(policy: ActPolicy) -> None:
    names = set(policy.layers())
    first = "decoder.layers.0."
    assert {n for n in names if n.startswith(f"{first}self_attn")} == set()
    assert f"{first}multihead_attn.query" not in names
    assert {f"{first}multihead_attn.key", "decoder.layers.1.self_attn.qk_proj"} <= names
    assert not any(n.startswith(("encoder_", "action_head")) for n in names)
    # Those left out are constants: noise in the first layer's queries and keys changes nothing.
    batch = policy.batch(act_observations(2))
    before = policy.greedy_actions(batch)
    attention = policy.module.decoder.layers[0].get_submodule("self_attn")
    assert isinstance(attention, SelfAttention)
    kept = attention.qk_proj.weight.clone()
    try:
        attention.qk_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(policy.greedy_actions(batch), before, rtol=0, atol=0)
    finally:
        attention.qk_proj.weight.copy_(kept)


def test_an_attention_over_nothing_is_what_attention_computes(policy: ActPolicy) -> None:
    attention = policy.module.decoder.layers[0].get_submodule("self_attn")
    assert isinstance(attention, SelfAttention)
    nothing = torch.zeros(2, 5, 32)
    codes = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = attention(nothing, codes)
    torch.testing.assert_close(attention.of_nothing(2).expand(2, 5, 32), expected)


@pytest.mark.parametrize("planned", [False, True])
def test_engines_compute_what_torch_computes(
    planned: bool, policy: ActPolicy, tmp_path: Path
) -> None:
    target = find_target("cpu")
    shares = {0: 0.1, 2: 0.2, 4: 0.3, 8: 0.3, 16: 0.1}
    shapes = layer_shapes(policy.layers())
    plan = draw_plan(shapes, shares, target, policy.digest) if planned else None
    bundle = export_bundle(policy, plan, target, act_observations(3), tmp_path / "bundle")
    assert not (bundle.path / "tokenizer.json").exists()
    assert [spec.name for spec in bundle.inputs] == ["pixel_values", "state"]
    golden = bundle.golden()
    with OrtEngine(bundle, threads=1) as engine:
        found = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
    np.testing.assert_allclose(found, golden.reference, rtol=0, atol=1e-3)
    if planned:
        assert np.abs(golden.reference - golden.full_precision).max() > 0.01
