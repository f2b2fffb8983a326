"""Training of policies that decode tokens: OpenVLA's are its action, UniVLA's stand for a chunk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.training.demonstrated_frames import DemonstratedFrames
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.openvla.checkpoint import save_module as save_openvla
from qvla_export.policies.openvla.config import OpenVlaConfig
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.openvla.new_checkpoint import new_module as new_openvla
from qvla_export.policies.openvla.policy import OpenVlaPolicy
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    SUFFIX_ID,
    NetworkSize,
    save_checkpoint,
    train_tokenizer,
)
from qvla_export.policies.univla.checkpoint import save_module as save_univla
from qvla_export.policies.univla.config import UniVlaConfig
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.policies.univla.new_checkpoint import latent_tokenizer
from qvla_export.policies.univla.new_checkpoint import new_module as new_univla
from qvla_export.policies.univla.policy import UniVlaPolicy
from qvla_export.shared.processor import OPENVLA_PROMPT

_BINS = 256
# Neighbours of the right bin are right, too, the less the further off: standard deviation of a
# token's target, in normalized units (a bin is 0.008 wide).
_SOFTNESS = 0.02
_HEADS = (2, 2)


@dataclass(frozen=True)
class OpenVlaLearner:
    """Cross entropy of the tokens of one action."""

    camera: str
    size: NetworkSize
    data_name: str
    horizon: int = field(default=1, init=False)

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network."""
        return {"family": "openvla", **asdict(self)}

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> OpenVlaModule:
        """Return a network to begin with."""
        return new_openvla(self.size, self._config(demonstrations), seed)

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in OpenVLA's layout, atomically."""
        assert isinstance(module, OpenVlaModule)
        tokenizer = train_tokenizer(_prompts(demonstrations), self.size.vocab_size - _BINS)
        statistics = {self.data_name: demonstrations.statistics}
        weights = partial(save_openvla, module)
        config = self._config(demonstrations)
        save_checkpoint(folder, weights, module.arch, config, tokenizer, statistics)

    def losses(
        self, policy: OpenVlaPolicy, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return the cross entropy of each token, given the right ones before it."""
        actions = chunks[:, 0]
        distances = actions[:, :, None] - policy.token_centers
        tokens = distances.abs().argmin(dim=2)
        targets = (-0.5 * (distances / _SOFTNESS).square()).softmax(dim=2)
        logits = policy.token_logits(replace(batch, tokens=tokens))
        return {"cross_entropy": nn.functional.cross_entropy(logits.mT, targets.mT)}

    def _config(self, demonstrations: DemonstratedFrames) -> OpenVlaConfig:
        shared = _shared_config(self.camera, self.horizon, demonstrations)
        return OpenVlaConfig(**vars(shared))


@dataclass(frozen=True)
class UniVlaLearner:
    """Cross entropy of latent tokens, and the mean absolute error of the chunk decoded from them.

    Upstream's latent tokens are learned of videos first. Here each stands for one number of an
    action: the bin of its mean over the chunk.
    """

    camera: str
    size: NetworkSize
    data_name: str
    horizon: int = 8
    codebook: int = 32

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network."""
        return {"family": "univla", **asdict(self)}

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> UniVlaModule:
        """Return a network to begin with."""
        return new_univla(self.size, self._config(demonstrations), seed)

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in UniVLA's layout, atomically."""
        assert isinstance(module, UniVlaModule)
        tokenizer = latent_tokenizer(_prompts(demonstrations), self.size, self.codebook)
        statistics = {self.data_name: demonstrations.statistics}
        weights = partial(save_univla, module)
        config = self._config(demonstrations)
        save_checkpoint(folder, weights, module.arch, config, tokenizer, statistics)

    def losses(
        self, policy: UniVlaPolicy, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return both losses, given the right tokens."""
        module = policy.module
        places = (chunks.mean(dim=1) + 1) / 2 * self.codebook
        tokens = places.to(torch.int64).clamp(0, self.codebook - 1)
        decoded = policy.teacher_forced(replace(batch, tokens=tokens))
        logits = module.logits(decoded)
        return {
            "cross_entropy": nn.functional.cross_entropy(logits.mT, tokens),
            "action_l1": (module.act(decoded) - chunks).abs().mean(),
        }

    def _config(self, demonstrations: DemonstratedFrames) -> UniVlaConfig:
        shared = _shared_config(self.camera, self.horizon, demonstrations)
        tokens = demonstrations.action_dim
        return UniVlaConfig(**vars(shared), latent_tokens=tokens, codebook=self.codebook)


def _shared_config(
    camera: str, horizon: int, demonstrations: DemonstratedFrames
) -> PrismaticConfig:
    """Return what policies of both families see and do."""
    return PrismaticConfig(
        cameras=(camera,),
        horizon=horizon,
        action_dim=demonstrations.action_dim,
        state_dim=0,
        normalization="q99",
        vision_heads=_HEADS,
        bos_token_id=BOS_ID,
        suffix_token_id=SUFFIX_ID,
    )


def _prompts(demonstrations: DemonstratedFrames) -> list[str]:
    return [OPENVLA_PROMPT.format(instruction=p.lower()) for p in demonstrations.phrases]
