"""Families: a checkpoint is recognized from its files, another folder is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from qvla_export.latency_model.published_sizes import GEOMETRIES
from qvla_export.policies.families import FAMILIES, family_with_size, load_policy, recognize
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import CheckpointError, QvlaError


def test_a_checkpoint_is_recognized_and_opened(
    tiny_checkpoint: Path, tiny_policy: OftPolicy
) -> None:
    family = recognize(tiny_checkpoint)
    inputs = family.inputs(tiny_checkpoint, None)
    assert inputs.images == len(tiny_policy.config.cameras)
    assert inputs.horizon == tiny_policy.config.horizon
    assert load_policy(tiny_checkpoint).digest == tiny_policy.digest


def test_folders_of_no_family_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint folder not found"):
        recognize(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        recognize(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "other"}))
    with pytest.raises(CheckpointError, match="known: 'openvla'"):
        load_policy(tmp_path / "other")


def test_an_unknown_preset_is_refused_before_weights_are_read(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="preset must be one of"):
        load_policy(tiny_checkpoint, preset="kuka")


def test_every_published_size_has_a_family() -> None:
    assert all(family_with_size(size) in FAMILIES for size in GEOMETRIES)
    with pytest.raises(QvlaError, match="Did you mean 'openvla-oft-7b'"):
        family_with_size("openvla-oft-8b")


def test_recognizing_imports_no_torch(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from qvla_export.policies.families import recognize; "
        f"recognize(Path({str(tiny_checkpoint)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
