"""OpenVLA-OFT checkpoints on disk: round trips, shards, and everything that can be wrong."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint

from qvla_export.policies.oft.config import PRESETS, OftConfig, load_config
from qvla_export.policies.oft.new_checkpoint import save_checkpoint
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import ArtifactError, CheckpointError, StatisticsError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def _actions(policy: OftPolicy, observations: list[Observation]) -> np.ndarray:
    with torch.no_grad():
        return policy.normalized_actions(policy.batch(observations)).numpy()


def test_loading_and_saving_is_lossless(
    checkpoint: Path, tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    assert tiny_policy.processor.tokenizer is not None
    statistics = json.loads((checkpoint / "dataset_statistics.json").read_text())
    again = tmp_path / "again"
    save_checkpoint(
        again,
        tiny_policy.module,
        tiny_policy.config,
        tiny_policy.processor.tokenizer,
        statistics,
        0,
    )
    loaded = load_oft_policy(again)
    assert loaded.digest == tiny_policy.digest
    observations = tiny_observations(3)
    np.testing.assert_array_equal(
        _actions(loaded, observations), _actions(tiny_policy, observations)
    )


def test_shards_equal_a_single_file(
    checkpoint: Path, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, checkpoint / shard)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    observations = tiny_observations(2)
    np.testing.assert_array_equal(
        _actions(load_oft_policy(checkpoint), observations), _actions(tiny_policy, observations)
    )
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights not found.*00002-of-00002"):
        load_oft_policy(checkpoint)


def test_missing_extra_and_misshapen_keys_are_all_listed(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["projector.fc1.bias"]
    tensors["language_model.model.layers.0.mlp.secret"] = torch.zeros(2)
    tensors["projector.fc3.bias"] = torch.zeros(3)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_oft_policy(checkpoint)
    message = str(caught.value)
    assert "missing (1): ['projector.fc1.bias']" in message
    assert "unexpected (1): ['language_model.model.layers.0.mlp.secret']" in message
    assert "projector.fc3.bias: file (3,), policy (64,)" in message


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_oft_policy(checkpoint)


class _Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path, ("/tmp",))


def test_pickled_code_in_head_files_is_refused(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("action_head--*")
    path.write_bytes(pickle.dumps({"model.fc1.weight": _Exploit()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        load_oft_policy(checkpoint)


def test_exactly_one_head_file(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("action_head--*")
    shutil.copy(path, checkpoint / "action_head--7_checkpoint.pt")
    with pytest.raises(CheckpointError, match="exactly one action_head"):
        load_oft_policy(checkpoint)
    for head in checkpoint.glob("action_head--*"):
        head.unlink()
    with pytest.raises(CheckpointError, match=r"found \[\]"):
        load_oft_policy(checkpoint)


def test_policy_configuration_is_never_guessed(checkpoint: Path) -> None:
    (checkpoint / "qvla_policy.json").unlink()
    with pytest.raises(CheckpointError, match=r"preset of \['aloha', 'bridge', 'libero'\]"):
        load_oft_policy(checkpoint)
    with pytest.raises(CheckpointError, match="checkpoint folder not found"):
        load_oft_policy(checkpoint / "nothing")


def test_unknown_field_in_policy_configuration(checkpoint: Path) -> None:
    path = checkpoint / "qvla_policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "camera": "x"}))
    with pytest.raises(CheckpointError, match="camera"):
        load_config(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"horizon": 0}, {"head": "flow"}, {"normalization": "z"}, {"cameras": ()}],
)
def test_impossible_policy_configurations(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        replace(PRESETS["libero"], **change)


def test_wrong_vision_heads_say_what_to_set(checkpoint: Path) -> None:
    config: OftConfig = replace(load_config(checkpoint), vision_heads=(7, 2))
    with pytest.raises(CheckpointError, match="vision_heads"):
        load_oft_policy(checkpoint, None, config)


def test_missing_statistics_refuse_to_load(checkpoint: Path) -> None:
    with pytest.raises(StatisticsError, match="Did you mean 'tiny'"):
        load_oft_policy(checkpoint, "tinny")
    (checkpoint / "dataset_statistics.json").unlink()
    with pytest.raises(ArtifactError, match="statistics not found"):
        load_oft_policy(checkpoint)


def test_action_changes_with_image_instruction_and_state(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    """openvla #346: a policy whose image is ignored still returns plausible actions."""
    (observation,) = tiny_observations(1)
    base = tiny_policy.infer(observation).normalized
    image = {"image": np.full((28, 28, 3), 200, np.uint8)}
    others = (
        replace(observation, images=image),
        replace(observation, instruction="open the small drawer slowly"),
        replace(observation, state=-observation.state),
    )
    for other in others:
        assert np.abs(tiny_policy.infer(other).normalized - base).max() > 1e-4


def test_ragged_batch_equals_single_observations(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    observations = tiny_observations(3)
    together = _actions(tiny_policy, observations)
    for row, observation in zip(together, observations, strict=True):
        chunk = tiny_policy.infer(observation)
        np.testing.assert_allclose(chunk.normalized, row, atol=1e-5)
        assert set(chunk.timing_ms) == {"preprocess", "engine"}


def test_digest_follows_the_weights(checkpoint: Path, tiny_policy: OftPolicy) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["projector.fc1.bias"] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert load_oft_policy(checkpoint).digest != tiny_policy.digest


def test_digest_follows_configuration_and_statistics(checkpoint: Path) -> None:
    """The same weights under another un-normalization key act in other units."""
    path = checkpoint / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    path.write_text(json.dumps({**statistics, "other": statistics["tiny"]}))
    config = load_config(checkpoint)
    digests = {
        load_oft_policy(checkpoint, key, changed).digest
        for key in ("tiny", "other")
        for changed in (config, replace(config, center_crop=True))
    }
    assert len(digests) == 4


def test_pixels_for_one_tower_of_two_cameras_are_not_one_cameras_for_both(tmp_path: Path) -> None:
    """The channels come out the same: nothing further on would notice."""
    config = replace(TINY_CONFIG, cameras=("image", "wrist"))
    folder = write_tiny_checkpoint(tmp_path / "c", config=config)
    path = folder / "preprocessor_config.json"
    document = json.loads(path.read_text())
    document["tvf_normalize_params"].pop()
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="pixels for 1 towers, the network has 2"):
        load_oft_policy(folder)
