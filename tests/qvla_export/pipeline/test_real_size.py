"""A random checkpoint of a given geometry, and `qvla bench size` on a small one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

import qvla_export.latency_model.published_sizes
from qvla_export.cli.app import app
from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.policies.oft.policy import load_oft_policy
from qvla_export.policies.oft.random_checkpoint import write_random_checkpoint
from qvla_export.quantizer.quantize import as_rows

SMALL = Geometry(
    dino=TransformerSize(64, 128, 2),
    siglip=TransformerSize(64, 192, 2),
    llama=TransformerSize(128, 320, 3),
    patch_size=14,
    inputs=PolicyInputs(2, 28, 30, 8, 7, state_dim=8),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(path, SMALL, shard_bytes=1 << 20)
    return path


def test_random_checkpoint_has_the_geometry(checkpoint: Path) -> None:
    policy = load_oft_policy(checkpoint, resident=False)
    shapes = {
        name: (layer.weight.shape[0], layer.weight[0].numel())
        for name, layer in policy.layers().items()
    }
    assert shapes == SMALL.layers
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert {p.name for p in shards} == set(index["weight_map"].values())
    with safe_open(shards[0], framework="np") as file:
        key = next(iter(file.keys()))
        assert file.get_slice(key).get_dtype() == "BF16"


def test_random_weights_keep_activations_in_range(checkpoint: Path, tmp_path: Path) -> None:
    policy = load_oft_policy(checkpoint)
    for name in policy.layers():
        rows = as_rows(policy.read_weight(f"{name}.weight"))
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=0.5)
    write_random_checkpoint(tmp_path / "again", SMALL, shard_bytes=1 << 20)
    assert load_oft_policy(tmp_path / "again").digest == policy.digest
    write_random_checkpoint(tmp_path / "other", SMALL, seed=1)
    assert load_oft_policy(tmp_path / "other").digest != policy.digest


def test_real_size_takes_a_small_policy_through_every_step(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    output = tmp_path / "figures.json"
    arguments = ["bench", "size", str(tmp_path), "--target", "cpu", "--layers-per-part", "2"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    steps = {step["name"]: step for step in json.loads(output.read_text())["steps"]}
    assert list(steps) == ["export", "one action"]
    exported, acted = steps["export"]["result"], steps["one action"]["result"]
    # Towers, projector, two decoder stages, head.
    assert exported["stages"] == 6
    assert abs(exported["plan"]["mean_bits_per_channel"] - 4) < 0.05
    assert 0 < exported["bytes"] < exported["float16_bytes"]
    assert acted["largest_drift_from_torch"] < 1e-4 < acted["largest_change_by_plan"]
    assert all(step["peak_bytes"] >= 0 for step in steps.values())


def test_bad_mix_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "size", str(tmp_path), "--mix", "8:x"])
    assert result.exit_code != 0 and "WIDTH:SHARE" in str(result.exception)


def test_unknown_geometry_names_the_nearest() -> None:
    with pytest.raises(qvla_export.latency_model.published_sizes.QvlaError, match="openvla-oft-7b"):
        qvla_export.latency_model.published_sizes.find_geometry("openvla-oft-8b")
