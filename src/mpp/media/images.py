"""Image files and their masks as arrays: read whole, turned as their EXIF data says, or refused."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from PIL import Image, ImageOps

from mpp.media.colours import Profile, in_srgb, profile_kind
from mpp.media.mask import RawMask, grey, judged
from mpp.media.paths import MediaPath, reaching, short

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow has others that start programs, such as EPS
_LOSSY = ("JPEG", "MPO", "AVIF", "HEIF")
_HEIC = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"})  # brands, and those that AVIF has too
_HEIC_OR_AVIF = frozenset({b"mif1", b"msf1"})
_DEEP_CHANNELS = {"rgb48be": 3, "ya16be": 2, "rgba64be": 4}
_TELLING = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG's texts that may say an orientation


class _RefusedError(ValueError):
    """What is said here of a file, as opposed to by its decoder."""


@contextmanager
def reading(path: MediaPath, problem: str) -> Iterator[BinaryIO]:
    """An open image file.

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


def open_image(handle: BinaryIO, path: MediaPath) -> Image.Image:
    """An image of which only the head is read.

    Raises:
        ValueError: It is animated, or has several pages.
    """
    image = Image.open(handle, formats=(*_FORMATS, "HEIF") if _reads_heif(handle, path) else _FORMATS)
    # the further images of a JPEG (MPO) are previews and depth maps of cameras
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _RefusedError(
            f"{path} holds {image.n_frames} images, and it is unclear which is meant; save one of them alone, or all "
            "of them as a video"
        )
    return image


def _reads_heif(handle: BinaryIO, path: MediaPath) -> bool:
    """Whether a file may be HEIC, and the package for that is there.

    Raises:
        ValueError: It is HEIC, and the package is not there.
    """
    head = handle.read(12)
    handle.seek(0)
    if head[4:8] != b"ftyp" or head[8:] not in _HEIC | _HEIC_OR_AVIF:
        return False
    try:
        import pillow_heif  # noqa: PLC0415 (an extra)
    except ImportError as error:
        if head[8:] in _HEIC_OR_AVIF and path.suffix.lower() not in HEIF_SUFFIXES:
            return False
        raise _RefusedError(
            f"{path} is HEIC, for which the package pillow-heif is not installed; pip install 'mpp[heic]', or save it "
            "as PNG"
        ) from error
    pillow_heif.register_heif_opener()
    return True


def decode_image(handle: BinaryIO, path: MediaPath) -> Image.Image:
    """An image, whole and upright."""
    image = open_image(handle, path)
    if image.format == "PNG":  # the only format with checksums, which decoding leaves out
        image.verify()
        handle.seek(0)
        image = open_image(handle, path)
    drawn = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
    if image.tile and drawn < (whole := image.width * image.height):  # Pillow would leave the rest black
        raise _RefusedError(
            f"{path} is {image.width}x{image.height} and holds {drawn} of its {whole} pixels; it is damaged, or part "
            "of an animation: save it again"
        )
    image.load()
    image.getexif()  # is kept, so what stands here is needed no more, and Pillow need not write it anew
    image.info.pop("exif", None)
    image.info.pop("Raw profile type exif", None)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's number of how an image is turned; 1 is upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and gives the size that they have then
    if image.format == "PNG" and image.fp is not None and not _says_late(image):
        exif = Image.Image.getexif(image)  # PNG's own decodes the image first, for what may come behind it
    else:
        exif = image.getexif()
    return exif.get(0x0112, 1)


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def with_alpha(image: Image.Image) -> tuple[Image.Image, np.ndarray | None]:
    """An image, as RGBA if it has alpha and is not deep; and its alpha in [0, 1], float32, or None."""
    if is_deep(image):
        clear = image.info.get("transparency")  # the one grey that is transparent
        return image, None if clear is None else (np.asarray(image) != clear).astype(np.float32)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return image, np.asarray(image.getchannel("A"), dtype=np.float32) / 255
    return image, None


def read_deep(handle: BinaryIO, path: MediaPath) -> np.ndarray | None:
    """A PNG of 16 bits with alpha or colours, which Pillow cuts to 8 bits; None for all other files.

    Returns:
        `(height, width, channels)` uint16, upright: grey and alpha, RGB, or RGBA.
    """
    handle.seek(0)
    head = handle.read(26)
    handle.seek(0)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[24] != 16 or head[25] not in (2, 4, 6):
        return None
    turn = orientation(open_image(handle, path))
    handle.seek(0)
    with av.open(handle) as container:
        frame = next(iter(container.decode(video=0)))
    channels = _DEEP_CHANNELS[frame.format.name]
    rows = np.frombuffer(frame.planes[0], ">u2").reshape(frame.height, -1)[:, : frame.width * channels]
    planes = rows.reshape(frame.height, frame.width, channels).astype(np.uint16)
    return np.stack([_oriented(plane, turn) for plane in np.moveaxis(planes, 2, 0)], axis=-1)


