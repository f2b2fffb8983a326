"""Training of policies that integrate a flow: pi0, pi0.5 and SmolVLA."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.training.demonstrated_frames import DemonstratedFrames
from calibration.training.learners.lerobot_tables import feature_tables
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.flow.policy import FlowPolicy, prefix_inputs
from qvla_export.policies.lerobot.new_checkpoint import Features
from qvla_export.policies.pi import new_checkpoint as pi
from qvla_export.policies.pi.config import PROMPT, PROMPT_TOKENS, PiConfig
from qvla_export.policies.pi.gemma import AdaptiveNorm
from qvla_export.policies.pi.module import PiModule
from qvla_export.policies.prismatic.new_checkpoint import train_tokenizer
from qvla_export.policies.smolvla import new_checkpoint as smolvla
from qvla_export.policies.smolvla.module import SmolVlaModule

_BINS = 256
_HEADS = 4


def flow_losses(
    policy: FlowPolicy, chunks: Tensor, batch: PolicyBatch, random: torch.Generator
) -> dict[str, Tensor]:
    """Return the squared error of the velocity at one of the times that the policy will pass.

    Source: openpi `PI0Pytorch.forward`; its times are drawn from everywhere between 0 and 1.
    """
    module = policy.module
    flow = module.arch.flow
    end = nn.functional.pad(chunks, (0, module.arch.action_width - chunks.shape[2]))
    noise = torch.randn(end.shape, generator=random)
    index = torch.randint(flow.steps, (len(end),), generator=random)
    time = torch.from_numpy(flow.time_points())[index][:, None, None]
    between = time * noise + (1 - time) * end
    velocity = module.velocity(module.prefix(prefix_inputs(batch)), between, index)
    return {"velocity_mse": (velocity - (noise - end)).square().mean()}


@dataclass(frozen=True)
class PiLearner:
    """pi0, or with adaptive norms pi0.5."""

    camera: str
    adaptive: bool
    size: FlowSize
    data_name: str
    horizon: int = 8

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network."""
        return {"family": "pi", **asdict(self)}

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> PiModule:
        """Return a network to begin with: words weigh as much as pictures, no norm knows a time."""
        module = pi.new_module(self.size, self._config(demonstrations), seed)
        with torch.no_grad():
            module.language_model.embed_tokens.weight.mul_(self.size.language_dim**-0.5)
            for part in module.modules():
                if isinstance(part, AdaptiveNorm):
                    part.dense.weight.mul_(0.1)
                    scale, shift, gate = part.dense.bias.chunk(3)
                    scale.zero_(), shift.zero_(), gate.fill_(1.0)
        return module

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in openpi's layout, atomically."""
        assert isinstance(module, PiModule)
        prompts = demonstrations.phrases
        if self.adaptive:  # the state's bins are words of it
            numbers = " ".join(map(str, range(_BINS)))
            prompts = [PROMPT[True].format(instruction=p, state=numbers) for p in prompts]
        tokenizer = pi.train_tokenizer(prompts, self.size.vocab_size)
        names = {"state": "proprio", "actions": "action"}
        tables = {
            ours: {n: demonstrations.statistics[theirs][n] for n in ("mean", "std", "q01", "q99")}
            for ours, theirs in names.items()
        }
        config = self._config(demonstrations)
        pi.save_checkpoint(
            folder, module, config, tokenizer, {self.data_name: tables}, torch.bfloat16
        )

    def losses(
        self, policy: FlowPolicy, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return the error of the velocity."""
        return flow_losses(policy, chunks, batch, random)

    def _config(self, demonstrations: DemonstratedFrames) -> PiConfig:
        return PiConfig(
            cameras=(self.camera,),
            horizon=self.horizon,
            action_dim=demonstrations.action_dim,
            state_dim=demonstrations.state_dim,
            normalization="files",
            adaptive=self.adaptive,
            vision_heads=_HEADS,
            prompt=PROMPT[self.adaptive],
            max_prompt_tokens=PROMPT_TOKENS[self.adaptive],
        )


@dataclass(frozen=True)
class SmolVlaLearner:
    """SmolVLA."""

    camera: str
    size: smolvla.SmolVlaSize

    @property
    def horizon(self) -> int:
        """Return the actions of a chunk."""
        return self.size.horizon

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network."""
        return {"family": "smolvla", **asdict(self)}

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> SmolVlaModule:
        """Return a network to begin with: words weigh as much as pictures."""
        module = smolvla.new_module(self.size, seed)
        with torch.no_grad():
            module.language_model.embed_tokens.weight.mul_(self.size.language_dim**-0.5)
        return module

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in LeRobot's layout, atomically."""
        assert isinstance(module, SmolVlaModule)
        height, width = demonstrations.images.shape[1:3]
        features = Features(
            {self.camera: (height, width)},
            demonstrations.state_dim,
            demonstrations.action_dim,
            {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        )
        tokenizer = train_tokenizer(
            [f"{p}\n" for p in demonstrations.phrases], self.size.vocab_size
        )
        tables = feature_tables(demonstrations)
        smolvla.save_checkpoint(folder, module, self.horizon, features, tokenizer, tables)

    def losses(
        self, policy: FlowPolicy, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return the error of the velocity."""
        return flow_losses(policy, chunks, batch, random)
