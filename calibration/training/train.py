"""Imitation training of a small policy from demonstrations. Resumable."""

import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calibration.sources.lerobot import LeRobotDataset
from calibration.training.base_trainer import BaseTrainer, TrainingConfig
from calibration.training.demonstrated_frames import load_demonstrations
from calibration.training.family_trainer import FamilyTrainer
from calibration.training.learner import Learner
from calibration.training.recipes import FamilyRecipe, Recipe
from calibration.training.tower_features import tower_features
from calibration.training.trainer import REFERENCE_CONFIG, Trainer
from calibration.training.training_data import load_frames
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize
from qvla_export.shared.artifacts import versions, write_bytes, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError

__all__ = ["REFERENCE_CONFIG", "NetworkSize", "TrainingConfig", "train_policy"]

_LOG = logging.getLogger(__name__)


def train_recipe(
    root: Path,
    output: Path,
    recipe: Recipe | FamilyRecipe,
    config: TrainingConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train what a recipe describes on a LeRobot data set; see `run_training`.

    Args:
        root: LeRobotDataset v3.0 folder.
        output: folder of the training.
        recipe: of the policy.
        config: how it is trained: the recipe's, or one that differs from it.
        on_progress: called with (steps done, steps in all).

    Raises:
        QvlaError: the data do not fit the policy or the batch, or the recipe is not compiled.
        ArtifactMismatch: `output` holds a training with other settings, network or data.
    """
    if isinstance(recipe, FamilyRecipe):
        if config.compiled:
            raise QvlaError("only trainings of oft are compiled; leave out --compile")
        return train_family(root, output, recipe.learner, config, on_progress)
    name, size = recipe.data_name, recipe.size
    return train_policy(root, output, size, config, name, on_progress, recipe.policy)


def train_policy(
    root: Path,
    output: Path,
    size: NetworkSize,
    config: TrainingConfig,
    data_name: str,
    on_progress: Callable[[int, int], None] | None = None,
    policy: OftConfig = REFERENCE_CONFIG,
) -> Path:
    """Train an OpenVLA-OFT policy on a LeRobot data set; see `run_training`.

    Args:
        root, output, config, on_progress: see `train_recipe`.
        size: of the network.
        data_name: key of the data's statistics in the checkpoint.
        policy: what it sees and does.

    Raises:
        QvlaError, ArtifactMismatch: as `train_recipe`.
        CheckpointError: the pretrained tower that the network begins with is not installed.
    """
    if size.pretrained is not None:
        size.pretrained.tower.path()  # refused before anything is read
    _LOG.info("reading the demonstrations in %s", root)
    dataset = LeRobotDataset(root)
    frames = load_frames(dataset, policy, data_name, size.vocab_size, config.frames)
    features = None
    if size.pretrained is not None:
        _LOG.info("what the pretrained tower makes of %d frames is kept in %s", len(frames), output)
        features = tower_features(frames, size, policy, output)
    episodes = frames.statistics[data_name]["num_trajectories"]
    about = {"size": asdict(size), "frames": len(frames), "episodes": episodes}
    trainer = Trainer(frames, size, config, policy, features)
    return run_training(trainer, output, about, on_progress)


def train_family(
    root: Path,
    output: Path,
    learner: Learner,
    config: TrainingConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a policy of any family on a LeRobot data set; see `run_training`.

    Args:
        root, output, config, on_progress: see `train_recipe`.
        learner: what its family does.

    Raises:
        QvlaError, ArtifactMismatch: as `train_recipe`.
    """
    _LOG.info("reading the demonstrations in %s", root)
    demonstrations = load_demonstrations(LeRobotDataset(root), learner.camera)
    trainer = FamilyTrainer(demonstrations, learner, config)
    about = {
        "learner": learner.description(),
        "frames": len(demonstrations),
        "episodes": len(demonstrations.actions),
    }
    return run_training(trainer, output, about, on_progress)


def run_training(
    trainer: BaseTrainer,
    output: Path,
    about: Mapping[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Run a training to its end; returns the checkpoint folder `output/checkpoint`.

    Killed and started again with the same arguments it continues from the last saved state;
    `steps` and the decay may change between runs.

    Args:
        trainer: as it begins.
        output: folder of the training.
        about: what `training.json` says beside configuration and versions.
        on_progress: called with (steps done, steps in all).

    Raises:
        ArtifactMismatch: `output` holds a training with other settings, network or data.
        QvlaError: it holds one of more steps.
    """
    config = trainer.config
    state_path, log_path = output / "training_state.pt", output / "training_log.jsonl"
    if state_path.exists():
        trainer.load_state_dict(_load_state(state_path))
        if trainer.step > config.steps:
            raise QvlaError(
                f"{output} is trained for {trainer.step} steps, more than the {config.steps} asked "
                f"for; ask for --steps {trainer.step} or more, or use another output folder"
            )
        _LOG.info("continuing at step %d", trainer.step)
    log = _read_log(log_path, trainer.step)
    started, first = time.monotonic(), trainer.step
    while trainer.step < config.steps:
        losses = trainer.train_step()
        if on_progress is not None:
            on_progress(trainer.step, config.steps)
        if trainer.step % 50 == 0 or trainer.step == config.steps:
            rate = (trainer.step - first) * config.batch_size / (time.monotonic() - started)
            log.append({"step": trainer.step, **losses, "samples_per_s": round(rate, 1)})
        if trainer.step % config.save_every_steps == 0 or trainer.step == config.steps:
            _save(trainer, output, state_path, log_path, log)
    write_json(
        output / "training.json", {"config": asdict(config), **about, "versions": versions()}
    )
    return output / "checkpoint"


def _save(
    trainer: BaseTrainer,
    output: Path,
    state_path: Path,
    log_path: Path,
    log: list[dict[str, float]],
) -> None:
    buffer = io.BytesIO()
    torch.save(trainer.state_dict(), buffer)
    # The state last: a finished state promises that the checkpoint is there.
    trainer.save(output / "checkpoint")
    write_bytes(log_path, "".join(json.dumps(row) + "\n" for row in log).encode())
    write_bytes(state_path, buffer.getvalue())


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "identity", "module", "averaged", "goals", "optimizer"} - set(state)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ArtifactError(f"{path} cannot be resumed from: {error}; remove it") from error
    if missing:
        raise ArtifactError(f"{path} lacks {sorted(missing)}; remove it to train anew")
    return state


def _read_log(path: Path, step: int) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]
