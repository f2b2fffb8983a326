"""What a new, untrained checkpoint of any family and size is made of, beside its weights."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.description import (
    llama_config,
    upstream_config,
    vision_configs,
)
from qvla_export.policies.prismatic.loading import STATISTICS
from qvla_export.shared.artifacts import write_json

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


def new_shapes(size: NetworkSize, vision_heads: tuple[int, int]) -> PrismaticArchitecture:
    """Return the shapes of a network of some size; its vocabulary is filled up."""
    dino, siglip = vision_configs(
        dims=(size.vision_dim, size.vision_dim),
        depths=(size.vision_depth, size.vision_depth),
        heads=vision_heads,
        mlp_dims=(4 * size.vision_dim, 4 * size.vision_dim),
        patch=size.patch_size,
        image_sizes=(size.image_size, size.image_size),
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


def train_tokenizer(prompts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the prompts that begins every text with BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


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
