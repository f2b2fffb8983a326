"""Demonstrations as training samples: pictures, prompts, states, chunks of normalized actions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot import LeRobotDataset
from calibration.sources.lerobot_writer import Episode
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.prismatic.new_checkpoint import PAD_ID, train_tokenizer
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.normalization import Bounds
from qvla_export.shared.processor import OPENVLA_PROMPT, with_suffix

POSITION_DIM = 3  # the hand's position leads the state of every arm we train on


@dataclass(frozen=True)
class TrainingFrames:
    """All frames of a data set in memory."""

    # uint8 [n, cameras, S, S, 3]
    images: Tensor
    # Normalized state.  float32 [n, state]
    states: Tensor
    # Normalized actions from each frame on; the last one repeats after an episode's end.
    # float32 [n, horizon, dim]
    chunks: Tensor
    # What is predicted beside actions: where the hand ends in this episode, normalized, and what a
    # camera shows that only training looks at, -1..1.  float32 [n, 3 or more]
    goals: Tensor
    # Row of `prompts` of each frame.  int64 [n]
    prompt_index: Tensor
    # Padded prompts and their lengths.  int64 [prompts, L], [prompts]
    prompts: Tensor
    prompt_lengths: Tensor
    tokenizer: Tokenizer
    # Contents of `dataset_statistics.json`.
    statistics: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """SHA-256 of the samples and the tokenizer."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        for tensor in (self.images, self.states, self.chunks, self.goals, self.prompt_index):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a data set are trained on, and what is predicted beside their actions."""

    # One frame in so many.
    stride: int = 1
    # The camera whose pixels are predicted too; None for none.
    goal_camera: str | None = None

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise QvlaError(f"the stride of frames must be at least 1, got {self.stride}")


def load_frames(
    dataset: LeRobotDataset,
    config: OftConfig,
    name: str,
    vocab_size: int,
    choice: FrameChoice = FrameChoice(),
) -> TrainingFrames:
    """Read a data set into memory and fit its tokenizer and statistics.

    Raises:
        QvlaError: the data set's cameras, image size, state or action do not fit the policy's.
    """
    _require_features(dataset, config, choice)
    episodes = [dataset.episode(number) for number in range(len(dataset.episodes))]
    statistics = data_statistics(episodes)
    action, state = _bounds(statistics["action"]), _bounds(statistics["proprio"])
    frames = slice(None, None, choice.stride)
    tokenizer, prompts, lengths, index = _prompts(episodes, config, vocab_size, frames)
    states = [state.normalize(e.state) for e in episodes]
    chunks = [chunks_of(action.normalize(e.action), config.horizon)[frames] for e in episodes]
    ends = [np.broadcast_to(s[-1, :POSITION_DIM], (len(s), POSITION_DIM))[frames] for s in states]
    goals = np.concatenate(ends)
    if choice.goal_camera is not None:
        pixels = stacked_images(episodes, choice.goal_camera, frames).reshape(len(goals), -1)
        levels = pixels / np.float32(127.5) - np.float32(1.0)
        goals = np.concatenate([goals, levels], axis=1)
    images = [stacked_images(episodes, camera, frames) for camera in config.cameras]
    return TrainingFrames(
        images=torch.from_numpy(np.stack(images, axis=1)),
        states=torch.from_numpy(np.concatenate([s[frames] for s in states])),
        chunks=torch.from_numpy(np.concatenate(chunks)),
        goals=torch.from_numpy(goals),
        prompt_index=torch.from_numpy(index),
        prompts=torch.from_numpy(prompts),
        prompt_lengths=torch.from_numpy(lengths),
        tokenizer=tokenizer,
        statistics={name: statistics},
    )


def _require_features(dataset: LeRobotDataset, config: OftConfig, choice: FrameChoice) -> None:
    for camera in config.cameras:
        if camera not in dataset.keys.images:
            raise QvlaError(
                f"the policy sees camera {camera!r}, {dataset.root} has "
                f"{sorted(dataset.keys.images)}"
            )
    if choice.goal_camera not in (None, *dataset.keys.images):
        raise QvlaError(
            f"training predicts what {choice.goal_camera!r} shows, {dataset.root} has "
            f"{sorted(dataset.keys.images)}"
        )
    if dataset.keys.action is None:
        raise QvlaError(f"{dataset.root} has no column of actions, which training imitates")
    lengths = {dataset.keys.action: config.action_dim}
    if dataset.keys.state is not None:
        lengths[dataset.keys.state] = config.state_dim
    for key, length in lengths.items():
        width = dataset.width(key)
        if width != length:
            raise QvlaError(
                f"the policy's {key} has {length} numbers, that of {dataset.root} has {width}"
            )


def stacked_images(
    episodes: Sequence[Episode], camera: str, frames: slice = slice(None)
) -> NDArray[np.uint8]:
    """Return a camera's pictures, which must be of one size.  uint8 [n, h, w, 3]"""
    images = [decode_png(png) for e in episodes for png in e.images[camera][frames]]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise QvlaError(f"all frames must have one size, got {sorted(shapes)}")
    return np.stack(images)


def chunks_of(actions: NDArray[np.float32], horizon: int) -> NDArray[np.float32]:
    """Return the next `horizon` actions of every frame.  float32 [n, horizon, dim]"""
    steps = np.arange(len(actions))[:, None] + np.arange(horizon)
    chunks: NDArray[np.float32] = actions[np.minimum(steps, len(actions) - 1)]
    return chunks


def _prompts(
    episodes: Sequence[Episode], config: OftConfig, vocab_size: int, frames: slice
) -> tuple[Tokenizer, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return tokenizer, padded prompts, lengths and each frame's prompt row."""
    phrases = [e.instruction_at(frame) for e in episodes for frame in range(len(e))[frames]]
    instructions = sorted(set(phrases))
    texts = [OPENVLA_PROMPT.format(instruction=i.lower()) for i in instructions]
    tokenizer = train_tokenizer(texts, vocab_size)
    if tokenizer.get_vocab_size() > vocab_size:
        raise QvlaError(
            f"a vocabulary of {vocab_size} is too small, single bytes and special tokens alone "
            f"take {tokenizer.get_vocab_size()}"
        )
    rows = [
        with_suffix(np.asarray(tokenizer.encode(t).ids, np.int64), config.suffix_token_id)
        for t in texts
    ]
    lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), lengths.max()), PAD_ID, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    rank = {phrase: row for row, phrase in enumerate(instructions)}
    index = np.asarray([rank[phrase] for phrase in phrases], dtype=np.int64)
    return tokenizer, padded, lengths, index


def data_statistics(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return OpenVLA's statistics of one data set."""
    parts = {
        "action": np.concatenate([e.action for e in episodes]),
        "proprio": np.concatenate([e.state for e in episodes]),
    }
    result: dict[str, Any] = {
        name: {
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
            "min": values.min(0).tolist(),
            "max": values.max(0).tolist(),
            "q01": np.quantile(values, 0.01, axis=0).tolist(),
            "q99": np.quantile(values, 0.99, axis=0).tolist(),
            "mask": [True] * values.shape[1],
        }
        for name, values in parts.items()
    }
    result["num_transitions"] = len(parts["action"])
    result["num_trajectories"] = len(episodes)
    return result


def _bounds(part: Mapping[str, Any]) -> Bounds:
    low, high = (np.asarray(part[name], np.float64) for name in ("q01", "q99"))
    return Bounds(low, high, np.ones(low.shape, dtype=bool))
