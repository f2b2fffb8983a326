"""Golden data of upstream OpenVLA-OFT: every intermediate result and the actions."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import oracle_root

from engines.ort import OrtEngine
from engines.targets import CPU
from qvla_export.graph.export import export_bundle
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation

TOLERANCE = 1e-4  # absolute, float32: the oracles' READMEs


def _is_case(path: Path) -> bool:
    with np.load(path) as archive:
        return {"pixel_values", "input_ids_with_29871", "actions"} <= set(archive.files)


# Folders, sizes, image counts and names vary: a case is what holds inputs and actions.
CASES = sorted(p for p in oracle_root().glob("openvla_oft*/*.npz") if _is_case(p))
CASE_IDS = [f"{case.parent.name}-{case.stem}" for case in CASES]


def load_with(checkpoint: Path, config: OftConfig) -> OftPolicy:
    """Load a checkpoint that serves several cases without the parts that this one leaves out."""
    unused = {"action_head": config.head != "l1", "proprio_projector": not config.state_dim}
    with tempfile.TemporaryDirectory() as folder:
        for file in checkpoint.iterdir():
            if not any(file.name.startswith(part) for part, out in unused.items() if out):
                (Path(folder) / file.name).symlink_to(file.resolve())
        return load_oft_policy(Path(folder), None, config)


class Case:
    """One golden case and the policy that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.policy = load_with(path.parent / "checkpoint", self.config(path))

    def config(self, path: Path) -> OftConfig:
        golden = self.golden
        towers = json.loads((path.parent / "timm_tiny_models.json").read_text())
        heads = {("dino" in name): tower["num_heads"] for name, tower in towers.items()}
        quantiles = "BOUNDS_Q99" in (path.parent / "README.md").read_text().splitlines()[0]
        horizon, action_dim = golden["actions"].shape
        return OftConfig(
            cameras=tuple(f"camera_{i}" for i in range(len(golden["images"]))),
            horizon=horizon,
            action_dim=action_dim,
            state_dim=len(golden["proprio_raw"]) if "proprio_raw" in golden else 0,
            normalization="q99" if quantiles else "bounds",
            head="tokens" if "predicted_token_ids" in golden else "l1",
            vision_heads=(heads[True], heads[False]),
            suffix_token_id=int(golden["input_ids_with_29871"][0, -1]),
        )

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[name])

    def batch(self) -> PolicyBatch:
        state = None
        if self.policy.config.state_dim:
            state = self.tensor("proprio_normalized").float()[None]
        return PolicyBatch(
            self.tensor("pixel_values"), self.tensor("input_ids_with_29871"), None, state
        )

    def assert_close(self, result: torch.Tensor, name: str) -> None:
        np.testing.assert_allclose(
            result.numpy(), self.golden[name], rtol=0, atol=TOLERANCE, err_msg=name
        )


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_cases_are_found() -> None:
    assert CASES


@torch.no_grad()
def test_every_intermediate_result(case: Case) -> None:
    module, batch = case.policy.module, case.batch()
    features = module.vision_backbone(batch.pixel_values)
    case.assert_close(features, "vision_patch_features")
    patches = module.projector(features)
    case.assert_close(patches, "projected_features")
    embeddings = module.embed(patches, batch.input_ids, batch.state)
    case.assert_close(embeddings, "multimodal_embeddings")
    hidden = module.language_model(embeddings)
    np.testing.assert_allclose(
        hidden.numpy(), case.golden["hidden_states"][-1], rtol=0, atol=TOLERANCE
    )
    case.assert_close(module.action_hidden(hidden, batch.input_ids), "actions_hidden_states")


def test_actions(case: Case) -> None:
    actions = case.policy.greedy_actions(case.batch())[0].numpy()
    chunk = case.policy.processor.chunk(actions)
    if "top1_top2_gap" in case.golden:
        clear = case.golden["top1_top2_gap"].reshape(actions.shape) > 1e-3
        assert clear.any()
    else:
        clear = np.ones(actions.shape, dtype=bool)
    for got, name in ((actions, "normalized_actions"), (chunk.actions, "actions")):
        np.testing.assert_allclose(
            got[clear], case.golden[name][clear], rtol=0, atol=TOLERANCE, err_msg=name
        )


