"""What a new, untrained checkpoint of any family and size is made of, beside its weights."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.description import (
    llama_config,
    upstream_config,
    vision_configs,
)
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.loading import STATISTICS
from qvla_export.policies.prismatic.pretrained import TowerChoice
from qvla_export.shared.artifacts import new_folder, write_json
from qvla_export.shared.policy_interface import save_policy_config

_SPECIAL = ("<unk>", "<s>", "</s>", "<empty>", "<pad>")
BOS_ID, STOP_ID, SUFFIX_ID, PAD_ID = 1, 2, 3, 4
_PADDING = 64
# RGB mean and standard deviation of the DINOv2 (ImageNet) and the SigLIP input.
IMAGE_MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
IMAGE_STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class NetworkSize:
    """Widths and depths of a network; every width a multiple of 64 quantizes without padding."""

    # Side of the square image and of a patch, in pixels.
    image_size: int = 84
    patch_size: int = 14
    # DINOv2 and SigLIP: width and blocks; the last block of each is never used by the policy.
    vision_dim: int = 128
    vision_depth: int = 5
    # Decoder.
    hidden_dim: int = 256
    mlp_dim: int = 512
    depth: int = 4
    heads: int = 4
    # Tokenizer entries.
    vocab_size: int = 448
    # The DINOv2 tower, in place of one of the width and depth above; None trains one.
    pretrained: TowerChoice | None = None


def new_shapes(size: NetworkSize, vision_heads: tuple[int, int]) -> PrismaticArchitecture:
    """Return the shapes of a network of some size; its vocabulary is filled up."""
    width, depth, registers = size.vision_dim, size.vision_depth, 4
    if choice := size.pretrained:
        width, depth, registers = choice.tower.width, choice.blocks, 0
    dino, siglip = vision_configs(
        dims=(width, size.vision_dim),
        depths=(depth, size.vision_depth),
        heads=vision_heads,
        mlp_dims=(4 * width, 4 * size.vision_dim),
        patch=size.patch_size,
        image_sizes=(size.image_size, size.image_size),
        registers=registers,
    )
    llama = llama_config(
        {
            "hidden_size": size.hidden_dim,
            "intermediate_size": size.mlp_dim,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "vocab_size": size.vocab_size + _PADDING,
            "pad_token_id": PAD_ID,
        }
    )
    return PrismaticArchitecture(dino=dino, siglip=siglip, llama=llama, vocab_padding=_PADDING)


def train_tokenizer(
    prompts: Iterable[str],
    vocab_size: int,
    special: Sequence[str] = _SPECIAL,
    first: str = _SPECIAL[BOS_ID],
) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the prompts that begins every text with BOS.

    Args:
        prompts: what it is trained on.
        vocab_size: entries at most.
        special: tokens with the lowest ids, "<unk>" among them.
        first: the one that is BOS.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, special.index(first))]
    )
    return tokenizer


def save_checkpoint(
    path: Path,
    save_weights: Callable[[Path], None],
    arch: PrismaticArchitecture,
    config: PrismaticConfig,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
) -> None:
    """Write a whole checkpoint folder in the published layout, atomically.

    Args:
        path: the folder to create or replace.
        save_weights: writes the network's weights into an existing folder.
        arch: the network.
        config: written as `qvla_policy.json`.
        tokenizer: written as `tokenizer.json`.
        statistics: data set name -> {"action": {...}, "proprio": {...}}.
    """
    with new_folder(path) as folder:
        save_weights(folder)
        save_description(folder, arch, tokenizer, statistics)
        save_policy_config(config, folder)


def save_token_body(
    body: Mapping[str, Tensor], arch: PrismaticArchitecture, first: int, folder: Path
) -> None:
    """Write the weights of a policy that decodes tokens as upstream does, in bf16.

    Rows of the output layer that the network does not have are zeros, as no token of theirs is
    ever chosen.

    Args:
        body: our parameter name -> tensor, without parts that have a file of their own.
        arch: the network.
        first: lowest id of a token that it chooses among.
        folder: an existing one.
    """
    head = body[HEAD]
    whole = torch.zeros(int(arch.llama.vocab_size), head.shape[1])
    whole[first : first + len(head)] = head
    upstream = {**to_upstream({k: v for k, v in body.items() if k != HEAD}), HEAD: whole}
    stored = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in upstream.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def save_description(
    folder: Path,
    arch: PrismaticArchitecture,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
) -> None:
    """Write everything but weights and `qvla_policy.json` into an existing folder.

    Args:
        folder: where.
        arch: the network.
        tokenizer: written as `tokenizer.json`.
        statistics: data set name -> {"action": {...}, "proprio": {...}}.
    """
    (folder / "config.json").write_text(upstream_config(arch))
    (folder / "preprocessor_config.json").write_text(_preprocessor(arch))
    write_json(folder / STATISTICS, statistics)
    tokenizer.save(str(folder / "tokenizer.json"))


def _preprocessor(arch: PrismaticArchitecture) -> str:
    side = arch.dino.image_size
    means, stds = [list(mean) for mean in IMAGE_MEANS], [list(std) for std in IMAGE_STDS]
    return json.dumps(
        {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, side, side]] * 2,
            "interpolations": ["bicubic"] * 2,
            "means": means,
            "stds": stds,
            "tvf_normalize_params": [
                {"inplace": False, "mean": mean, "std": std}
                for mean, std in zip(means, stds, strict=True)
            ],
            "use_fused_vision_backbone": True,
        },
        indent=1,
    )
