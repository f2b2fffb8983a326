"""OpenVLA-OFT as a `Policy`: load a checkpoint, batch observations, act."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.adapters import settings_file
from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.oft import diffusion_parts
from qvla_export.policies.oft.checkpoint import load_module
from qvla_export.policies.oft.config import OftConfig, load_config
from qvla_export.policies.oft.files import film_file, part_file, part_names
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.parts import cut_parts, whole_part
from qvla_export.policies.oft.weights import open_weights
from qvla_export.policies.prismatic.loading import (
    checkpoint_digest,
    load_processor,
    load_token_centers,
    require_folder,
)
from qvla_export.policies.prismatic.network import fill_network
from qvla_export.policies.prismatic.policy import PrismaticPolicy
from qvla_export.policies.prismatic.pretrained import PRETRAINED, TOWER
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.program import Program


@dataclass(frozen=True, repr=False)
class OftPolicy(PrismaticPolicy):
    """A loaded OpenVLA-OFT policy; see `Policy` for the meaning of its members."""

    module: OftModule
    config: OftConfig
    # Whether the DINOv2 tower lies in another package's file, which nobody changes.
    tower_elsewhere: bool = False

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return normalized actions [B, horizon, dim]; expected bin centres for token heads."""
        output = self._output(batch)
        if self.config.head != "tokens":
            return output
        weights = self._of_action_tokens(output).softmax(dim=-1)
        return weights @ self.token_centers.to(weights)

    def token_logits(self, batch: PolicyBatch) -> Tensor | None:
        """Return logits of the action tokens [B, H * D, bins]; None for other heads."""
        if self.config.head != "tokens":
            return None
        return self._of_action_tokens(self._output(batch)).flatten(1, 2)

    @torch.no_grad()
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes; argmax for token heads [B, H, D]."""
        return self._executed_actions(self._output(batch))

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return one part, or vision, runs of decoder blocks, head; of diffusion see its parts."""
        spec = self.processor.spec
        if layers_per_part is not None and layers_per_part < 1:
            raise CheckpointError(f"layers_per_part must be at least 1, got {layers_per_part}")
        if self.config.head == "diffusion":
            if layers_per_part is None:
                return diffusion_parts.whole_parts(self.module, spec)
            return diffusion_parts.cut_parts(self.module, spec, layers_per_part)
        if layers_per_part is None:
            return (whole_part(self.module, spec, self._executed_actions),)
        return cut_parts(self.module, spec, self._executed_actions, layers_per_part)

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program: every part once, in order; or what is seen, then every step."""
        if self.config.head == "diffusion":
            parts = self.parts(layers_per_part)
            return diffusion_parts.program_of(parts, self.config.diffusion_steps)
        return Program.straight(part.name for part in self.parts(layers_per_part))

    def probe_output(self) -> Tensor:
        """Return what the head makes of an empty image and the shortest prompt."""
        pixels, ids = self.probe_inputs()
        size = self.module.arch.state_dim
        state = torch.zeros(1, size, device=pixels.device) if size else None
        noise = None
        if self.config.head == "diffusion":
            noise = torch.zeros(1, self.config.horizon, self.config.action_dim).to(pixels.device)
        output: Tensor = self.module(pixels, ids, state, None, noise)
        return output

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed: not in towers that FiLM's file replaces.

        Nor in a tower that lies elsewhere.
        """
        found = super().migrations()
        if self.module.film is None and not self.tower_elsewhere:
            return found
        fixed = TOWER if self.module.film is None else "vision_backbone."
        return tuple(place for place in found if not place.source.startswith(fixed))

    def filled(self, weights: CheckpointWeights) -> OftModule:
        """Return the network with its weights read."""
        return fill_network(lambda: OftModule(self.module.arch), weights)

    def _output(self, batch: PolicyBatch) -> Tensor:
        output: Tensor = self.module(
            batch.pixel_values, batch.input_ids, batch.state, batch.prompt_lengths, batch.noise
        )
        return output

    def _executed_actions(self, output: Tensor) -> Tensor:
        """The head's output [B, H, D] or logits [B, H, D, vocab] -> executed actions [B, H, D]."""
        if self.config.head != "tokens":
            return output
        # Any token of the vocabulary may win; upstream clips it into the bins. A table of them all
        # does, as TensorRT clips no integers.
        centers, first = self.token_centers, self._first_action_token()
        above = output.shape[-1] - first - len(centers)
        table = torch.cat([centers[:1].expand(first), centers, centers[-1:].expand(above)])
        return table[output.argmax(dim=-1)]

    def _of_action_tokens(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] -> those of the action tokens [..., bins]."""
        first = self._first_action_token()
        return logits[..., first : first + len(self.token_centers)]

    def _first_action_token(self) -> int:
        """Lowest id of an action token; the vocabulary's last ids stand for the lowest actions."""
        arch = self.module.arch
        return arch.llama.vocab_size - arch.vocab_padding - len(self.token_centers)


def load_oft_policy(
    checkpoint: Path,
    unnorm_key: str | None = None,
    config: OftConfig | None = None,
    resident: bool = True,
) -> OftPolicy:
    """Load an OpenVLA-OFT checkpoint folder in the published layout.

    Args:
        checkpoint: folder with config.json, weights, head files, statistics, tokenizer.
        unnorm_key: data set whose statistics un-normalize actions; may be None if only one.
        config: explicit inputs and dimensions; None reads `qvla_policy.json`.
        resident: False leaves the weights on disk: the policy can be exported part by part, in
            the memory of one part, but not run by torch as a whole.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    config = config or load_config(require_folder(checkpoint))
    if config.head != "l1" and not resident:
        raise CheckpointError(
            f"{checkpoint}: a policy with a head of tokens or of diffusion must be loaded whole; "
            "the table of its bins or steps is not among the weights that stay on disk"
        )
    return _load(require_folder(checkpoint), unnorm_key, config, resident)


def check_oft_checkpoint(checkpoint: Path, unnorm_key: str | None, config: OftConfig) -> None:
    """Refuse what `load_oft_policy` and the first action would refuse, in the memory of one tensor.

    Raises:
        CheckpointError, StatisticsError: as `load_oft_policy`; there is no tokenizer.
    """
    policy = _load(require_folder(checkpoint), unnorm_key, config, resident=False)
    policy.processor.require_tokenizer()
    policy.require_finite()


def _load(checkpoint: Path, unnorm_key: str | None, config: OftConfig, resident: bool) -> OftPolicy:
    weights = open_weights(checkpoint, config)
    module = load_module(checkpoint, config, weights, resident)
    token_centers = load_token_centers(checkpoint) if config.head == "tokens" else torch.zeros(0)
    noise = None
    if config.head == "diffusion":
        shape = (config.horizon, config.action_dim)
        noise = NoiseSpec("noise", shape, seed=config.noise_seed)
    processor = load_processor(checkpoint, config, module.arch, unnorm_key, token_centers, noise)
    head_files = [part_file(checkpoint, part).name for part in part_names(config)]
    if film := film_file(checkpoint):
        head_files.append(film.name)
        if said := settings_file(checkpoint):
            head_files.append(str(said.relative_to(checkpoint)))
    return OftPolicy(
        module,
        processor,
        checkpoint_digest(checkpoint, config, processor.statistics.key, head_files),
        config,
        token_centers,
        None if resident else weights,
        (checkpoint / PRETRAINED).is_file(),
    )