def _oriented(plane: np.ndarray, turn: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(plane))
    image.getexif()[0x0112] = turn
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(image)


def read_raw_mask(path: MediaPath) -> RawMask:
    """A mask file as it is, at its full depth; `mpp.media.mask` says what it means.

    Raises:
        ValueError: It is no readable image, is truncated or damaged, or holds several images.
    """
    with reading(path, "not a readable mask, or truncated") as handle:
        image = decode_image(handle, path)
        lossy = _is_lossy(image, handle)
        deep = read_deep(handle, path)
        if deep is not None:
            alpha = (deep[..., -1] / 65535).astype(np.float32) if deep.shape[2] in (2, 4) else None
            colours = deep[..., 0] if deep.shape[2] == 2 else np.moveaxis(deep[..., :3], 2, 0)
            return RawMask(path, colours, 65535, alpha, lossy)
        image, alpha = with_alpha(image)
        grey = is_deep(image) or image.mode == "L"
        colours = np.asarray(image) if grey else np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
        return RawMask(path, colours, white_of(image), alpha, lossy)


def white_of(image: Image.Image) -> int:
    """The number that means 1 in an image."""
    if image.mode == "F":
        return 1
    return 65535 if is_deep(image) else 255


def _is_lossy(image: Image.Image, handle: BinaryIO) -> bool:
    """Whether an image's format changes numbers."""
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "webp")
    if image.format != "WEBP":
        return image.format in _LOSSY
    path, name = 12, b""
    while name not in (b"VP8 ", b"VP8L") and (handle.seek(path), head := handle.read(8))[1]:
        name, path = head[:4], path + 8 + -(-int.from_bytes(head[4:], "little") // 2) * 2
    return name != b"VP8L"


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


HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
SUFFIXES = HEIF_SUFFIXES | {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"
}  # fmt: skip
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})


@dataclass(frozen=True)
class DecodedImage:
    """An image upright as its EXIF orientation says.

    Attributes:
        rgb: 8-bit RGB. Pixels under a transparent alpha keep their colour: nothing is composited.
        alpha: `(height, width)` float32 in [0, 1], or None where the file has no alpha.
    """

    rgb: Image.Image
    alpha: np.ndarray | None


def is_video(path: MediaPath) -> bool:
    """Whether a path is a clip: a video by its suffix, or a folder of frames."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES or (suffix not in SUFFIXES and path.is_dir())


@dataclass(frozen=True)
class ImageHead:
    """What an image says before it is decoded.

    Attributes:
        size: Width and height of the upright image.
        profile: What becomes of its colour profile where it is read with `srgb`.
    """

    size: tuple[int, int]
    profile: Profile


def image_head(path: MediaPath) -> ImageHead:
    """Look at an image without decoding it.

    Raises:
        ValueError: The file is no readable image, or holds several.
    """
    with reading(path, "not a readable image") as handle:
        image = open_image(handle, path)
        turned = orientation(image) in (5, 6, 7, 8)
        size = (image.height, image.width) if turned else (image.width, image.height)
        return ImageHead(size, profile_kind(image))


def image_size(path: MediaPath) -> tuple[int, int]:
    """Width and height of the upright image; as `image_head`."""
    return image_head(path).size


def read_image(path: MediaPath, *, srgb: bool = False) -> DecodedImage:
    """Decode an image whole.

    Args:
        path: The file.
        srgb: Colours as a viewer shows them, see `mpp.media.colours`; else those of the file. Alpha is the file's.

    Raises:
        ValueError: The file is no readable image, is truncated or damaged, holds several images, or numbers out of
            range.
    """
    with reading(path, "not a readable image, or truncated") as handle:
        decoded = decode_image(handle, path)
        image, alpha = with_alpha(decoded)
        deep = read_deep(handle, path)
    if is_deep(image):
        values = grey(np.asarray(image), white_of(image), path)
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    elif alpha is not None:
        if deep is not None and deep.shape[2] in (2, 4):
            alpha = (deep[..., -1] / 65535).astype(np.float32)
        image = Image.merge("RGB", image.split()[:3])
    return DecodedImage(in_srgb(image, decoded) if srgb else image.convert("RGB"), alpha)


def read_mask(path: MediaPath) -> np.ndarray:
    """Decode a mask to `(height, width)` float32 in [0, 1]; 1 = learn.

    Raises:
        ValueError: The file is no readable image, is truncated or damaged, holds several images, or is no mask by
            the rule in `mpp.media.mask`.
    """
    return next(judged([read_raw_mask(path)])).values
