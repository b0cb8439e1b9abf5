"""Decoded frames as they are meant to be seen: turned and mirrored, with square pixels, RGB of full range."""

import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image

_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
_NUMBERS = re.compile(r"(gray|gbra?p)(9|1[0246])?([bl]e)?")  # formats with the numbers of an image in planes
_WIDE = {"rgb48": "gbrp16le", "bgr48": "gbrp16le", "rgba64": "gbrp16le", "bgra64": "gbrp16le", "ya16": "gray16le"}
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
class Orientation:
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

    def image(self, frame: VideoFrame) -> Image.Image:
        """A frame as it is seen, RGB, by the matrix and range it names (BT.601 and limited where it names none).

        Pixels under a transparent alpha keep their colour: nothing is composited.
        """
        return self._oriented(frame.to_image(interpolation=_EXACT, dst_color_range=ColorRange.JPEG))

    def colours(self, frame: VideoFrame) -> tuple[np.ndarray, int]:
        """A frame as it is seen, of as many bits as its greys, or red, green and blue, have; of 8 where it has others.

        Returns:
            Greys `(height, width)`, or red, green and blue `(3, height, width)`; and the number that means white.
        """
        if frame.format.components[0].bits < 8 and not frame.format.has_palette:
            frame = frame.reformat(format="rgb24")
        if not _NUMBERS.fullmatch(frame.format.name):
            form = _WIDE.get(frame.format.name[:-2], "gbrp")
            frame = frame.reformat(format=form, interpolation=_EXACT, dst_color_range=ColorRange.JPEG)
        bits = frame.format.components[0].bits
        order = (0,) if frame.format.name.startswith("gray") else (2, 0, 1)
        planes = [self._numbers(_plane(frame, number, bits)) for number in order]
        return planes[0] if len(planes) == 1 else np.stack(planes), 2**bits - 1

    def alpha(self, frame: VideoFrame) -> np.ndarray | None:
        """A frame's alpha as it is seen, `(height, width)` float32 in [0, 1]; None where it has none."""
        bits = [component.bits for component in frame.format.components if component.is_alpha]
        if not bits and not frame.format.has_palette:
            return None
        deep = bits == [16]
        colours = frame.to_ndarray(format="rgba64le" if deep else "rgba", dst_color_range=ColorRange.JPEG)
        return self._numbers(colours[..., 3]).astype(np.float32) / (65535 if deep else 255)

    def _numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of pixels, `(height, width)` uint8 or uint16, as they are seen."""
        if numbers.dtype == np.uint16 and self.pixel_aspect != 1:
            scaled = self._oriented(Image.fromarray(numbers.astype(np.float32)))  # Pillow scales no others
            return np.asarray(scaled).clip(0, 65535).round().astype(np.uint16)
        return np.asarray(self._oriented(Image.fromarray(np.ascontiguousarray(numbers))))

    def _oriented(self, image: Image.Image) -> Image.Image:
        size = self._square(image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return image if self.turn is None else image.transpose(self.turn)

    def _square(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size with square pixels: one side grows, so that nothing is lost."""
        width, height = size
        aspect = self.pixel_aspect
        return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _plane(frame: VideoFrame, number: int, bits: int) -> np.ndarray:
    """One plane's numbers, `(height, width)` uint8 or uint16."""
    kind = np.uint8 if bits == 8 else ">u2" if frame.format.name.endswith("be") else "<u2"
    rows = np.frombuffer(frame.planes[number], kind).reshape(frame.height, -1)
    return rows[:, : frame.width].astype(np.uint8 if bits == 8 else np.uint16)


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
