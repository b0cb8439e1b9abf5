"""Opening and decoding picture files: whatever is wrong with one comes out as a ValueError that names it."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image

from mpp.data.places import Place, reaching, short

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow has others that start programs, such as EPS
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
_UPRIGHT = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TELLING = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG's texts that may say an orientation
_GREY_TOLERANCE = 32  # of 255: what lossy formats may do to the colours of a grey mask


class _RefusedError(ValueError):
    """What is said here of a file, as opposed to by its decoder."""


@contextmanager
def reading(path: Place, problem: str) -> Iterator[BinaryIO]:
    """An open picture file.

    Raises:
        ValueError: In place of whatever is raised inside: on damaged files the decoders raise nearly any exception.
    """
    with reaching(path):
        handle = path.open("rb")
    with handle:
        try:
            yield handle
        except _RefusedError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: {problem} ({short(error)})") from error


def open_picture(handle: BinaryIO, path: Place) -> Image.Image:
    """A picture of which only the head is read.

    Raises:
        ValueError: It is animated, or has several pages.
    """
    image = Image.open(handle, formats=_FORMATS)
    # the further pictures of a JPEG (MPO) are previews and depth maps of cameras
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _RefusedError(
            f"{path} holds {image.n_frames} pictures, and it is unclear which is meant; save one of them alone, or all "
            "of them as a video"
        )
    return image


def decode(handle: BinaryIO, path: Place) -> Image.Image:
    """A picture, whole and upright."""
    image = open_picture(handle, path)
    if image.format == "PNG":  # the only format with checksums, which decoding leaves out
        image.verify()
        handle.seek(0)
        image = open_picture(handle, path)
    kind = image.format
    drawn = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
    if image.tile and drawn < (whole := image.width * image.height):  # Pillow would leave the rest black
        raise _RefusedError(
            f"{path} is {image.width}x{image.height} and holds {drawn} of its {whole} pixels; it is damaged, or part "
            "of an animation: save it again"
        )
    image.load()
    method = _UPRIGHT.get(orientation(image))
    if method is not None:
        image = image.transpose(method)
    image.format = kind
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's number of how a picture is turned; 1 is upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and gives the size that they have then
    if image.format == "PNG" and image.fp is not None and not _says_late(image):
        exif = Image.Image.getexif(image)  # PNG's own decodes the picture first, for what may come behind it
    else:
        exif = image.getexif()
    return exif.get(0x0112, 1)


def is_deep(image: Image.Image) -> bool:
    """Whether a picture is grey of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def with_alpha(image: Image.Image) -> tuple[Image.Image, np.ndarray | None]:
    """A picture, as RGBA if it has alpha and is not deep; and its alpha in [0, 1], float32, or None."""
    if is_deep(image):
        clear = image.info.get("transparency")  # the one grey that is transparent
        return image, None if clear is None else (np.asarray(image) != clear).astype(np.float32)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return image, np.asarray(image.getchannel("A"), dtype=np.float32) / 255
    return image, None


def grey(image: Image.Image, path: Place) -> np.ndarray:
    """Luminance in [0, 1], float32, from 8, 16 or 32 bits.

    Raises:
        ValueError: The values of 32 bits are out of range.
    """
    if not is_deep(image):
        return np.asarray(image.convert("RGB").convert("L"), dtype=np.float32) / 255
    values = np.asarray(image, dtype=np.float32)
    most = _white(image)
    if not (values.min() >= 0 and values.max() <= most):  # NaN is neither
        raise _RefusedError(
            f"{path} has values from {values.min():g} to {values.max():g}, and those of its kind go from 0 to {most}; "
            "save it with 8 or 16 bits"
        )
    return values / most


def check_grey(image: Image.Image, alpha: np.ndarray | None, path: Place) -> None:
    """Refuse a mask that means something else than its grey.

    Raises:
        ValueError: It has an alpha channel that is not opaque, has colours, or holds label numbers.
    """
    if alpha is not None and alpha.min() < 1:
        raise _RefusedError(
            f"{path}: this mask has a transparent alpha channel, so it is unclear whether its grey or its alpha "
            "is meant; save it as plain greyscale"
        )
    if not is_deep(image) and image.mode not in ("1", "L"):
        rgb = np.asarray(image.convert("RGB"), dtype=np.int16)
        if int((rgb.max(2) - rgb.min(2)).max()) > _GREY_TOLERANCE:
            raise _RefusedError(
                f"{path}: this mask has colours, as maps of labels have, and it is unclear which of them are to be "
                "learned; save it as plain greyscale: white is learned, black is kept"
            )
    if image.mode != "F" and image.format not in _LOSSY:
        white = _white(image)
        brightest = round(float(grey(image, path).max()) * white)
        if 0 < brightest <= (255 if is_deep(image) else 1):  # nobody draws that dark, and next to nothing would learn
            raise _RefusedError(
                f"{path}: the brightest value of this mask is {brightest} of {white}, as in maps of labels; save it so "
                f"that what is learned is white ({white})"
            )


def _white(image: Image.Image) -> int:
    if image.mode == "F":
        return 1
    return 65535 if is_deep(image) else 255


def _says_late(image: Image.Image) -> bool:
    """Whether a PNG has chunks behind its pixels that may say how it is turned."""
    image.fp.seek(image.tile[0].offset - 8)
    while len(head := image.fp.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        start = image.fp.tell()
        if name == b"eXIf":
            return True
        if name in (b"iTXt", b"zTXt", b"tEXt") and image.fp.read(min(length, 32)).split(b"\0")[0] in _TELLING:
            return True
        image.fp.seek(start + length + 4)
    return False