@pytest.mark.slow
def test_the_graph_s_actions_are_upstreams(
    case: Case, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    """The oracle has no tokenizer; another's makes the bundle whole and is not asked."""
    processor = replace(case.policy.processor, tokenizer=tiny_policy.processor.tokenizer)
    spec, batch = processor.spec, case.batch()
    black = dict.fromkeys(spec.cameras, np.zeros((224, 224, 3), np.uint8))
    seen = [Observation(black, "go", np.zeros(spec.state_dim, np.float32))]
    policy = replace(case.policy, processor=processor)
    bundle = export_bundle(policy, None, CPU, seen, tmp_path / "bundle")
    feeds = {"pixel_values": batch.pixel_values.numpy(), "input_ids": batch.input_ids.numpy()}
    if batch.state is not None:
        feeds["state"] = batch.state.numpy()
    expected = case.golden["normalized_actions"]
    clear = np.ones(expected.shape, bool)
    if "top1_top2_gap" in case.golden:
        clear = case.golden["top1_top2_gap"].reshape(expected.shape) > 1e-3
    with OrtEngine(bundle, threads=1) as engine:
        found = engine.infer(feeds)["actions"][0]
    np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=1e-3)


def test_causal_attention_gives_other_actions(case: Case) -> None:
    """The negative control must not match ours, and a causal run of ours must match it."""
    wrong = case.golden["actions_NEGATIVE_CONTROL_causal"]
    ours = case.policy.processor.chunk(case.policy.greedy_actions(case.batch())[0].numpy())
    assert np.abs(ours.actions - wrong).max() > 100 * TOLERANCE
    layers = case.policy.module.language_model.model.layers
    try:
        for layer in layers:
            layer.self_attn.is_causal = True
        causal = case.policy.greedy_actions(case.batch())[0].numpy()
    finally:
        for layer in layers:
            layer.self_attn.is_causal = False
    got = case.policy.processor.chunk(causal).actions
    np.testing.assert_allclose(got, wrong, rtol=0, atol=10 * TOLERANCE)


def test_padded_batch_equals_single_row(case: Case) -> None:
    single = case.batch()
    length = single.input_ids.shape[1]
    padded = torch.nn.functional.pad(single.input_ids, (0, 4), value=1)
    batch = PolicyBatch(single.pixel_values, padded, torch.tensor([length]), single.state)
    with torch.no_grad():
        difference = case.policy.normalized_actions(batch) - case.policy.normalized_actions(single)
    assert difference.abs().max() < TOLERANCE


def test_state_is_normalized_as_upstream(case: Case) -> None:
    if "proprio_raw" not in case.golden:
        assert case.policy.processor.statistics.state is None
        return
    bounds = case.policy.processor.statistics.state
    assert bounds is not None
    np.testing.assert_allclose(
        bounds.normalize(case.golden["proprio_raw"]), case.golden["proprio_normalized"], atol=1e-6
    )


def test_pixel_values_of_the_frames(case: Case) -> None:
    policy: OftPolicy = case.policy
    images = dict(zip(policy.config.cameras, case.golden["images"], strict=True))
    state = case.golden.get("proprio_raw", np.zeros(0))
    pixels = policy.processor.pixel_values(Observation(images, "do it", state))
    np.testing.assert_allclose(pixels, case.golden["pixel_values"][0], rtol=0, atol=1e-5)


def test_dead_layers_are_traced(case: Case) -> None:
    """The last block of each tower never reaches the action and is never counted."""
    arch = case.policy.module.arch
    names = set(case.policy.layers())
    last_dino = f"vision_backbone.featurizer.encoder.layer.{arch.dino.num_hidden_layers - 1}."
    last_siglip = (
        f"vision_backbone.fused_featurizer.encoder.layers.{arch.siglip.num_hidden_layers - 1}."
    )
    assert not [n for n in names if n.startswith((last_dino, last_siglip))]
    modules = [n for n, m in case.policy.module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [n for n in modules if n.startswith(last_dino)]
    decoder = arch.llama.num_hidden_layers
    towers = arch.dino.num_hidden_layers + arch.siglip.num_hidden_layers - 2
    assert len(names) == 2 + 6 * towers + 7 * decoder


def test_wrong_dimensions_list_the_keys() -> None:
    case = Case(CASES[0])
    config = case.policy.config
    wrong = replace(config, head="l1", action_dim=config.action_dim + 1)
    with pytest.raises(CheckpointError, match=r"acts in \d+ dimensions|entries"):
        load_with(CASES[0].parent / "checkpoint", wrong)
