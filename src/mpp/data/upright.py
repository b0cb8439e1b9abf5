"""Decoded frames as they are meant to be seen: turned and mirrored, with square pixels, 8-bit RGB of full range."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image

_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67


class _Turn(NamedTuple):
    method: Image.Transpose | None
    sideways: bool


_TURNS = {  # by the signs of a display matrix: x' = a x + c y, y' = b x + d y, where y points down
    (1, 0, 0, 1): _Turn(None, sideways=False),
    (0, 1, -1, 0): _Turn(Image.Transpose.ROTATE_270, sideways=True),  # Pillow turns the other way round
    (-1, 0, 0, -1): _Turn(Image.Transpose.ROTATE_180, sideways=False),
    (0, -1, 1, 0): _Turn(Image.Transpose.ROTATE_90, sideways=True),
    (-1, 0, 0, 1): _Turn(Image.Transpose.FLIP_LEFT_RIGHT, sideways=False),
    (1, 0, 0, -1): _Turn(Image.Transpose.FLIP_TOP_BOTTOM, sideways=False),
    (0, 1, 1, 0): _Turn(Image.Transpose.TRANSPOSE, sideways=True),
    (0, -1, -1, 0): _Turn(Image.Transpose.TRANSVERSE, sideways=True),
}


def check_shown(frame: VideoFrame) -> None:
    """Refuse frames that would not look as they are meant to.

    Raises:
        ValueError: The frame is interlaced or has high dynamic range.
    """
    if frame.interlaced_frame:
        raise ValueError(
            "is interlaced, two moments in alternate lines; deinterlace the video, for example with "
            "`ffmpeg -i IN -vf bwdif=send_frame OUT`"
        )
    if frame.color_trc in _HDR:
        raise ValueError(
            f"has high dynamic range ({_HDR[frame.color_trc]}), which would look washed out; bring the video to "
            "standard range by tone mapping"
        )


def upright_size(frame: VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height in pixels at which a frame is seen.

    Args:
        frame: Decoded.
        pixel_aspect: Width over height of its pixels.

    Raises:
        ValueError: It is turned by an angle that is no multiple of 90 degrees.
    """
    width, height = _square((frame.width, frame.height), pixel_aspect)
    return (height, width) if _turn(frame).sideways else (width, height)


def picture(frame: VideoFrame, pixel_aspect: Fraction) -> Image.Image:
    """A frame as it is seen, RGB, by the matrix and range it names (BT.601 and limited where it names none).

    Pixels under a transparent alpha keep their colour: nothing is composited.

    Raises:
        ValueError: As above.
    """
    return _upright(frame.to_image(interpolation=_EXACT, dst_color_range=ColorRange.JPEG), frame, pixel_aspect)


def alpha(frame: VideoFrame, pixel_aspect: Fraction) -> np.ndarray | None:
    """A frame's alpha as it is seen, `(height, width)` float32 in [0, 1]; None where it has none.

    Raises:
        ValueError: As above.
    """
    if not any(component.is_alpha for component in frame.format.components):
        return None
    plane = np.ascontiguousarray(frame.to_ndarray(format="rgba", dst_color_range=ColorRange.JPEG)[..., 3])
    return np.asarray(_upright(Image.fromarray(plane), frame, pixel_aspect), dtype=np.float32) / 255


def _upright(image: Image.Image, frame: VideoFrame, pixel_aspect: Fraction) -> Image.Image:
    size, turn = _square(image.size, pixel_aspect), _turn(frame)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image if turn.method is None else image.transpose(turn.method)


def _square(size: tuple[int, int], pixel_aspect: Fraction) -> tuple[int, int]:
    """Size with square pixels: one side grows, so that nothing is lost."""
    width, height = size
    return (round(width * pixel_aspect), height) if pixel_aspect > 1 else (width, round(height / pixel_aspect))


def _turn(frame: VideoFrame) -> _Turn:
    matrices = [np.frombuffer(data, np.int32) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return _TURNS[1, 0, 0, 1]
    a, b, _, c, d = (int(value) for value in matrices[0][:5])
    largest = max(abs(a), abs(b), abs(c), abs(d), 1)
    signs = round(a / largest), round(b / largest), round(c / largest), round(d / largest)
    off = max(abs(value / largest - sign) for value, sign in zip((a, b, c, d), signs, strict=True))
    if signs not in _TURNS or off > 0.01:
        raise ValueError(f"is to be turned by an odd angle (matrix {a} {b} {c} {d}); re-encode the video upright")
    return _TURNS[signs]
