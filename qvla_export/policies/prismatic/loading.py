"""What is read of a checkpoint folder beside its weights: images, bins, statistics, digest."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from qvla_export.policies.adapters import (
    adapter_file,
    body_folder,
    model_config,
    settings_file,
)
from qvla_export.policies.prismatic.architecture import TOWERS, PrismaticArchitecture
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.files import body_files, merges_on_load
from qvla_export.policies.prismatic.pretrained import PRETRAINED
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.images import load_image_spec
from qvla_export.shared.inputs.history import HistorySpec
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.json_documents import FOREIGN, read_json
from qvla_export.shared.normalization import load_statistics
from qvla_export.shared.processor import Processor, ProcessorSpec, load_tokenizer

STATISTICS = "dataset_statistics.json"
_TOKENIZER = "tokenizer.json"
_PREPROCESSOR = "preprocessor_config.json"


def require_folder(checkpoint: Path) -> Path:
    """Return a checkpoint folder.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder not found: {checkpoint}")
    return checkpoint


def load_processor(
    checkpoint: Path,
    config: PrismaticConfig,
    arch: PrismaticArchitecture,
    unnorm_key: str | None,
    token_centers: Tensor,
    noise: NoiseSpec | None = None,
    history: HistorySpec | None = None,
) -> Processor:
    """Read images' preprocessing, statistics and tokenizer.

    Args:
        checkpoint: the folder.
        config: cameras, chunk, dimensions.
        arch: the network, which must take the images that the folder says it makes.
        unnorm_key: data set whose statistics to use; may be None where there is one.
        token_centers: bins of the action tokens, from `load_token_centers`; empty without tokens.
        noise: what the policy begins at, where it does.
        history: what the prompt repeats of the step before, where it does.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    image = load_image_spec(checkpoint / _PREPROCESSOR)
    if image.size != arch.dino.image_size:
        raise CheckpointError(
            f"{checkpoint}: preprocessor makes {image.size} pixel images, "
            f"the towers take {arch.dino.image_size}"
        )
    # With two cameras, pixels for one tower each would pass as one camera's for both.
    if len(image.means) != TOWERS:
        raise CheckpointError(
            f"{checkpoint / _PREPROCESSOR} makes pixels for {len(image.means)} towers, the network "
            f"has {TOWERS}: DINOv2 and SigLIP need tvf_normalize_params each"
        )
    statistics = load_statistics(
        checkpoint / STATISTICS,
        unnorm_key,
        config.normalization,
        config.action_dim,
        config.state_dim,
    )
    spec = ProcessorSpec(
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
        noise=noise,
        history=history,
    )
    path = checkpoint / _TOKENIZER
    tokenizer = load_tokenizer(path) if path.is_file() else None
    _require_known_tokens(checkpoint, config, arch, tokenizer, len(token_centers))
    return Processor(spec, statistics, tokenizer)


def _require_known_tokens(
    checkpoint: Path,
    config: PrismaticConfig,
    arch: PrismaticArchitecture,
    tokenizer: Tokenizer | None,
    bins: int,
) -> None:
    """Refuse tokens that the network has no embedding for.

    Raises:
        CheckpointError: naming whose they are.
    """
    rows = int(arch.llama.vocab_size)
    ids = {
        f"{name} of the policy's configuration": value
        for name, value in vars(config).items()
        if name.endswith("_token_id")
    }
    if tokenizer is not None:
        ids["the highest id of tokenizer.json"] = max(tokenizer.get_vocab().values(), default=0)
    for what, value in ids.items():
        if value >= rows:
            raise CheckpointError(
                f"{checkpoint}: {what} is {value}, the vocabulary of the weights has {rows} "
                "tokens; bring the files of one checkpoint"
            )
    if bins + arch.vocab_padding > rows:
        raise CheckpointError(
            f"{checkpoint}/config.json: {bins} action tokens and a padding of "
            f"{arch.vocab_padding} do not fit into a vocabulary of {rows}"
        )


def checkpoint_digest(
    checkpoint: Path, config: PrismaticConfig, unnorm_key: str, head_files: Iterable[str] = ()
) -> str:
    """Return the SHA-256 over all that decides actions: files read, configuration, statistics."""
    names = [p.name for p in checkpoint.glob("model*.safetensors*")]
    names += ["config.json", _PREPROCESSOR, STATISTICS, _TOKENIZER, PRETRAINED, *head_files]
    files = sha256_tree(checkpoint, [n for n in names if (checkpoint / n).is_file()])
    identity = {"files": files, "config": asdict(config), "unnorm_key": unnorm_key}
    if adapter := adapter_file(checkpoint):
        base = body_folder(checkpoint)
        bodies = [path.name for path in (*body_files(checkpoint), model_config(checkpoint))]
        identity["base"] = sha256_tree(base, [n for n in bodies if (base / n).is_file()])
        identity["adapter"] = sha256_tree(adapter.parent, [adapter.name, "adapter_config.json"])
    elif (said := settings_file(checkpoint)) and merges_on_load(checkpoint):
        identity["adapter"] = sha256_tree(said.parent, [said.name])
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load_token_centers(checkpoint: Path) -> Tensor:
    """Return bin centres by token id (openvla `ActionTokenizer`): the top id is the lowest action.

    float32 [bins], the first of the vocabulary's last ids first.
    """
    raw = read_json(model_config(checkpoint), "model configuration", FOREIGN)
    bins = raw.get("n_action_bins")
    if type(bins) is not int or not 2 <= bins <= 4096:
        raise CheckpointError(
            f"{checkpoint}/config.json: n_action_bins must be a whole number of 2 to 4096, "
            f"got {bins!r}"
        )
    return token_centers(bins)


def token_centers(bins: int) -> Tensor:
    """Return the centres of so many action tokens' bins; see `load_token_centers`."""
    edges = np.linspace(-1, 1, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    index = np.clip(np.arange(bins)[::-1], 0, bins - 2)
    return torch.from_numpy(centers[index].astype(np.float32))
