"""FiLM: the instruction scales and shifts what the vision towers see, block by block.

Source: openvla-oft `prismatic/models/film_vit_wrapper.py`. Between attention and MLP of every
block, hidden states become x (1 + gamma) + beta, linear maps of the prompt's mean embedding.
"""

import re

from torch import Tensor, nn

from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.prismatic.vision import Modulation, Tower

_TOWERS: dict[Tower, str] = {"dino": "featurizer", "siglip": "fused_featurizer"}
_LAYER = re.compile(r"^vision_backbone\.(\w+)\.blocks\.(\d+)\.(scale|shift)\.")
_BLOCK = re.compile(r"(\.blocks\.\d+)\.block\.")


class FilmLayer(nn.Module):
    """What the instruction does to one block of a tower."""

    def __init__(self, language_dim: int, vision_dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(language_dim, vision_dim)
        self.shift = nn.Linear(language_dim, vision_dim)

    def forward(self, hidden: Tensor, language: Tensor) -> Tensor:
        """Modulate [B, N, vision] by [B, language]."""
        gamma, beta = self.scale(language)[:, None], self.shift(language)[:, None]
        modulated: Tensor = hidden * (1 + gamma) + beta
        return modulated


class Film(nn.Module):
    """The layers of both towers."""

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__()
        width = int(arch.llama.hidden_size)
        for name, tower in (("featurizer", arch.dino), ("fused_featurizer", arch.siglip)):
            vision, depth = int(tower.hidden_size), int(tower.num_hidden_layers)
            self.add_module(name, nn.ModuleList(FilmLayer(width, vision) for _ in range(depth)))

    def modulation(self, language: Tensor, images: int) -> Modulation:
        """Return what the blocks do to hidden states of all images.

        Args:
            language: mean embedding of each prompt.  [B, language]
            images: of one observation; those of one stand together.
        """
        each = language.repeat_interleave(images, dim=0) if images > 1 else language

        def modulate(tower: Tower, block: int, hidden: Tensor) -> Tensor:
            layers = self.get_submodule(_TOWERS[tower])
            assert isinstance(layers, nn.ModuleList)
            modulated: Tensor = layers[block](hidden, each)
            return modulated

        return modulate


def film_key(key: str) -> str:
    """Return what a key of `vision_backbone--STEP_checkpoint.pt` is without the wrapped blocks.

    Keys of towers are then upstream's without FiLM, those of its layers our own.
    """
    if layer := _LAYER.match(key):
        return f"film.{layer[1]}.{layer[2]}.{key.removeprefix(layer[0][: -len(layer[3]) - 1])}"
    return _BLOCK.sub(r"\1.", key)
