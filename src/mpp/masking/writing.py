"""Results on disk: images, videos and folders of frames, each complete or not there, each saying how it was made."""

import io
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mpp.files import write_atomically
from mpp.masking.pixels import Pixels
from mpp.masking.video_frames import Times
from mpp.media.mask import Mask

T = TypeVar("T")

_MADE = "mpp"  # the text chunk of a PNG; videos have it in their comment
_FORMATS = {3: ("rgb24", "bgr0"), 4: ("rgba", "bgra")}  # by channels: of arrays, of FFV1
_LOSSLESS = {"level": "3", "g": "1", "slicecrc": "1"}  # FFV1 with checksums, every frame a key frame


def write_png(path: Path, frame: Mask | Pixels, made: str) -> None:
    """Write one frame as PNG.

    Raises:
        OSError: The disk is full or not writable; `path` is untouched.
    """
    data = _png(frame, made)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_video(path: Path, frames: Iterator[Mask | Pixels], times: Times, made: str) -> int:
    """Write frames at the times of another video: FFV1 in Matroska, or H.264 where `path` ends in `.mp4`.

    Masks keep their depth, colours have 8 bits. Matroska counts in milliseconds, so times are rounded to that.

    Returns:
        How many frames were written.

    Raises:
        ValueError: More or fewer frames than times, or of several sizes; nothing was written.
        OSError: The disk is full or not writable; `path` is untouched.
    """
    try:
        write_atomically(path, lambda temporary: _encode(temporary, path.suffix == ".mp4", frames, times, made))
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} cannot be encoded ({error}); use video_format=frames") from error
    return len(times.pts)


def write_frames(folder: Path, frames: Iterator[Mask | Pixels], names: tuple[str, ...], made: str) -> int:
    """Write frames as PNG files of a new folder, which is there when it is complete; an older one is replaced.

    Returns:
        How many frames were written.

    Raises:
        ValueError: More or fewer frames than names; nothing was written.
        OSError: The disk is full or not writable; `folder` is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    new, old = aside / "new", aside / "old"
    try:
        new.mkdir()
        for name, frame in _counted(names, frames):
            write_png(new / name, frame, made)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return len(names)


def made_with(path: Path) -> dict[str, Any] | None:
    """How a result was made, as it says itself; None where it says nothing of that."""
    try:
        if path.is_dir():
            path = min(path.iterdir())
        if path.suffix == ".png":
            with Image.open(path) as image:
                text = image.info.get(_MADE)
        else:
            with av.open(str(path)) as container:
                text = {key.lower(): value for key, value in container.metadata.items()}.get("comment")
        content = json.loads(text)
        return content if isinstance(content, dict) else None
    except (UnidentifiedImageError, av.FFmpegError, OSError, ValueError, TypeError):
        return None


def _png(frame: Mask | Pixels, made: str) -> bytes:
    array = frame.levels() if isinstance(frame, Mask) else frame.array
    if array.ndim == 3 and array.dtype == np.uint16:
        return _deep_png(array, frame.icc, made)
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(_MADE, made)
    icc = {"icc_profile": frame.icc} if isinstance(frame, Pixels) and frame.icc else {}
    Image.fromarray(array).save(buffer, "PNG", pnginfo=info, compress_level=4, **icc)
    return buffer.getvalue()


def _deep_png(array: np.ndarray, icc: bytes | None, made: str) -> bytes:
    """RGBA with 16 bits per colour, which Pillow cannot write."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *array.shape[:2], "rgba64be"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame(codec.width, codec.height, codec.pix_fmt)
    plane = frame.planes[0]
    rows = np.zeros((array.shape[0], plane.line_size), np.uint8)
    packed = array.astype(">u2").reshape(array.shape[0], -1).view(np.uint8)
    rows[:, : packed.shape[1]] = packed
    plane.update(rows.tobytes())
    data = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    chunks = _chunk(b"tEXt", _MADE.encode() + b"\0" + made.encode())
    if icc:
        chunks = _chunk(b"iCCP", b"icc\0\0" + zlib.compress(icc)) + chunks
    head = 8 + 12 + 13  # signature and header chunk
    return data[:head] + chunks + data[head:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _encode(path: Path, lossy: bool, frames: Iterator[Mask | Pixels], times: Times, made: str) -> None:
    with av.open(str(path), "w", format="mp4" if lossy else "matroska") as container:
        container.metadata["comment"] = made
        stream = None
        for time, frame in _counted(times.pts, frames):
            array, layout, form = _layout(frame)
            if lossy:  # H.264 in its usual form wants even sides
                array, form = array[: array.shape[0] // 2 * 2, : array.shape[1] // 2 * 2], "yuv420p"
            if stream is None:
                stream = container.add_stream("libx264" if lossy else "ffv1", rate=times.rate)
                stream.options = {"crf": "20"} if lossy else _LOSSLESS
                stream.height, stream.width, stream.pix_fmt = *array.shape[:2], form
                stream.codec_context.time_base = times.base
            if array.shape[:2] != (stream.height, stream.width):
                raise ValueError(
                    f"frames of a video have one size, got {stream.width}x{stream.height} and then "
                    f"{array.shape[1]}x{array.shape[0]}; use video_format=frames"
                )
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=layout)
            shown.pts, shown.time_base = time, times.base
            container.mux(stream.encode(shown))
        container.mux(stream.encode())


def _layout(frame: Mask | Pixels) -> tuple[np.ndarray, str, str]:
    """A frame as numbers; how they lie, and how the lossless codec has them."""
    if isinstance(frame, Mask):
        form = "gray" if frame.bits == 8 else "gray16le"
        return frame.levels(), form, form
    array = frame.array if frame.array.dtype == np.uint8 else (frame.array >> 8).astype(np.uint8)
    return array, *_FORMATS[array.shape[2]]


def _counted(targets: tuple[T, ...], frames: Iterator[Mask | Pixels]) -> Iterator[tuple[T, Mask | Pixels]]:
    """Frames with their targets, as many as there are targets.

    Raises:
        ValueError: There are more or fewer.
    """
    count = 0
    for count, frame in enumerate(frames, 1):
        if count > len(targets):
            raise ValueError(f"there are more frames than the {len(targets)} expected; the input changed, run again")
        yield targets[count - 1], frame
    if count < len(targets):
        raise ValueError(f"{count} frames instead of {len(targets)}; the input changed, run again")


def is_own_folder(folder: Path) -> bool:
    """Whether a folder holds nothing but PNG files, so that it may be replaced."""
    return folder.is_dir() and all(file.is_file() and file.suffix == ".png" for file in folder.iterdir())
