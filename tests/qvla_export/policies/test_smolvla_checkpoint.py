"""SmolVLA checkpoints: strict loading, what is refused, its graphs and their program."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from changed_checkpoints import Change, changed, configured
from openvla_cases import copied
from smolvla_cases import ACTION, HORIZON, STEPS, smolvla_observations, write_tiny_smolvla

from engines.ort import OrtEngine
from engines.targets import find_target
from qvla_export.allocation.random_plan import draw_plan
from qvla_export.graph.export import export_bundle
from qvla_export.policies.families import describe_checkpoint, load_policy, recognize
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.smolvla.policy import SmolVlaPolicy, load_smolvla_policy
from qvla_export.shared.errors import QvlaError

_TANH = "gelu_pytorch_tanh"
_TEXT = "model.vlm_with_expert.vlm.model.text_model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_smolvla(tmp_path_factory.mktemp("smolvla") / "checkpoint")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> SmolVlaPolicy:
    return load_smolvla_policy(checkpoint, None, None)


def test_it_is_recognized_and_acts(checkpoint: Path) -> None:
    assert recognize(checkpoint).name == "smolvla"
    loaded = load_policy(checkpoint)
    chunks = [loaded.infer(o) for o in smolvla_observations(3)]
    assert chunks[0].actions.shape == (HORIZON, ACTION)
    assert np.abs(chunks[0].actions - chunks[1].actions).max() > 1e-3
    # Batches of prompts of several lengths give what each alone gives.
    together = loaded.greedy_actions(loaded.batch(smolvla_observations(3))).numpy()
    for chunk, row in zip(chunks, together, strict=True):
        np.testing.assert_allclose(row, chunk.normalized, atol=1e-5)


def test_what_the_vlms_file_leaves_out_is_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "checkpoint")
    (folder / "vlm").chmod(0o755)
    path = folder / "vlm/config.json"
    stated = json.loads(path.read_text())
    told = describe_checkpoint(folder)
    assert told == (
        f"{folder}: smolvla, 5 actions of 4, cameras top/wrist, state 6; LeRobot executes 5 of a "
        "chunk: qvla run --mode receding --execute 5"
    )
    del stated["text_config"]["rms_norm_eps"], stated["vision_config"]["hidden_act"]
    path.write_text(json.dumps(stated))
    assumed = f"vlm vision_config.hidden_act {_TANH}, vlm text_config.rms_norm_eps 1e-05"
    assert describe_checkpoint(folder) == f"{told}; assumed: {assumed}"


def _without_vlm(folder: Path) -> None:
    configured("someone/SmolVLM2", "vlm_model_name")(folder)
    (folder / "vlm/tokenizer.json").unlink()


OUT = "model.action_out_proj.bias"
CROSS = "model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(lambda w: w.pop(OUT)), r"missing .*action_out_proj.bias"),
        (changed(lambda w: w.pop(CROSS)), r"missing .*layers.1.self_attn.key"),
        (changed(lambda w: w.update({"model.extra": torch.zeros(2)})), r"unexpected .*extra"),
        (changed(lambda w: w.update({OUT: torch.zeros(9)})), r"file \(9,\), policy \(8,\)"),
        (changed(lambda w: w[OUT].fill_(torch.nan)), "NaN or infinite"),
        (configured("self_attn", "attention_mode"), "attention_mode"),
        (configured(True, "add_image_special_tokens"), "special_tokens"),
        (configured(2, "num_expert_layers"), "num_expert_layers is 2"),
        (configured([64, 32], "resize_imgs_with_padding"), "other sizes"),
        (configured(3, "max_action_dim"), "max_action_dim"),
        (configured(3, "scale_factor", file="vlm/config.json"), "in blocks of 3"),
        (configured("qwen2", "text_config", "model_type", file="vlm/config.json"), "'qwen2'"),
        (_without_vlm, "hf download someone/SmolVLM2 config.json tokenizer.json"),
    ],
)
def test_what_would_act_wrongly_is_refused(
    change: Change, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = copied(checkpoint, tmp_path / "changed")
    (folder / "vlm").chmod(0o755)
    change(folder)
    with pytest.raises(QvlaError, match=message):
        load_policy(folder)


def test_what_upstream_stores_and_never_reads_may_be_there(
    checkpoint: Path, policy: SmolVlaPolicy, tmp_path: Path
) -> None:
    folder = copied(checkpoint, tmp_path / "more")
    last = f"{_TEXT}.layers.2"
    unread = ("mlp.up_proj.weight", "self_attn.q_proj.weight", "post_attention_layernorm.weight")
    more = {f"{last}.{name}": torch.ones(3) for name in unread}
    more["model.vlm_with_expert.vlm.lm_head.weight"] = torch.ones(3, 3)
    changed(lambda weights: weights.update(more))(folder)
    seen = smolvla_observations(1)[0]
    found = load_policy(folder).infer(seen).actions
    np.testing.assert_array_equal(found, policy.infer(seen).actions)


@pytest.mark.parametrize("planned", [False, True])
def test_engines_compute_what_torch_computes(
    planned: bool, policy: SmolVlaPolicy, tmp_path: Path
) -> None:
    target = find_target("cpu")
    shares = {0: 0.1, 2: 0.1, 4: 0.3, 8: 0.4, 16: 0.1}
    shapes = layer_shapes(policy.layers())
    plan = draw_plan(shapes, shares, target, policy.digest) if planned else None
    bundle = export_bundle(policy, plan, target, smolvla_observations(3), tmp_path / "bundle")
    assert {spec.name for spec in bundle.inputs} == {"pixel_values", "input_ids", "state", "noise"}
    golden = bundle.golden()
    with OrtEngine(bundle, threads=1) as engine:
        found = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
        assert engine.part_calls == {"prefix": 1, "flow": STEPS}
    np.testing.assert_allclose(found, golden.reference, rtol=0, atol=1e-3)
    if planned:
        assert np.abs(golden.reference - golden.full_precision).max() > 0.01
