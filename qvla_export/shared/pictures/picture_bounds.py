"""What no camera's picture is like: refused by its size alone, before a pixel is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qvla_export.shared.errors import ArtifactError

if TYPE_CHECKING:
    from PIL import Image

# Twice a 4K frame; decoded, 50 MB.
MOST_PIXELS = 16_777_216
# JPEG's own limit is 65,535.
MOST_SIDE = 8192
# Resizing a strip to a square would enlarge it without end; panoramic cameras have 4.
MOST_RATIO = 8
# Side of a square that a policy takes; published ones take 224 to 896 pixels.
MOST_INPUT_SIDE = 2048


def picture_fault(width: int, height: int) -> str | None:
    """Return why no picture may have this size, with the rule and the remedy; None if it may."""
    size = f"got {width} x {height}"
    if min(width, height) < 1:
        return f"a picture has at least one pixel, {size}"
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        return (
            f"a picture may have {MOST_PIXELS:,} pixels and sides of {MOST_SIDE}, {size}; "
            "make it smaller"
        )
    if max(width, height) > MOST_RATIO * min(width, height):
        return f"the sides of a picture may be 1 to {MOST_RATIO}, {size}; cut it"
    return None


@contextmanager
def opened_picture(data: bytes, name: str, formats: tuple[str, ...]) -> "Iterator[Image.Image]":
    """Yield the picture of an image file's bytes, which is decoded where it is used.

    Args:
        data: the file.
        name: what the errors call it, as "an image in the dataset".
        formats: Pillow's names of what it may be; its other decoders are for documents.

    Raises:
        ArtifactError: it is no whole image of these formats, or no camera's; in the block, too.
    """
    from PIL import Image, UnidentifiedImageError

    # The second where warnings are errors.
    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if fault := picture_fault(image.width, image.height):
                raise ArtifactError(f"{name} is no camera's: {fault}")
            yield image
    except ArtifactError:
        raise
    except UnidentifiedImageError:  # which names an object in memory
        raise ArtifactError(f"{name} is damaged, or none of {', '.join(formats)}") from None
    except (OSError, SyntaxError, ValueError, *bombs) as error:
        raise ArtifactError(f"{name} is damaged: {error}") from None
