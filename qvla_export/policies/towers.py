"""The sizes of vision towers that `transformers` configures; ours are square."""

from typing import Protocol

Size = int | list[int] | tuple[int, int]


class TowerConfig(Protocol):
    """What is read of a tower's configuration: pixels of its images, and of their patches."""

    image_size: Size
    patch_size: Size


def tower_side(tower: TowerConfig) -> int:
    """Return the pixels of a side of the images that a tower takes."""
    return _side(tower.image_size)


def tower_grid(tower: TowerConfig) -> int:
    """Return how many patches stand along a side of such an image."""
    return _side(tower.image_size) // _side(tower.patch_size)


def _side(size: Size) -> int:
    assert isinstance(size, int), f"towers are square here, got {size}"
    return size
