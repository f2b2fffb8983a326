"""OpenVLA checkpoints: recognized from their files, whole or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import openvla_observations, stored_weights, write_tiny_openvla
from safetensors.torch import save_file

from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy, recognize
from qvla_export.policies.layers import replaced_weights
from qvla_export.policies.openvla.policy import OpenVlaPolicy, load_openvla_policy
from qvla_export.policies.prismatic.policy import NOT_UPSTREAM
from qvla_export.shared.errors import CheckpointError, StatisticsError
from qvla_export.shared.policy_interface import load_interface


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openvla(tmp_path_factory.mktemp("openvla") / "checkpoint")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> OpenVlaPolicy:
    return load_openvla_policy(checkpoint)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def test_the_family_is_told_by_files(folder: Path) -> None:
    assert recognize(folder).name == "openvla"
    (folder / "qvla_policy.json").unlink()
    assert recognize(folder).name == "openvla"
    interface = load_interface(folder)
    assert (interface.cameras, interface.horizon, interface.action_dim) == (("full_image",), 1, 7)
    (folder / "action_head--5_checkpoint.pt").write_bytes(b"")
    assert recognize(folder).name == "oft"


def test_a_token_head_whose_tokens_come_at_once_is_the_other_family(folder: Path) -> None:
    config = json.loads((folder / "qvla_policy.json").read_text())
    (folder / "qvla_policy.json").write_text(json.dumps({**config, "head": "tokens"}))
    assert recognize(folder).name == "oft"


def test_a_preset_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / "qvla_policy.json").unlink()
    with pytest.raises(CheckpointError, match="bring the head's file"):
        load_policy(folder, preset="libero")


def test_a_folder_that_describes_itself_opens(folder: Path, policy: OpenVlaPolicy) -> None:
    config = {"vision_heads": [2, 2], "suffix_token_id": policy.config.suffix_token_id}
    (folder / "qvla_policy.json").write_text(json.dumps(config))
    opened: Policy = load_policy(folder)
    [seen] = openvla_observations(1)
    assert np.array_equal(opened.infer(seen).actions, policy.infer(seen).actions)
    assert opened.digest == policy.digest


def test_what_is_configured_wrongly_is_refused(folder: Path) -> None:
    config = json.loads((folder / "qvla_policy.json").read_text())
    for change in ({"horizon": 8}, {"state_dim": 8}, {"cameras": ["a", "b"]}):
        (folder / "qvla_policy.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match="one camera, puts out one action"):
            load_openvla_policy(folder)


def test_statistics_of_several_sizes_need_a_word(folder: Path) -> None:
    (folder / "qvla_policy.json").unlink()
    table = {"a": {"action": {"q01": [0.0] * 7}}, "b": {"action": {"q01": [0.0] * 6}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"got \[6, 7\]; write action_dim into"):
        load_policy(folder)
    with pytest.raises(StatisticsError):
        (folder / "dataset_statistics.json").write_text("[]")
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("projector.fc1.bias"), r"missing \(1\): \['projector.fc1.bias'\]"),
        (lambda w: w.update(extra=torch.zeros(2)), r"unexpected \(1\): \['extra'\]"),
        (lambda w: w.update({"projector.fc1.bias": torch.zeros(3)}), r"wrong shape \(1\)"),
        (lambda w: w.pop("language_model.lm_head.weight"), "missing .*lm_head"),
        (
            lambda w: w.update({"language_model.lm_head.weight": torch.zeros(300, 64)}),
            "fewer than the 256 action tokens",
        ),
    ],
)
def test_keys_must_fit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    weights = stored_weights(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        load_openvla_policy(folder)


def test_files_that_nothing_reads_are_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_openvla_policy(folder)


def test_weights_on_disk_are_the_same_weights(folder: Path, policy: OpenVlaPolicy) -> None:
    stored = load_openvla_policy(folder, resident=False)
    assert stored.digest == policy.digest
    held = {name: t for name, t in policy.module.state_dict().items() if name not in NOT_UPSTREAM}
    for name, tensor in {**held, "token_centers": None}.items():
        expected = policy.read_weight(name)
        assert np.array_equal(stored.read_weight(name), expected), name
        assert tensor is None or np.array_equal(expected, tensor.numpy())
    back = stored.in_memory()
    [seen] = openvla_observations(1)
    assert np.array_equal(back.infer(seen).actions, policy.infer(seen).actions)
    with pytest.raises(CheckpointError, match="must be in memory to choose"):
        stored.batch([seen])


def test_a_batch_keeps_the_tokens_of_the_weights_it_was_made_with(policy: OpenVlaPolicy) -> None:
    batch = policy.batch(openvla_observations(2))
    assert batch.tokens is not None
    layers = policy.layers()
    name = next(name for name in layers if name.endswith("down_proj"))
    zeros = np.zeros(tuple(layers[name].weight.shape), np.float32)
    with torch.no_grad():
        logits = policy.token_logits(batch)
        assert torch.equal(logits.argmax(dim=-1), batch.tokens)
        with replaced_weights(layers, {name: zeros}):
            again = policy.batch(openvla_observations(2))
            moved = policy.normalized_actions(batch)
        assert again.tokens is not None and not torch.equal(again.tokens, batch.tokens)
        expected = logits.softmax(dim=-1) @ policy.token_centers
        assert torch.equal(policy.normalized_actions(batch)[:, 0], expected)
        assert not torch.equal(moved[:, 0], expected)


def test_layers_are_those_that_reach_the_action(policy: OpenVlaPolicy) -> None:
    layers = policy.layers()
    assert not any(name.startswith(("projector", "language_model.lm_head")) for name in layers)
    assert not any(".layer.2." in name or ".layers.2." in name for name in layers)  # towers' last
    assert sum(name.startswith("language_model.") for name in layers) == 2 * 7
