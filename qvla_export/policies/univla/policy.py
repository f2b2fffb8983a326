"""UniVLA as a `Policy`: load a checkpoint, decode latent tokens, decode a chunk, act."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.prismatic.decoding_parts import TokenParts
from qvla_export.policies.prismatic.decoding_policy import TokenPolicy
from qvla_export.policies.prismatic.loading import (
    checkpoint_digest,
    load_processor,
    require_folder,
)
from qvla_export.policies.prismatic.network import fill_network
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.univla.architecture import UniVlaArchitecture
from qvla_export.policies.univla.checkpoint import load_module
from qvla_export.policies.univla.config import UniVlaConfig, load_config
from qvla_export.policies.univla.files import decoder_file
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.policies.univla.parts import action_parts, latent_parts, program_of
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.inputs.history import HistorySpec, token_names
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.policy_interface import CONFIG_NAME
from qvla_export.shared.program import Program


@dataclass(frozen=True, repr=False)
class UniVlaPolicy(TokenPolicy):
    """A loaded UniVLA policy; see `Policy` for the meaning of its members."""

    module: UniVlaModule
    config: UniVlaConfig

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the action decoder's output [B, horizon, dim], given the batch's tokens.

        Their embeddings move as the tokens' expectations have since the batch was made. Else what a
        weight does to the choice of a token would count nothing.
        """
        return self.module.act(self.teacher_forced(batch, batch.shares))

    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions of decoded tokens [B, horizon, dim]."""
        return self.acted(batch)[0]

    @torch.no_grad()
    def acted(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Return the normalized actions of decoded tokens, and the tokens."""
        decoded = self.decoded(batch)
        return self.module.act(decoded), decoded.tokens

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return prefix, decoder and the action decoder's two parts, or smaller ones."""
        latent = self._latent_parts().parts(layers_per_part)
        return (*latent, *action_parts(self.module, self.processor.spec))

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program: the prompt, what is pooled of it, the other tokens, the actions."""
        return program_of(self._latent_parts(), self.parts(layers_per_part))

    def probe_output(self) -> Tensor:
        """Return the actions of an empty image and the shortest prompt."""
        return self.module.act(self.probe_decoded())

    def filled(self, weights: CheckpointWeights) -> UniVlaModule:
        """Return the network with its weights read."""
        return fill_network(lambda: UniVlaModule(self.module.arch), weights)

    def _latent_parts(self) -> TokenParts:
        return latent_parts(self.module, self.processor.spec)


def _require_names(checkpoint: Path, tokenizer: Tokenizer | None, arch: UniVlaArchitecture) -> None:
    """Refuse a tokenizer by which a prompt cannot repeat the latent tokens.

    Raises:
        CheckpointError: naming one that it knows under another number, or not at all.
    """
    for number, name in enumerate(token_names(range(arch.codebook)), arch.first_latent_token):
        known = None if tokenizer is None else tokenizer.token_to_id(name)
        if known != number:
            raise CheckpointError(
                f"{checkpoint}/tokenizer.json: {name} must be token {number} for a prompt that "
                f"repeats latent tokens, it is {known}; add UniVLA's special tokens, or write "
                f"history 0 into {CONFIG_NAME}"
            )


def load_univla_policy(
    checkpoint: Path,
    unnorm_key: str | None = None,
    config: UniVlaConfig | None = None,
    resident: bool = True,
) -> UniVlaPolicy:
    """Load a UniVLA checkpoint folder in the published layout.

    Args:
        checkpoint: folder with config.json, weights, action decoder, tokenizer, statistics (or
            those of config.json).
        unnorm_key: data set whose statistics un-normalize actions; may be None if only one.
        config: explicit inputs; None reads `qvla_policy.json`, or takes UniVLA's own.
        resident: False leaves the weights on disk: the policy can be exported part by part, in
            the memory of one part, but not run by torch as a whole.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    config = config or load_config(require_folder(checkpoint))
    module, weights = load_module(require_folder(checkpoint), config, resident)
    no_bins = torch.zeros(0)
    shape = (config.latent_tokens, config.codebook)
    draws = NoiseSpec("noise", shape, "gumbel", seed=config.noise_seed)
    noise = draws if config.temperature else None
    history = HistorySpec(config.latent_tokens, config.codebook) if config.history else None
    arch = module.arch
    processor = load_processor(checkpoint, config, arch, unnorm_key, no_bins, noise, history)
    if history is not None:
        _require_names(checkpoint, processor.tokenizer, arch)
    decoder = [decoder_file(checkpoint).name]
    return UniVlaPolicy(
        module,
        processor,
        checkpoint_digest(checkpoint, config, processor.statistics.key, decoder),
        config,
        no_bins,
        None if resident else weights,
    )
