"""PNG bytes to pixels and back."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.errors import ArtifactError


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Compress an RGB picture [h, w, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Return the RGB picture of an image file's bytes.  uint8 [h, w, 3]

    Raises:
        ArtifactError: the bytes are not a whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ArtifactError(f"an image in the dataset is damaged: {error}") from None
