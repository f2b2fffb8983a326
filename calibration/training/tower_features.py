"""What a frozen tower makes of every frame, computed once and kept on disk. Resumable."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration.training.trainer import normalize_pixels
from calibration.training.training_data import TrainingFrames
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.new_checkpoint import new_module
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize
from qvla_export.shared.artifacts import write_bytes

_LOG = logging.getLogger(__name__)
# Frames between two notes of how far it is.
_BLOCK = 256
_BATCH = 16


def tower_features(
    frames: TrainingFrames, size: NetworkSize, policy: OftConfig, folder: Path
) -> Tensor:
    """Return the DINOv2 tower's features of all frames, mapped from a file in `folder`.

    The file is named by the digest of frames and tower; one that is not whole is gone on with.

    Returns:
        float16 [n, cameras * patches, width]

    Raises:
        CheckpointError: the pretrained tower is not installed.
    """
    assert size.pretrained is not None
    path = folder / f"features-{_digest(frames, size)}.f16"
    tower = new_module(size, policy, 0).eval().requires_grad_(False).vision_backbone
    side = size.image_size // size.patch_size
    shape = (len(frames), len(policy.cameras) * side * side, size.pretrained.tower.width)
    count = path.with_suffix(".count")
    done = int(count.read_text()) if count.exists() and path.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    features = np.memmap(path, np.float16, "r+" if done else "w+", shape=shape)
    while done < len(frames):
        stop = min(done + _BLOCK, len(frames))
        for start in range(done, stop, _BATCH):
            rows = slice(start, min(start + _BATCH, stop))
            with torch.no_grad():
                batch = tower.features(normalize_pixels(frames.images[rows]), "dino")
            features[rows] = batch.numpy().astype(np.float16)
        features.flush()
        done = stop
        write_bytes(count, str(done).encode())
        _LOG.info("features of %d of %d frames", done, len(frames))
    # Read only from here on; torch maps no array that it may not write.
    return torch.from_file(
        str(path), shared=False, size=int(np.prod(shape)), dtype=torch.float16
    ).reshape(shape)


def _digest(frames: TrainingFrames, size: NetworkSize) -> str:
    choice = json.dumps([size.image_size, asdict(size)["pretrained"]], sort_keys=True)
    return hashlib.sha256(f"{frames.digest}{choice}".encode()).hexdigest()[:16]
