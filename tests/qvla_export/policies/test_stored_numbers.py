"""Numbers that no policy can act with are refused where they are stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvla_export.policies.families import load_policy
from qvla_export.shared.errors import CheckpointError

LAYER = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def _change(checkpoint: Path, tensor: torch.Tensor) -> None:
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), LAYER: tensor}, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_layer(checkpoint: Path, value: float) -> None:
    stored = load_file(checkpoint / "model.safetensors")[LAYER]
    stored[3, 5] = value
    _change(checkpoint, stored)
    with pytest.raises(CheckpointError, match=f"{LAYER} has weights that are NaN or infinite"):
        load_policy(checkpoint)
    policy = load_policy(checkpoint, resident=False)
    with pytest.raises(CheckpointError, match=f"{LAYER} has weights"):
        policy.read_weight(LAYER)


def test_a_quantized_head_is_refused(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("action_head--*")
    state = torch.load(path, weights_only=True)
    torch.save({key: tensor.to(torch.int8) for key, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"action_head--0_checkpoint\.pt.*floating point"):
        load_policy(checkpoint)


def test_a_head_that_is_not_finite_is_refused(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("action_head--*")
    state = torch.load(path, weights_only=True)
    state["module.model.fc2.bias"][0] = float("nan")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"action_head\.model\.fc2\.bias has weights"):
        load_policy(checkpoint)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("resident", [True, False])
def test_quantized_bodies_are_refused(checkpoint: Path, kind: torch.dtype, resident: bool) -> None:
    """An int8 body without its scales acts with weights a hundred times too large."""
    _change(checkpoint, load_file(checkpoint / "model.safetensors")[LAYER].to(kind))
    with pytest.raises(CheckpointError, match=f"{LAYER} is stored as .*quantized by another tool"):
        load_policy(checkpoint, resident=resident)


def test_a_decoder_that_is_not_built_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "text_config": {**config["text_config"], "model_type": "qwen2"}})
    )
    with pytest.raises(CheckpointError, match="'qwen2', a decoder that is not built here"):
        load_policy(checkpoint)
