"""PNG bytes to pixels and back."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.pictures.picture_bounds import opened_picture, picture_fault

# Modes of more than 8 bits a channel, which `convert` would clip to white.
_DEEP = ("I", "F")
# Other decoders of Pillow are for documents, and some start programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_JPEG = b"\xff\xd8"
# A PNG's bits a channel stand here; Pillow drops the lower ones of colours, and of grey with alpha.
_PNG, _PNG_BITS = b"\x89PNG\r\n\x1a\n", 24


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Compress an RGB picture [h, w, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Return the RGB picture of an image file's bytes.  uint8 [h, w, 3]

    Raises:
        ArtifactError: the bytes are not a whole image, have more than 8 bits a channel or one, or
            pixels through which something else would show.
    """
    with opened_picture(data, "an image in the dataset", _FORMATS) as image:
        deep = data.startswith(_PNG) and data[_PNG_BITS] > 8
        if deep or image.mode.startswith(_DEEP):
            bits = "of 16 bits a channel" if deep else f"of mode {image.mode}"
            raise ArtifactError(
                f"an image in the dataset is no RGB picture but {bits}, as 16-bit depth is; "
                "name only colour cameras with --camera NAME=COLUMN"
            )
        if image.mode == "1" or _shows_through(image):
            what = "a mask of one bit a pixel" if image.mode == "1" else "one of transparent pixels"
            raise ArtifactError(
                f"an image in the dataset is no RGB picture but {what}; name only colour cameras "
                "with --camera NAME=COLUMN"
            )
        # A file may say that its rows are to be turned, which the datasets library follows, too.
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def decode_as_tensorflow(data: bytes) -> NDArray[np.uint8]:
    """Return the RGB picture that TensorFlow decodes, whose JPEG steps are the fast integer ones.

    Policies that were trained from RLDS saw these pixels; Pillow's differ by a few levels.

    Raises:
        ArtifactError: as `decode_png`.
    """
    if not data.startswith(_JPEG):
        return decode_png(data)
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        require_picture(width, height)
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
    except ValueError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"an image in the dataset is damaged: {error}") from None
    return decoded


def _shows_through(image: Image.Image) -> bool:
    """Whether a picture has pixels whose colour is not all that is seen of them."""
    if not image.has_transparency_data:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < 255)


def require_picture(width: int, height: int) -> None:
    """Refuse what is larger, or of longer sides, than a camera's picture.

    Raises:
        ArtifactError: it is.
    """
    if fault := picture_fault(width, height):
        raise ArtifactError(f"an image in the dataset is no camera's: {fault}")
