"""Golden data of LeRobot's ACT: pictures, every intermediate result, the actions, both queues."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from act_cases import CASES, ORACLE, ActCase

from engines.ort import OrtEngine
from engines.targets import CPU
from jetson.control.chunks import ChunkBuffer, TimedChunk
from jetson.control.settings import LoopSettings
from qvla_export.graph.export import export_bundle
from qvla_export.shared.lerobot.lerobot_config import read_lerobot_config
from qvla_export.shared.lerobot.lerobot_statistics import lerobot_statistics, read_normalizers

TOLERANCE = 1e-4  # absolute, float32: the oracle's README
needs_weights = pytest.mark.skipif(
    not CASES, reason="the golden checkpoint is in QVLA_ORACLES only: 1.7 MB"
)


@pytest.fixture(scope="module", params=CASES, ids=[case.stem for case in CASES])
def case(request: pytest.FixtureRequest) -> ActCase:
    return ActCase(request.param)


def same(found: torch.Tensor | np.ndarray, expected: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=TOLERANCE, err_msg=name)


@needs_weights
@torch.no_grad()
def test_every_intermediate_result(case: ActCase) -> None:
    golden, policy, batch = case.golden, case.policy, case.batch()
    assert batch.state is not None
    module = policy.module
    tokens, codes = module.tokens(batch.pixel_values, batch.state)
    memory, _ = module.encode(batch.pixel_values, batch.state)
    for found, name in (
        (batch.state, "state_normalized"),
        (batch.pixel_values[:, :3], "image_normalized_top"),
        (batch.pixel_values[:, 3:], "image_normalized_wrist"),
        (module.features(batch.pixel_values).transpose(0, 1), "backbone_features"),
        (tokens, "encoder_in_tokens"),
        (codes, "encoder_in_pos_embed"),
        (memory, "encoder_out"),
        (module.decode(memory, codes), "decoder_out"),
        (policy.greedy_actions(batch), "actions_normalized"),
    ):
        same(found, golden[name], name)


@needs_weights
def test_actions_are_upstreams_in_its_units(case: ActCase) -> None:
    for observation, expected in zip(case.observations(), case.golden["actions"], strict=True):
        same(case.policy.infer(observation).actions, expected, "actions")


@pytest.mark.slow
@needs_weights
def test_the_graph_s_actions_are_upstreams(case: ActCase, tmp_path: Path) -> None:
    bundle = export_bundle(case.policy, None, CPU, case.observations(), tmp_path / "bundle")
    rows = zip(case.observations(), case.golden["actions_normalized"], strict=True)
    with OrtEngine(bundle, threads=1) as engine:
        for observation, expected in rows:
            found = engine.infer(bundle.processor.feeds(observation))["actions"][0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@needs_weights
def test_an_episode_is_upstreams_chunk_by_chunk() -> None:
    policy = ActCase(CASES[0]).policy
    case = ActCase.__new__(ActCase)
    with np.load(ORACLE / "episode.npz") as archive:
        case.golden = dict(archive)
    chunks = [policy.infer(observation) for observation in case.observations()]
    same(np.stack([c.normalized for c in chunks]), case.golden["chunks_normalized"], "chunks")


def ensembled(chunks: np.ndarray, decay: float) -> np.ndarray:
    """Run the control loop's buffer: a chunk at every command."""
    settings = LoopSettings(10.0, 1e6, 1e6, mode="ensemble", ensemble_decay=decay)
    buffer, found = ChunkBuffer(settings), []
    for number, chunk in enumerate(chunks):
        buffer.add(TimedChunk(number, chunk, number / 10, number))
        planned = buffer.plan(number, number / 10)
        assert planned is not None
        found.append(planned.action)
    return np.stack(found)


def episode() -> dict[str, np.ndarray]:
    path = ORACLE / "episode.npz"
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files if not name.startswith("image")}


def test_ensembling_is_upstreams() -> None:
    golden = episode()
    decay = float(golden["temporal_ensemble_coeff"])
    chunks = golden["chunks_normalized"]
    same(ensembled(chunks, decay), golden["ensemble_actions_normalized"], "normalized")
    again = golden["ensemble_actions_normalized_after_reset"]
    same(ensembled(chunks[: len(again)], decay), again, "reset")
    # The loop averages what it is handed, actions in the robot's units: the map is a straight line.
    config = read_lerobot_config(ORACLE / "checkpoint")
    both = read_normalizers(ORACLE / "checkpoint", config, ())
    physical = lerobot_statistics(config, *both, None).action.unnormalize(chunks)
    same(ensembled(physical.astype(np.float32), decay), golden["ensemble_actions"], "physical")
    control = golden["ensemble_actions_normalized_NEGATIVE_CONTROL_newer_heavier"]
    assert np.abs(ensembled(chunks, decay) - control).max() > 100 * TOLERANCE


def test_a_queue_is_a_receding_horizon() -> None:
    golden = episode()
    executed = json.loads((ORACLE / "checkpoint/config.json").read_text())["n_action_steps"]
    settings = LoopSettings(10.0, 1e6, 1e6, mode="receding", execute=executed)
    buffer, found = ChunkBuffer(settings), []
    for number in range(len(golden["queue_actions_normalized"])):
        if buffer.next_due(number, number / 10, 0):
            chunk = golden["chunks_normalized"][number]
            buffer.add(TimedChunk(number, chunk, number / 10, number))
        planned = buffer.plan(number, number / 10)
        assert planned is not None
        found.append(planned.action)
    same(np.stack(found), golden["queue_actions_normalized"], "queue")
