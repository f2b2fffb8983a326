"""PNG bytes to pixels and back."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.errors import ArtifactError

# Modes of more than 8 bits a channel, which `convert` would clip to white.
_DEEP = ("I", "F")


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Compress an RGB picture [h, w, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Return the RGB picture of an image file's bytes.  uint8 [h, w, 3]

    Raises:
        ArtifactError: the bytes are not a whole image, or have more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(_DEEP):
                raise ArtifactError(
                    f"an image in the dataset is no RGB picture but of mode {image.mode}, as "
                    "16-bit depth is; name only colour cameras with --camera NAME=COLUMN"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"an image in the dataset is damaged: {error}") from None
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"an image in the dataset is damaged: {error}") from None
