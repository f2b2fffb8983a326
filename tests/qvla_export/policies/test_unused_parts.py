"""What a checkpoint folder stores and the policy would act without is refused by name."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvla_export.policies.families import load_policy, recognize
from qvla_export.policies.oft.config import load_config
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import CheckpointError

BASE = "openvla/openvla-7b"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def write_adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    settings = {"base_model_name_or_path": BASE, "peft_type": "LORA", "r": 32}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("resident", [True, False])
def test_towers_with_film_layers_are_read_whole(checkpoint: Path, resident: bool) -> None:
    """openvla-oft #102: skipped, the arm acts as if the instruction were not looked at."""
    name = "vision_backbone--150000_checkpoint.pt"
    film = {"module.vision_backbone.featurizer.blocks.0.scale.weight": torch.ones(2)}
    torch.save(film, checkpoint / name)
    with pytest.raises(CheckpointError, match="has no vision tower weight"):
        load_policy(checkpoint, resident=resident)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("noisy_action_projector--5_checkpoint.pt", "diffusion head.*set head to 'diffusion'"),
        ("value_head--5_checkpoint.pt", "no part of this policy that is known"),
        ("model-00001-of-00003.safetensors", "do not belong to those read"),
        ("pytorch_model.bin", "another format"),
    ],
)
def test_every_stored_part_that_is_not_read_is_named(
    checkpoint: Path, name: str, rule: str
) -> None:
    (checkpoint / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name}: .*{rule}"):
        load_policy(checkpoint)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("film/vision_backbone--5_checkpoint.pt", "FiLM layers"),
        ("checkpoint-500/model.safetensors", "two saves in one folder"),
        ("adapter/adapter_model.safetensors", "a low-rank adapter: .*move its folder out"),
        ("a/b/c/value_head.ckpt", "no part of this policy that is known"),
        ("lora_adapter/vision_backbone--5_checkpoint.pt", "FiLM layers"),
        ("lora_adapter/deeper/adapter_model.safetensors", "a low-rank adapter"),
    ],
)
def test_parts_in_folders_below_are_named(checkpoint: Path, name: str, rule: str) -> None:
    (checkpoint / name).parent.mkdir(parents=True)
    (checkpoint / name).write_bytes(b"")
    for resident in (True, False):
        with pytest.raises(CheckpointError, match=f"{name}: .*{rule}"):
            load_policy(checkpoint, resident=resident)


def test_what_downloads_and_trainers_leave_below_is_no_part(
    checkpoint: Path, tiny_policy: OftPolicy
) -> None:
    for name in (".cache/huggingface/x.safetensors", "checkpoint-5/optimizer.pt"):
        (checkpoint / name).parent.mkdir(parents=True)
        (checkpoint / name).write_bytes(b"")
    assert load_policy(checkpoint).digest == tiny_policy.digest


@pytest.mark.parametrize(
    "key",
    [
        "vision_backbone.featurizer.blocks.0.scale.weight",
        "vision_backbone.fused_featurizer.blocks.1.shift.bias",
        "vision_backbone.vision_backbone.featurizer.blocks.0.block.norm1.weight",
    ],
)
def test_film_layers_among_the_weights_are_called_film(checkpoint: Path, key: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, key: torch.ones(2)}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"FiLM layers.*read from vision_backbone"):
        load_policy(checkpoint)


def test_files_are_checked_without_torch(checkpoint: Path) -> None:
    family = recognize(checkpoint)
    family.check_files(checkpoint, None)
    tensors = load_file(checkpoint / "model.safetensors")
    key = "vision_backbone.featurizer.blocks.0.scale.weight"
    save_file({**tensors, key: torch.ones(2)}, checkpoint / "model.safetensors")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from jetson.doctor.examination import DoctorRequest\n"
        "from qvla_export.pipeline.robot.doctor import examine_machine\n"
        "found = examine_machine(DoctorRequest(checkpoint=Path(sys.argv[1]))).findings\n"
        "print([f.observed for f in found if f.what == 'parts of the checkpoint'][0])\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "FiLM layers" in said
    save_file(tensors, checkpoint / "model.safetensors")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "their numbers were not looked at" in said


@pytest.mark.parametrize(
    ("sizes", "preset"), [((7, 8), "libero"), ((14, 14), "aloha"), ((7, 7), "bridge")]
)
def test_a_description_that_does_not_fit_names_the_preset_that_does(
    checkpoint: Path, sizes: tuple[int, int], preset: str
) -> None:
    action_dim, state_dim = sizes
    for part, key, shape in (
        ("action_head", "module.model.fc2.weight", (action_dim, 2)),
        ("proprio_projector", "module.fc1.weight", (2, state_dim)),
    ):
        (file,) = checkpoint.glob(f"{part}--*")
        state = torch.load(file, weights_only=True)
        torch.save({**state, key: torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError) as refused:
        load_policy(checkpoint)
    assert f"acts in {action_dim} dimensions and sees a state of {state_dim}" in str(refused.value)
    assert str(refused.value).endswith(f"; --preset {preset} has these")


def test_all_unused_parts_are_named_at_once(checkpoint: Path) -> None:
    for name in ("one.pt", "two.ckpt"):
        (checkpoint / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one\.pt(.|\n)*two\.ckpt"):
        load_policy(checkpoint)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"state_dim": 0}, "proprio_projector--0"), ({"head": "tokens"}, "action_head--0")],
)
def test_a_part_that_the_configuration_leaves_out_is_refused(
    checkpoint: Path, change: dict[str, object], name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.*but the policy's configuration says"):
        load_oft_policy(checkpoint, None, replace(load_config(checkpoint), **change))


def test_what_a_trainer_leaves_behind_is_no_part(checkpoint: Path, tiny_policy: OftPolicy) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(b"")
    assert load_policy(checkpoint).digest == tiny_policy.digest


def test_an_adapter_alone_names_its_base_and_how_to_merge(checkpoint: Path) -> None:
    write_adapter(checkpoint / "lora_adapter")
    for name in ("model.safetensors", "config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"an adapter of {BASE}.*merge_lora_weights_and_save"):
        load_policy(checkpoint)


def test_a_folder_that_peft_saved_is_an_adapter(checkpoint: Path) -> None:
    write_adapter(checkpoint)
    with pytest.raises(CheckpointError, match=f"an adapter of {BASE}.*name the merged folder"):
        load_policy(checkpoint)


def test_half_an_adapter_among_the_weights_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    wrapped["base_model.model.projector.fc1.lora_A.default.weight"] = torch.zeros(2, 2)
    save_file(wrapped, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"one low-rank factor alone of projector\.fc1"):
        load_policy(checkpoint)


def test_the_adapter_that_was_merged_may_lie_beside(
    checkpoint: Path, tiny_policy: OftPolicy
) -> None:
    """Published OpenVLA-OFT folders hold both."""
    write_adapter(checkpoint / "lora_adapter")
    assert load_policy(checkpoint).digest == tiny_policy.digest
