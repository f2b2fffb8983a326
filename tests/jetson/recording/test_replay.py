"""A recorded run replays: without drift by the policy that acted, with its own by another."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_runs import qvla
from echo_policy import OFT, EchoPolicy, oft_fields, post
from small_recordings import recorded, served

from jetson.recording.reader import Recording
from jetson.recording.replay import replay_recording
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactMismatch
from qvla_export.shared.observation import Observation


def test_a_served_run_replays_without_drift(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, record=path)) as url:
        for index in range(6):
            image = np.full((12, 10, 3), 20 * index, np.uint8)
            assert post(url, oft_fields(full_image=image)).status_code == 200
        assert post(url, oft_fields(instruction="fail")).status_code == 500
    done = replay_recording(Recording(path), EchoPolicy(OFT))
    assert done.drift.observations == 6 and done.drift.worst == 0
    assert done.lossless and done.dropped == 0 and done.has_times
    assert replay_recording(Recording(path), EchoPolicy(OFT), limit=2).drift.observations == 2

    class Wrong(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            actions = super().infer(observation).actions.copy()
            actions[3, 2] += 0.5 * (observation.images["front"][0, 0, 0] == 80)
            return ActionChunk(actions, actions, {})

    other = replay_recording(Recording(path), Wrong(OFT))
    assert other.worst == 4 and not other.has_times
    np.testing.assert_allclose(other.drift.max_physical, [0, 0, 0.5, 0, 0, 0, 0])


def test_a_policy_of_another_robot_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    recording = recorded(tmp_path / "run.mcap", [served(0)])
    with pytest.raises(ArtifactMismatch, match=r"\[4, 7\].*\[8, 7\]"):
        replay_recording(recording, EchoPolicy(replace(OFT, horizon=8)))


def test_commands_record_profile_and_replay(
    tmp_path: Path, tiny_checkpoint: Path, tiny_observations: Callable[..., list[Observation]]
) -> None:
    from qvla_export.policies.oft.policy import load_oft_policy

    policy, path = load_oft_policy(tiny_checkpoint), tmp_path / "run.mcap"
    with open_server(policy, ServerSettings(port=0, record=path)) as url:
        for seen in tiny_observations(3):
            fields = oft_fields(
                full_image=seen.images["image"], wrist_image=None,
                state=seen.state, instruction=seen.instruction,
            )  # fmt: skip
            assert post(url, fields).status_code == 200
    profiled = qvla(
        "profile", tiny_checkpoint, "--recording", path, "--samples", 3, "--warmup", 1,
        "--output", tmp_path / "latency.json",
    )  # fmt: skip
    assert profiled.code == 0 and "p99" in profiled.out
    output = tmp_path / "replay.json"
    replayed = qvla("replay", path, tiny_checkpoint, "--output", output, "--max-drift", 1e-4)
    assert replayed.code == 0, replayed
    # Three observations have no p99.
    assert "dimension 3" in replayed.out and re.search(r"max \d+\.\d\d ms then", replayed.out)
    told = json.loads(output.read_text())
    assert told["drift"]["observations"] == 3 and told["dropped"] == 0
    assert max(told["drift"]["max_normalized"]) < 1e-4
    refused = qvla("replay", path, tiny_checkpoint, "--max-drift", -1)
    assert refused.code == 1 and "is above" in refused.err
