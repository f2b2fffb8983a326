"""Checkpoints of every family whose describing files are damaged, and what reads them."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from act_cases import write_tiny_act
from lerobot_cases import small_features, write_description
from openvla_cases import write_tiny_openvla
from pi_cases import SLOTS, write_tiny_pi
from places import DATA
from smolvla_cases import write_tiny_smolvla
from torch import Tensor
from univla_cases import write_tiny_univla

from jetson.doctor.statistics import read_checkpoint
from qvla_export.policies.families import describe_checkpoint, load_policy, recognize
from qvla_export.policies.prismatic import weights
from qvla_export.policies.prismatic.weights import open_body
from qvla_export.shared.observation import Observation

_PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
_STATISTICS = tuple(f"{Path(name).stem}_statistics.safetensors" for name in _PROCESSORS)
# Of checkpoints that were taken although damaged, every so manieth also acts.
ACTS = 20


@dataclass(frozen=True)
class Victim:
    """Files that are damaged in turn, and what reads them."""

    files: tuple[Path, ...]
    # Raises QvlaError, or returns.
    read: Callable[[], object]
    # Makes a damaged file pass checks that its writer could have passed too.
    mend: Callable[[bytes], bytes] = bytes


def read_whole_files_once(patch: pytest.MonkeyPatch) -> None:
    """Keep what is read of files of numbers, for tests in which these stay as they are.

    Hundreds of tensors are read one by one, for descriptions that decide nothing of them.
    """
    read = weights._read
    kept: dict[tuple[Path, str, int | None, int | None], Tensor] = {}

    def read_once(path: Path, key: str, rows: slice = slice(None)) -> Tensor:
        place = (path, key, rows.start, rows.stop)
        if place not in kept:
            kept[place] = read(path, key, rows)
        return kept[place]

    patch.setattr(weights, "_read", read_once)
    for name in ("_shape", "read_state_file", "require_undamaged"):
        patch.setattr(weights, name, functools.cache(getattr(weights, name)))


def _described(folder: Path, names: Iterable[str]) -> Victim:
    """Damage what says how a policy acts; read it as every command does that takes a checkpoint."""
    taken = itertools.count()

    def read() -> None:
        read_checkpoint(folder, None)
        describe_checkpoint(folder)
        family = recognize(folder)
        family.inputs(folder, None)
        family.check_files(folder, None)
        policy = load_policy(folder)
        if next(taken) % ACTS == 0:
            spec = policy.processor.spec
            images = {name: np.zeros((*spec.frame_size, 3), np.uint8) for name in spec.cameras}
            state = np.zeros(spec.state_dim, np.float32)
            chunk = policy.infer(Observation(images, "push the button", state))
            assert np.isfinite(chunk.actions).all()

    return Victim(tuple(folder / name for name in names), read)


def act(root: Path) -> Victim:
    return _described(write_tiny_act(root / "act"), ("config.json", *_PROCESSORS, *_STATISTICS))


def smolvla(root: Path) -> Victim:
    names = ("config.json", "vlm/config.json", *_PROCESSORS, *_STATISTICS)
    return _described(write_tiny_smolvla(root / "smolvla"), names)


def univla(root: Path) -> Victim:
    names = (
        *("config.json", "qvla_policy.json"),
        *("preprocessor_config.json", "dataset_statistics.json"),
    )
    return _described(write_tiny_univla(root / "univla"), names)


def openvla(root: Path) -> Victim:
    names = (
        *("config.json", "qvla_policy.json"),
        *("preprocessor_config.json", "dataset_statistics.json"),
    )
    return _described(write_tiny_openvla(root / "openvla"), names)


def pi(root: Path) -> Victim:
    names = ("config.json", "qvla_policy.json", "assets/tiny/norm_stats.json")
    return _described(write_tiny_pi(root / "pi"), names)


def pi05(root: Path) -> Victim:
    names = ("config.json", "qvla_policy.json", "assets/tiny/norm_stats.json")
    return _described(write_tiny_pi(root / "pi05", adaptive=True), names)


def lerobot_pi(root: Path) -> Victim:
    folder = write_tiny_pi(root / "lerobot_pi")
    shutil.rmtree(folder / "assets")
    (folder / "qvla_policy.json").write_text(json.dumps({"vision_heads": 4}))
    fields: dict[str, Any] = {
        "type": "pi0",
        "chunk_size": 4,
        "num_inference_steps": 4,
        "min_period": 0.004,
        "max_period": 4.0,
        "image_resolution": [28, 28],
    }
    features = small_features(8, 7, cameras=SLOTS[:2], visual="IDENTITY")
    sizes = {"observation.state": 8, "action": 7}
    statistics = {name: {"mean": [0.0] * n, "std": [1.0] * n} for name, n in sizes.items()}
    words = {"max_length": 48, "padding_side": "right"}
    steps = [{"registry_name": "tokenizer_processor", "config": words}]
    write_description(folder, features, statistics, fields, steps)
    names = ("config.json", "qvla_policy.json", *_PROCESSORS, *_STATISTICS)
    return _described(folder, names)


def adapter(root: Path) -> Victim:
    """Merge an adapter into its base, as the file beside it says."""
    golden = DATA / "oracles" / "lora" / "plain"
    base, policy = root / "base", root / "policy" / "lora_adapter"
    base.mkdir(parents=True)
    shutil.copy(golden / "base.safetensors", base / "model.safetensors")
    policy.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(golden / name, policy / name)
    settings = json.loads((policy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../base"
    (policy / "adapter_config.json").write_text(json.dumps(settings))
    return Victim(
        (policy / "adapter_config.json",), lambda: open_body(policy.parent).require_finite()
    )


# Kind -> what makes its checkpoint in a folder.
FAMILIES: dict[str, Callable[[Path], Victim]] = {
    "act": act,
    "smolvla": smolvla,
    "univla": univla,
    "openvla": openvla,
    "pi": pi,
    "pi05": pi05,
    "lerobot-pi": lerobot_pi,
    "adapter": adapter,
}
