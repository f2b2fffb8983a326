"""Low-rank adapters: merged on load as peft merges them, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import DATA
from safetensors.torch import load_file, save_file

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.policies.families import describe_checkpoint, load_policy
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.policies.prismatic.keys import from_upstream
from qvla_export.policies.prismatic.weights import CheckpointWeights, open_body
from qvla_export.shared.errors import CheckpointError

# Of peft itself, whatever other golden data the tests are pointed to.
CASES = sorted(path for path in (DATA / "oracles" / "lora").iterdir() if path.is_dir())
BASE_NAME = "base"


def golden(case: Path, name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(case / f"{name}.safetensors")
    return tensors


def loose(case: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write an adapter whose base lies in a folder of its own."""
    (folder / BASE_NAME).mkdir(parents=True)
    base = {key: tensor.to(dtype) for key, tensor in golden(case, "base").items()}
    save_file(base, folder / BASE_NAME / "model.safetensors")
    shutil.copytree(case, folder / "policy" / "lora_adapter")
    change_settings(folder / "policy" / "lora_adapter", base_model_name_or_path="../base")
    return folder / "policy"


def change_settings(folder: Path, **values: Any) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **values}))


def assert_merged(weights: CheckpointWeights, case: Path, tolerance: float = 1e-6) -> None:
    expected = from_upstream(golden(case, "merged"))
    assert set(weights.shapes) == set(expected)
    changed = 0
    for name, tensor in expected.items():
        got = weights.read(name).float()
        torch.testing.assert_close(got, tensor, rtol=tolerance, atol=tolerance)
        target = torch.empty(tensor.shape)
        weights.copy_to(name, target)
        assert torch.equal(target, got)
        changed += not torch.equal(from_upstream(golden(case, "base"))[name], tensor)
    assert changed == 5  # projector, q_proj of the decoder, and a fused layer's three


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_an_adapter_beside_its_base_is_merged_as_peft_does(case: Path, tmp_path: Path) -> None:
    assert_merged(open_body(loose(case, tmp_path / "exact")), case)
    # In bfloat16 half of its last bit, 2**-9, may be rounded away.
    assert_merged(open_body(loose(case, tmp_path / "half", torch.bfloat16)), case, 2**-8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_factors_among_the_weights_are_merged_as_peft_does(case: Path, tmp_path: Path) -> None:
    shutil.copy(case / "wrapped.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter_config.json says their lora_alpha"):
        open_body(tmp_path)
    shutil.copy(case / "adapter_config.json", tmp_path / "adapter_config.json")
    assert_merged(open_body(tmp_path), case)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA is not merged here"),
        ({"peft_type": "LOHA"}, "an adapter that is no LoRA"),
        ({"alpha_pattern": {"fc1": 8}}, "alpha_pattern .* an alpha of its own"),
        ({"bias": "all"}, "an adapter that trains biases"),
        ({"init_lora_weights": "pissa"}, "one that changes its base"),
        ({"modules_to_save": ["projector"]}, "a copy of whole modules"),
        ({"fan_in_fan_out": True}, "a transposed weight"),
        ({"trainable_token_indices": [3]}, "more than a product of two factors"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number above 0, got '16'"),
    ],
)
def test_other_kinds_of_adapters_are_named(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    folder = loose(CASES[0], tmp_path)
    change_settings(folder / "lora_adapter", **values)
    with pytest.raises(CheckpointError, match=says):
        open_body(folder)


def with_key(folder: Path, key: str, shape: tuple[int, ...]) -> None:
    file = folder / "lora_adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), key: torch.zeros(shape)}, file)


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("projector.fc1.lora_magnitude_vector.weight", (12,), "DoRA, embeddings"),
        ("language_model.model.embed_tokens.lora_embedding_A", (3, 9), "DoRA, embeddings"),
        ("projector.fc1.lora_B.bias", (12,), "DoRA, embeddings, biases"),
        ("projector.fc2.lora_A.weight", (3, 8), "one low-rank factor alone of projector.fc2"),
        ("projector.fc1.lora_A.weight", (3, 9), "but it is .12, 8.; is this the base"),
        ("projector.extra.weight", (3, 9), "which is no low-rank factor"),
    ],
)
def test_keys_of_other_adapters_are_named(
    tmp_path: Path, key: str, shape: tuple[int, ...], says: str
) -> None:
    folder = loose(CASES[0], tmp_path)
    with_key(folder, f"base_model.model.{key}", shape)
    with pytest.raises(CheckpointError, match=says):
        open_body(folder)


def test_factors_of_a_layer_that_the_base_lacks_are_named(tmp_path: Path) -> None:
    folder = loose(CASES[0], tmp_path)
    for letter, shape in (("A", (3, 8)), ("B", (8, 3))):
        with_key(folder, f"base_model.model.gone.lora_{letter}.weight", shape)
    with pytest.raises(CheckpointError, match=r"of gone\.weight, but there is none; is this"):
        open_body(folder)


def write_adapter(folder: Path, base: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write an adapter of the decoder's first q_proj; return what it adds, by upstream's key."""
    key = "language_model.model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(seed)
    rows, inputs = load_file(base / "model.safetensors")[f"{key}.weight"].shape
    a, b = (torch.randn(s, generator=generator) for s in ((4, inputs), (rows, 4)))
    folder.mkdir()
    factors = {f"base_model.model.{key}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return {f"{key}.weight": 0.5 * b @ a}


def test_a_policy_that_is_an_adapter_acts_as_the_merged_one(
    tiny_checkpoint: Path, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    base, folder, merged = (tmp_path / name for name in (BASE_NAME, "adapted", "merged"))
    for place in (base, folder, merged):
        shutil.copytree(tiny_checkpoint, place)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    added = write_adapter(folder / "lora_adapter", base)
    tensors = load_file(merged / "model.safetensors")
    for key, change in added.items():
        tensors[key] = (tensors[key].float() + change).to(tensors[key].dtype)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    adapted, expected = load_policy(folder), load_policy(merged)
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(adapted.module.state_dict()[name], tensor), name
    stored = load_policy(folder, resident=False)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(stored.read_weight(name), expected.read_weight(name))
    assert not np.array_equal(stored.read_weight(name), tiny_policy.read_weight(name))
    said = describe_checkpoint(folder)
    assert f"; an adapter is merged on load into 1 weights of {base}" in said
    assert PolicySource(str(folder)).kind == "checkpoint"
    # Another adapter is another policy.
    digests = {adapted.digest, expected.digest, tiny_policy.digest}
    shutil.rmtree(folder / "lora_adapter")
    write_adapter(folder / "lora_adapter", base, seed=1)
    assert len({*digests, load_policy(folder).digest}) == 4
