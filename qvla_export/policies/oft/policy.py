"""OpenVLA-OFT as a `Policy`: load a checkpoint, batch observations, act."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.oft.checkpoint import (
    NOT_UPSTREAM,
    empty_module,
    filled_module,
    load_module,
)
from qvla_export.policies.oft.config import OftConfig, load_config
from qvla_export.policies.oft.files import part_file, part_names
from qvla_export.policies.oft.module import IGNORED_TOKEN_ID, OftModule
from qvla_export.policies.oft.parts import cut_parts, whole_part
from qvla_export.policies.oft.smoothing import find_migrations
from qvla_export.policies.oft.weights import CheckpointWeights, open_weights
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.clock import SpanClock
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.images import ImageSpec, load_image_spec
from qvla_export.shared.json_documents import FOREIGN, read_json
from qvla_export.shared.normalization import load_statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor, ProcessorSpec, load_tokenizer

_TOKENIZER = "tokenizer.json"
_STATISTICS = "dataset_statistics.json"
_QUANTIZED_PREFIXES = ("vision_backbone.", "language_model.model.")


@dataclass(frozen=True)
class OftPolicy:
    """A loaded OpenVLA-OFT policy; see `Policy` for the meaning of its members."""

    module: OftModule
    processor: Processor
    config: OftConfig
    digest: str
    # Centre of each action token's bin, ordered by token id.  float32 [256]; empty for L1 heads.
    token_centers: Tensor
    # Where the weights lie if `module` has none of them in memory, else None.
    on_disk: CheckpointWeights | None = None

    def __repr__(self) -> str:
        size, config = sum(p.numel() for p in self.module.parameters()), self.config
        return (
            f"<OftPolicy: {size / 1e6:.1f} million weights, cameras {', '.join(config.cameras)}, "
            f"{config.horizon} actions of {config.action_dim} dimensions, {self.digest[:12]}>"
        )

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch."""
        pixels = np.stack([self.processor.pixel_values(o) for o in observations])
        rows = [self.processor.input_ids(o.instruction) for o in observations]
        lengths = [len(row) for row in rows]
        ids = np.full((len(rows), max(lengths)), IGNORED_TOKEN_ID, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        state = None
        if self.config.state_dim:
            state = torch.from_numpy(np.stack([self.processor.state(o) for o in observations]))
        ragged = torch.tensor(lengths) if len(set(lengths)) > 1 else None
        batch = PolicyBatch(torch.from_numpy(pixels), torch.from_numpy(ids), ragged, state)
        device = self.module.projector.fc1.weight.device
        # Where no weights are in memory, parts run on the CPU.
        return batch if device.type == "meta" else batch.to(device)

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return normalized actions [B, horizon, dim]; expected bin centres for token heads."""
        output: Tensor = self.module(
            batch.pixel_values, batch.input_ids, batch.state, batch.prompt_lengths
        )
        if self.config.head == "l1":
            return output
        first = self._first_action_token()
        weights = output[..., first : first + len(self.token_centers)].softmax(dim=-1)
        return weights @ self.token_centers.to(weights)

    @torch.enable_grad()
    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the linear and convolution layers of towers and decoder that reach the action.

        Found by tracing: a layer whose weight gets no gradient from the action is dead.
        """
        candidates = {
            name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.startswith(_QUANTIZED_PREFIXES)
        }
        weights = [layer.weight for layer in candidates.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            output = self.module(*self._probe_inputs())
            gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        reached = zip(candidates.items(), gradients, strict=True)
        return {name: layer for (name, layer), gradient in reached if gradient is not None}

    @torch.no_grad()
    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation."""
        clock = SpanClock()
        with clock.span("preprocess"):
            batch = self.batch([observation])
        with clock.span("engine"):
            normalized = self.greedy_actions(batch)[0].numpy()
        return self.processor.chunk(normalized, clock.timing_ms)

    @torch.no_grad()
    def greedy_actions(self, batch: PolicyBatch) -> Tensor:
        """Return the normalized actions the policy executes; argmax for token heads [B, H, D]."""
        output = self.module(batch.pixel_values, batch.input_ids, batch.state, batch.prompt_lengths)
        return self._executed_actions(output)

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return one part, or vision, runs of decoder blocks, head."""
        spec = self.processor.spec
        if layers_per_part is None:
            return (whole_part(self.module, spec, self._executed_actions),)
        if layers_per_part < 1:
            raise CheckpointError(f"layers_per_part must be at least 1, got {layers_per_part}")
        return cut_parts(self.module, spec, self._executed_actions, layers_per_part)

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter or buffer by name, as float32, from memory or the checkpoint."""
        if self.on_disk is not None and name in self.on_disk.shapes:
            tensor = torch.empty(self.on_disk.shapes[name].shape, dtype=torch.float32)
            self.on_disk.copy_to(name, tensor)
            return tensor.numpy()
        if self.on_disk is not None:
            # What no checkpoint holds follows from the configuration alone.
            rotary = LlamaRotaryEmbedding(self.module.arch.llama)
            tensor = rotary.get_buffer(name.removeprefix("language_model.model.rotary_emb."))
        else:
            tensor = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}[
                name
            ]
        return tensor.detach().numpy()

    def stored_numbers(self) -> int:
        """Return how many weights the checkpoint holds."""
        tensors = self.module.state_dict() if self.on_disk is None else self.on_disk.shapes
        return sum(t.numel() for name, t in tensors.items() if name not in NOT_UPSTREAM)

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed."""
        return find_migrations(self.module)

    def in_memory(self) -> "OftPolicy":
        """Return the policy with its weights read, if they were left on disk."""
        if self.on_disk is None:
            return self
        return replace(self, module=filled_module(self.module.arch, self.on_disk), on_disk=None)

    def _executed_actions(self, output: Tensor) -> Tensor:
        """The head's output [B, H, D] or logits [B, H, D, vocab] -> executed actions [B, H, D]."""
        if self.config.head == "l1":
            return output
        # Any token of the vocabulary may win; upstream clips it into the bins.
        index = output.argmax(dim=-1) - self._first_action_token()
        return self.token_centers[index.clip(0, len(self.token_centers) - 1)]

    def _first_action_token(self) -> int:
        """Lowest id of an action token; the vocabulary's last ids stand for the lowest actions."""
        arch = self.module.arch
        return arch.llama.vocab_size - arch.vocab_padding - len(self.token_centers)

    def _probe_inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        arch = self.module.arch
        side = self.processor.spec.image.size
        device = self.module.projector.fc1.weight.device
        pixels = torch.zeros(1, 6 * len(self.config.cameras), side, side, device=device)
        ids = torch.tensor([[self.config.bos_token_id, self.config.suffix_token_id]], device=device)
        state = torch.zeros(1, arch.state_dim, device=device) if arch.state_dim else None
        return pixels, ids, state


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
    config = config or load_config(_existing(checkpoint))
    if config.head == "tokens" and not resident:
        raise CheckpointError(
            f"{checkpoint}: a policy with a token head must be loaded whole; the table of its "
            "bins is not among the weights that stay on disk"
        )
    return _load(_existing(checkpoint), unnorm_key, config, resident)


def check_oft_checkpoint(checkpoint: Path, unnorm_key: str | None, config: OftConfig) -> None:
    """Refuse what `load_oft_policy` would refuse, in the memory of one tensor.

    Raises:
        CheckpointError, StatisticsError: as `load_oft_policy`.
    """
    policy = _load(_existing(checkpoint), unnorm_key, config, resident=False)
    if policy.on_disk is not None:
        policy.on_disk.require_finite()


def _existing(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder not found: {checkpoint}")
    return checkpoint


def _load(checkpoint: Path, unnorm_key: str | None, config: OftConfig, resident: bool) -> OftPolicy:
    weights = open_weights(checkpoint, config)
    module = (load_module if resident else empty_module)(checkpoint, config, weights)
    image = _image_spec(checkpoint, module)
    statistics = load_statistics(
        checkpoint / _STATISTICS,
        unnorm_key,
        config.normalization,
        config.action_dim,
        config.state_dim,
    )
    token_centers = _token_centers(checkpoint, config)
    spec = _processor_spec(config, image, token_centers)
    tokenizer_path = checkpoint / _TOKENIZER
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.is_file() else None
    return OftPolicy(
        module,
        Processor(spec, statistics, tokenizer),
        config,
        policy_digest(checkpoint, config, statistics.key),
        token_centers,
        None if resident else weights,
    )


def _image_spec(checkpoint: Path, module: OftModule) -> ImageSpec:
    image = load_image_spec(checkpoint / "preprocessor_config.json")
    if image.size != module.arch.dino.image_size:
        raise CheckpointError(
            f"{checkpoint}: preprocessor makes {image.size} pixel images, "
            f"the towers take {module.arch.dino.image_size}"
        )
    return image


def _processor_spec(config: OftConfig, image: ImageSpec, token_centers: Tensor) -> ProcessorSpec:
    return ProcessorSpec(
        cameras=config.cameras,
        image=image,
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        bos_token_id=config.bos_token_id,
        suffix_token_id=config.suffix_token_id,
        training_image_size=config.training_image_size,
        center_crop=config.center_crop,
        # The two highest token ids share the lowest bin.
        action_bins=max(len(token_centers) - 1, 0),
    )


def policy_digest(checkpoint: Path, config: OftConfig, unnorm_key: str) -> str:
    """Return the SHA-256 over all that decides actions: files read, configuration, statistics."""
    names = [p.name for p in checkpoint.glob("model*.safetensors*")]
    names += ["config.json", "preprocessor_config.json", _STATISTICS, _TOKENIZER]
    names += [part_file(checkpoint, part).name for part in part_names(config)]
    files = sha256_tree(checkpoint, [n for n in names if (checkpoint / n).is_file()])
    identity = {"files": files, "config": asdict(config), "unnorm_key": unnorm_key}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _token_centers(checkpoint: Path, config: OftConfig) -> Tensor:
    """Bin centres by token id (openvla `ActionTokenizer`): the top id is the lowest action."""
    if config.head == "l1":
        return torch.zeros(0)
    raw = read_json(checkpoint / "config.json", "model configuration", FOREIGN)
    bins = int(raw["n_action_bins"])
    edges = np.linspace(-1, 1, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    index = np.clip(np.arange(bins)[::-1], 0, bins - 2)
    return torch.from_numpy(centers[index].astype(np.float32))
