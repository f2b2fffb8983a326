"""Changes to a copied checkpoint folder, as cases of what must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from openvla_cases import stored_weights
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
Change = Callable[[Path], None]


def changed(change: Callable[[Weights], object]) -> Change:
    """Change the weights of model.safetensors."""

    def apply(folder: Path) -> None:
        weights = stored_weights(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def configured(value: object, *path: str, file: str = "config.json") -> Change:
    """Set a value of a JSON file, at the end of a path of fields."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        node = document
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        (folder / file).write_text(json.dumps(document))

    return apply
