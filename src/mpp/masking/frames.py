"""One frame of a mask or picture, as the tools take and give it, at the full depth of its file."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mpp.data.media import check_aspect, read_mask, read_picture
from mpp.data.picture_files import decode, grey, is_deep, open_picture, orientation, reading

_COLOURFUL = 32  # of 255: less may be what lossy formats do to greys
_DEEP = {"rgb48be": 3, "ya16be": 2, "rgba64be": 4}
_TURNS = {  # EXIF orientation to upright
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: np.rot90,
}


@dataclass(frozen=True)
class Mask:
    """A mask of one frame.

    Attributes:
        values: `(height, width)` float32 in [0, 1]; 1 = learn.
        bits: 8 or 16 per pixel, of its file.
    """

    values: np.ndarray
    bits: int = 8

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[1], self.values.shape[0]

    def levels(self) -> np.ndarray:
        """As whole numbers from 0 to 255 or 65535; exact for what was read from a file of that depth."""
        top = 2**self.bits - 1
        return np.rint(self.values.clip(0, 1).astype(np.float64) * top).astype(
            np.uint8 if self.bits == 8 else np.uint16
        )


@dataclass(frozen=True)
class Pixels:
    """Colours to write: RGB or RGBA.

    Attributes:
        array: `(height, width, 3 or 4)`, uint8 or uint16.
        icc: Colour profile, for picture files.
    """

    array: np.ndarray
    icc: bytes | None = None


def read_mask_frame(path: Path) -> Mask:
    """A mask file.

    Raises:
        ValueError: As `read_mask`.
    """
    values = read_mask(path)
    return Mask(values, 16 if is_deep(_header(path)) else 8)


def read_levels(path: Path, *, index: bool) -> tuple[np.ndarray, int]:
    """A label map's or mask's whole numbers `(height, width)`, and the bits per pixel of its file.

    Args:
        path: A picture file.
        index: Take the indices of its palette; else its greys.

    Raises:
        ValueError: It is unreadable, has no palette, or has colours where greys are asked for.
    """
    with reading(path, "not a readable mask, or truncated") as handle:
        image = decode(handle, path)
        values = grey(image, path)
    if index:
        if image.mode != "P":
            raise ValueError(f"{path} has no palette, so it has no indices; set tool.values=grey")
        return np.asarray(image), 8
    if not is_deep(image):
        rgb = np.asarray(image.convert("RGB"), dtype=np.int16)
        if int((rgb.max(2) - rgb.min(2)).max()) > _COLOURFUL:
            remedy = (
                "set tool.values=index if its palette's indices are labels"
                if image.mode == "P"
                else "use tool=from_color"
            )
            raise ValueError(f"{path} has colours instead of greys; {remedy}, or save it as greyscale")
    mask = Mask(values, 16 if is_deep(image) else 8)
    return mask.levels(), mask.bits


def read_alpha(path: Path) -> Mask | None:
    """A picture's alpha channel, 16 bits deep where the file is; None where it has none.

    Raises:
        ValueError: As `read_picture`.
    """
    picture, deep = read_picture(path), _read_deep(path)
    if deep is not None and deep.shape[2] in (2, 4):
        return Mask((deep[..., -1] / 65535).astype(np.float32), 16)
    return None if picture.alpha is None else Mask(picture.alpha)


def read_rgb(path: Path) -> Pixels:
    """A picture's colours without its alpha, exactly as the file has them, 8 or 16 bits deep.

    Raises:
        ValueError: As `read_picture`.
    """
    picture, deep, header = read_picture(path), _read_deep(path), _header(path)
    icc = header.info.get("icc_profile") if header.mode in ("RGB", "RGBA", "P") else None  # others are of other colours
    if deep is not None and deep.shape[2] >= 3:
        return Pixels(deep[..., :3], icc)
    if is_deep(header):
        levels, _ = read_levels(path, index=False)
        return Pixels(np.repeat(levels[..., None], 3, axis=2))
    return Pixels(np.asarray(picture.rgb), icc)


def fit(mask: Mask, size: tuple[int, int], what: str, *, resize: bool) -> Mask:
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
    with reading(path, "not a readable picture") as handle:
        return open_picture(handle, path)


def _read_deep(path: Path) -> np.ndarray | None:
    """`(height, width, channels)` uint16 of a PNG with 16 bits per colour, which Pillow cuts to 8; else None."""
    with path.open("rb") as handle:
        head = handle.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[24] != 16 or head[25] not in (2, 4, 6):
        return None
    with av.open(str(path)) as container:
        frame = next(iter(container.decode(video=0)))
    channels = _DEEP[frame.format.name]
    rows = np.frombuffer(frame.planes[0], ">u2").reshape(frame.height, -1)[:, : frame.width * channels]
    array = rows.reshape(frame.height, frame.width, channels).astype(np.uint16)
    with reading(path, "not a readable picture") as handle:
        turn = _TURNS.get(orientation(open_picture(handle, path)))
    return np.ascontiguousarray(turn(array)) if turn else array
