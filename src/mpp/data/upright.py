"""Decoded frames as they are meant to be seen: turned and mirrored, with square pixels, 8-bit RGB of full range."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image

_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
_TURNS = {  # by the signs of a display matrix: x' = a x + c y, y' = b x + d y, where y points down
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns the other way round
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = frozenset(turn for signs, turn in _TURNS.items() if signs[0] == 0)


@dataclass(frozen=True)
class View:
    """How the frames of a stream are seen.

    Attributes:
        pixel_aspect: Width over height of a pixel.
        turn: What turns or mirrors them; None: nothing.
    """

    pixel_aspect: Fraction
    turn: Image.Transpose | None

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height in pixels at which a frame is seen."""
        width, height = self._square((frame.width, frame.height))
        return (height, width) if self.turn in _SIDEWAYS else (width, height)

    def picture(self, frame: VideoFrame) -> Image.Image:
        """A frame as it is seen, RGB, by the matrix and range it names (BT.601 and limited where it names none).

        Pixels under a transparent alpha keep their colour: nothing is composited.
        """
        return self._upright(frame.to_image(interpolation=_EXACT, dst_color_range=ColorRange.JPEG))

    def alpha(self, frame: VideoFrame) -> np.ndarray | None:
        """A frame's alpha as it is seen, `(height, width)` float32 in [0, 1]; None where it has none."""
        if not any(component.is_alpha for component in frame.format.components):
            return None
        plane = np.ascontiguousarray(frame.to_ndarray(format="rgba", dst_color_range=ColorRange.JPEG)[..., 3])
        return np.asarray(self._upright(Image.fromarray(plane)), dtype=np.float32) / 255

    def _upright(self, image: Image.Image) -> Image.Image:
        size = self._square(image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return image if self.turn is None else image.transpose(self.turn)

    def _square(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size with square pixels: one side grows, so that nothing is lost."""
        width, height = size
        aspect = self.pixel_aspect
        return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def find_turn(frame: VideoFrame) -> Image.Transpose | None:
    """How a frame's display matrix turns it.

    A frame that was asked for its side data lives until the garbage collector runs, so this is not for every frame.

    Raises:
        ValueError: By an angle that is no multiple of 90 degrees.
    """
    matrices = [np.frombuffer(data, np.int32) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return None
    a, b, _, c, d = (int(value) for value in matrices[0][:5])
    largest = max(abs(a), abs(b), abs(c), abs(d), 1)
    signs = round(a / largest), round(b / largest), round(c / largest), round(d / largest)
    off = max(abs(value / largest - sign) for value, sign in zip((a, b, c, d), signs, strict=True))
    if signs not in _TURNS or off > 0.01:
        raise ValueError(f"is to be turned by an odd angle (matrix {a} {b} {c} {d}); re-encode the video upright")
    return _TURNS[signs]


def check_look(frame: VideoFrame) -> None:
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
