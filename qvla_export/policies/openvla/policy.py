"""OpenVLA as a `Policy`: load a checkpoint, decode tokens, act."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.openvla.checkpoint import load_module
from qvla_export.policies.openvla.config import OpenVlaConfig, load_config
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.openvla.parts import action_parts
from qvla_export.policies.prismatic.decoding_parts import TokenParts
from qvla_export.policies.prismatic.decoding_policy import TokenPolicy
from qvla_export.policies.prismatic.loading import (
    checkpoint_digest,
    load_processor,
    load_token_centers,
    require_folder,
)
from qvla_export.policies.prismatic.network import fill_network
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.shared.program import Program


@dataclass(frozen=True, repr=False)
class OpenVlaPolicy(TokenPolicy):
    """A loaded OpenVLA policy; see `Policy` for the meaning of its members."""

    module: OpenVlaModule
    config: OpenVlaConfig

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return expected bin centres [B, 1, dim], teacher-forced on the batch's tokens."""
        weights = self.token_logits(batch).softmax(dim=-1)
        return (weights @ self.token_centers.to(weights))[:, None]

    @torch.no_grad()
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions of greedy decoding [B, 1, dim]."""
        tokens = self.decoded(batch).tokens
        return self.token_centers.to(tokens.device)[tokens][:, None]

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return prefix and decoder, or both cut into smaller parts."""
        return self._token_parts().parts(layers_per_part)

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program: one pass over the prompt, then one for each token after the first."""
        parts = self._token_parts()
        return Program(parts.runs(parts.parts(layers_per_part)))

    def probe_output(self) -> Tensor:
        """Return the logits of an empty image and the shortest prompt."""
        return self.module.logits(self.probe_decoded())

    def filled(self, weights: CheckpointWeights) -> OpenVlaModule:
        """Return the network with its weights read."""
        arch = self.module.arch
        return fill_network(lambda: OpenVlaModule(arch, self.token_centers), weights)

    def _token_parts(self) -> TokenParts:
        return action_parts(self.module, self.processor.spec)


def load_openvla_policy(
    checkpoint: Path,
    unnorm_key: str | None = None,
    config: OpenVlaConfig | None = None,
    resident: bool = True,
) -> OpenVlaPolicy:
    """Load an OpenVLA checkpoint folder in the published layout.

    Args:
        checkpoint: folder with config.json, weights, tokenizer, statistics (or those of
            config.json).
        unnorm_key: data set whose statistics un-normalize actions; may be None if only one.
        config: explicit inputs; None reads `qvla_policy.json`, or takes OpenVLA's own.
        resident: False leaves the weights on disk: the policy can be exported part by part, in
            the memory of one part, but not run by torch as a whole.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    config = config or load_config(require_folder(checkpoint))
    module, weights = load_module(require_folder(checkpoint), config, resident)
    centers = load_token_centers(checkpoint)
    processor = load_processor(checkpoint, config, module.arch, unnorm_key, centers)
    return OpenVlaPolicy(
        module,
        processor,
        checkpoint_digest(checkpoint, config, processor.statistics.key),
        config,
        centers,
        None if resident else weights,
    )
