"""Where a network can be smoothed, and a smoothed checkpoint of it."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.keys import from_upstream, to_upstream
from qvla_export.policies.smoothing import Migration
from qvla_export.shared.artifacts import new_folder, read_json, write_json
from qvla_export.shared.errors import CheckpointError

_INDEX = "model.safetensors.index.json"


def find_migrations(arch: PrismaticArchitecture) -> tuple[Migration, ...]:
    """Return the inputs whose factors something linear before them can take over.

    Norms into attention and MLP; value rows into the output projection; the up projection's rows,
    which are a factor of each product, into the down projection. What comes out of a GELU (fc2)
    cannot be scaled before it.
    """
    return tuple(_decoder(arch)) + tuple(_towers(arch))


def _decoder(arch: PrismaticArchitecture) -> Iterator[Migration]:
    llama = arch.llama
    for index in range(llama.num_hidden_layers):
        name = f"language_model.model.layers.{index}"
        projections = tuple(f"{name}.self_attn.{part}_proj" for part in "qkv")
        yield Migration(f"{name}.input_layernorm", projections)
        mlp = (f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        yield Migration(f"{name}.post_attention_layernorm", mlp)
        yield Migration(mlp[1], (f"{name}.mlp.down_proj",))
        # Where heads share their values, an element is not one row's.
        if llama.num_key_value_heads == llama.num_attention_heads:
            yield Migration(projections[2], (f"{name}.self_attn.o_proj",))


def _towers(arch: PrismaticArchitecture) -> Iterator[Migration]:
    dino = ("featurizer.encoder.layer", "norm", "attention", "o_proj")
    siglip = ("fused_featurizer.encoder.layers", "layer_norm", "self_attn", "out_proj")
    depths = {dino: arch.dino.num_hidden_layers, siglip: arch.siglip.num_hidden_layers}
    for (place, norm, attention, output), depth in depths.items():
        for index in range(depth):
            name = f"vision_backbone.{place}.{index}"
            projections = tuple(f"{name}.{attention}.{part}_proj" for part in "qkv")
            yield Migration(f"{name}.{norm}1", projections)
            yield Migration(f"{name}.{norm}2", (f"{name}.mlp.fc1",))
            yield Migration(projections[2], (f"{name}.{attention}.{output}",))


def write_smoothed(
    checkpoint: Path, output: Path, factors: Mapping[str, Tensor], keep_types: bool
) -> None:
    """Copy a checkpoint with some parameters multiplied, one file of weights at a time, atomically.

    Args:
        checkpoint: folder in the published layout.
        output: to write; an existing folder is replaced.
        factors: our parameter name -> what it is multiplied by, see `smoothed_tensors`.
        keep_types: store products in their tensors' own types; else in float32, so that factors
            which are no powers of two are not rounded.

    Raises:
        CheckpointError: a parameter lies in no file of weights, or the folders are the same.
    """
    if checkpoint.resolve() == output.resolve():
        raise CheckpointError(f"{output} is the checkpoint itself; name another folder")
    left = set(factors)
    with new_folder(output) as folder:
        weights = sorted(checkpoint.glob("model*.safetensors"))
        for path in sorted(p for p in checkpoint.iterdir() if p.is_file() and p not in weights):
            shutil.copyfile(path, folder / path.name)
        stored_bytes = 0
        for path in weights:
            tensors = load_file(path)
            for key in list(tensors):
                parts = from_upstream({key: tensors[key]})
                touched = {name: factors[name] for name in parts if name in factors}
                if touched:
                    left -= set(touched)
                    tensors[key] = _product(key, parts, touched, keep_types)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
            stored_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if left:
            raise CheckpointError(f"{checkpoint} does not hold {sorted(left)}; is it complete?")
        if (folder / _INDEX).is_file():
            index = read_json(folder / _INDEX, "shard index")
            index.setdefault("metadata", {})["total_size"] = stored_bytes
            write_json(folder / _INDEX, index)


def _product(
    key: str, parts: Mapping[str, Tensor], factors: Mapping[str, Tensor], keep_types: bool
) -> Tensor:
    """The stored tensor of parts, some of them multiplied."""
    products = {
        name: tensor.float() * factors[name] if name in factors else tensor.float()
        for name, tensor in parts.items()
    }
    if keep_types:
        products = {name: product.to(parts[name].dtype) for name, product in products.items()}
    return to_upstream(products)[key].contiguous()
