"""One frame of a mask or image, as the tools take and give it, at the full depth of its file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mpp.media.geometry import check_aspect
from mpp.media.images import decode_image, is_deep, open_image, read_deep, read_image, read_raw_mask, reading
from mpp.media.mask import Mask, grey


@dataclass(frozen=True)
class Pixels:
    """Colours to write: RGB or RGBA.

    Attributes:
        array: `(height, width, 3 or 4)`, uint8 or uint16.
        icc: Colour profile, for image files.
    """

    array: np.ndarray
    icc: bytes | None = None


def read_indices(path: Path) -> np.ndarray:
    """A label map's numbers: the indices of its palette, `(height, width)` uint8.

    Raises:
        ValueError: It is unreadable, or has no palette.
    """
    with reading(path, "not a readable mask, or truncated") as handle:
        image = decode_image(handle, path)
    if image.mode != "P":
        raise ValueError(f"{path} has no palette, so it has no indices; set tool.values=grey")
    return np.asarray(image)


def read_alpha(path: Path) -> Mask | None:
    """An image's alpha channel, 16 bits deep where the file is; None where it has none.

    Raises:
        ValueError: As `read_image`.
    """
    alpha, deep = read_image(path).alpha, _read_deep(path)
    return None if alpha is None else Mask(alpha, 8 if deep is None else 16)


def read_rgb(path: Path) -> Pixels:
    """An image's colours without its alpha, exactly as the file has them, 8 or 16 bits deep.

    Raises:
        ValueError: As `read_image`.
    """
    image, deep, header = read_image(path), _read_deep(path), _header(path)
    icc = header.info.get("icc_profile") if header.mode in ("RGB", "RGBA", "P") else None  # others are of other colours
    if deep is not None and deep.shape[2] >= 3:
        return Pixels(deep[..., :3], icc)
    if is_deep(header):
        raw = read_raw_mask(path)
        levels = Mask(grey(raw.colours, raw.white, path), 16).levels()
        return Pixels(np.repeat(levels[..., None], 3, axis=2))
    return Pixels(np.asarray(image.rgb), icc)


def fit_mask(mask: Mask, size: tuple[int, int], what: str, *, resize: bool) -> Mask:
    """A mask at the given width and height.

    Args:
        mask: The mask.
        size: Width and height that it must have.
        what: Names of both files, for the error.
        resize: Bring it to that size (bilinear, with an area filter where it shrinks) if its shape is the same.

    Raises:
        ValueError: Another size without `resize`, or another aspect ratio.
    """
    if mask.size == size:
        return mask
    if not resize:
        raise ValueError(
            f"{what}: sizes differ, {mask.size[0]}x{mask.size[1]} and {size[0]}x{size[1]}; export them alike, or set "
            "tool.resize=true"
        )
    check_aspect(mask.size, size, what)
    return Mask(enlarge(mask.values, size), mask.bits)


def enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring `(height, width)` float32 to another width and height, bilinear, with an area filter where it shrinks."""
    image = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).clip(0, 1)


def _header(path: Path) -> Image.Image:
    with reading(path, "not a readable image") as handle:
        return open_image(handle, path)


def _read_deep(path: Path) -> np.ndarray | None:
    with reading(path, "not a readable image") as handle:
        return read_deep(handle, path)
