"""The committed part of pi0.5's golden data: prompt, picture, and the flow behind a prefix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import DATA
from tokenizers import Tokenizer

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.attention import KeysValues
from qvla_export.policies.flow.module import Prefix
from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.flow.tower import siglip_config
from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.pi.keys import our_name
from qvla_export.policies.pi.module import PiModule
from qvla_export.shared.frames import FrameSpec
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.normalization import Affine, Statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor, ProcessorSpec

FILE = DATA / "oracles" / "pi_flow" / "pi05.npz"
FEATURES, ACTIONS = 1e-4, 3e-4  # absolute, float32: the oracle's README


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(FILE) as archive:
        return dict(archive)


@torch.no_grad()
def test_every_step_of_the_flow(golden: dict[str, Any]) -> None:
    stored = {
        our_name(key.removeprefix("weights/")): torch.from_numpy(value)
        for key, value in golden.items()
        if key.startswith("weights/")
    }
    depth, _, heads, _, head_dim = golden["prefix_keys"].shape
    width = stored["action_in_proj.weight"].shape[0]
    mlp = stored["action_expert.layers.0.mlp.up_proj.weight"].shape[0]
    rows = stored["action_expert.layers.0.self_attn.q_proj.weight"].shape[0]
    expert = StackSize(width, depth, mlp, rows // head_dim, heads, head_dim)
    flow = FlowSpec(len(golden["x_t"]), "computed")
    tower = siglip_config(8, 1, 1, 8, 14, 14)
    arch = PiArchitecture(tower, expert, expert, 8, golden["noise"].shape[2], 0, flow)
    module = PiModule(arch).eval()
    own = {name for name, _ in module.named_parameters() if name.startswith(("action_", "time_"))}
    assert own == set(stored)
    module.load_state_dict(stored, strict=False)
    keys, values = (torch.from_numpy(golden[f"prefix_{kind}"]) for kind in ("keys", "values"))
    pairs = [KeysValues(*both) for both in zip(keys, values, strict=True)]
    prefix = Prefix(pairs, torch.tensor([keys.shape[3]]), None, None)
    assert flow.time_points().tolist() == golden["time"][:, 0].tolist()
    state = torch.from_numpy(golden["noise"])
    for number, (given, expected) in enumerate(zip(golden["x_t"], golden["v_t"], strict=True)):
        index = torch.tensor([number])
        velocity = module.velocity(prefix, torch.from_numpy(given), index)
        np.testing.assert_allclose(velocity, expected, rtol=0, atol=FEATURES)
        state = module.step(prefix, state, index)
    np.testing.assert_allclose(state, golden["actions_padded"], rtol=0, atol=ACTIONS)


def limits(golden: dict[str, Any], feature: str) -> Affine:
    low, high = (golden[f"{feature}.{name}"].astype(np.float64) for name in ("q01", "q99"))
    half = (high - low) / 2
    return Affine(low, high, np.ones(len(low), bool), low + half, half, half)


def test_what_the_network_is_fed(golden: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(golden["tokenizer"].tobytes())
    half = ((0.5, 0.5, 0.5),)
    side = 8 * golden["image_prepared_rows"].shape[1]
    spec = ProcessorSpec(
        cameras=("camera",),
        image=FrameSpec(side, side, "pad-center", half, half),
        horizon=10,
        action_dim=7,
        state_dim=8,
        bos_token_id=2,
        prompt="Task: {instruction}, State: {state};\nAction: ",
        language="cleaned",
        state_bins=256,
        noise=NoiseSpec("noise", (10, 32)),
    )
    statistics = Statistics("c", limits(golden, "action"), limits(golden, "observation.state"))
    processor = Processor(spec, statistics, Tokenizer.from_file(str(path)))
    seen = Observation({"camera": golden["image"]}, str(golden["task"][0]), golden["state"][0])
    feeds = processor.feeds(seen)
    kept = golden["lang_masks"][0]
    assert feeds["input_ids"][0].tolist() == golden["lang_tokens"][0][kept].tolist()
    assert "state" not in feeds
    found = feeds["pixel_values"][0][:, ::8]
    np.testing.assert_allclose(found, golden["image_prepared_rows"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        processor.state(seen), golden["state_normalized"][0], rtol=0, atol=1e-6
    )
    actions = processor.chunk(golden["actions_normalized"][0]).actions
    np.testing.assert_allclose(actions, golden["actions"][0], rtol=0, atol=1e-5)
