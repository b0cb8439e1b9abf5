"""Decoding video files with PyAV, so that damage is an error instead of a guess of the decoder.

What is found out: damaged heads, packets and frames, lost frames, and files that end too early. What no decoder finds
out: changed bytes inside an image of a codec with an arithmetic coder (H.264, HEVC, VP9, AV1, FFV1), which decode to
other pixels, and changed times in the tables of MP4. Only Matroska files with checksums are proof against those.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from PIL import Image

from mpp.media.containers import check_container
from mpp.media.mask import RawMask
from mpp.media.orientation import Orientation, check_look, find_turn
from mpp.media.paths import MediaPath, reaching, short

# Texts, playlists and scripts, which may name other files, are no videos.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,asf,flv"
_STRICT = "crccheck+bitstream+buffer+explode"
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave the alpha out
_ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "libaom-av1"})
_LOSSLESS = frozenset({"ffv1", "rawvideo", "png", "apng", "qtrle", "huffyuv", "ffvhuff", "utvideo", "msrle"})
_MAX_PIXEL_ASPECT = 8


class OpenVideo:
    """The image stream of an open video file, for one pass.

    Attributes:
        path: The file.

    Raises:
        ValueError: There is no video stream, no decoder for it, or its pixels have an absurd shape.
    """

    def __init__(self, path: MediaPath, container: InputContainer, size: int, packets: int | None) -> None:
        self.path, self._container, self._size, self._promised = path, container, size, packets
        self._packets, self._timestamps = 0, []
        self._first, self._begin, self._end = 0, None, 0
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise ValueError(f"{path} has no video stream, only sound or a cover image; drop it or replace it")
        if stream.codec_context is None:
            raise ValueError(f"{path}: there is no decoder for its codec; re-encode it, for example as H.264")
        self._stream, self._codec = stream, stream.codec_context.name
        # Threads within a frame, PyAV's default: with several frames at once it drops errors that come at the end.
        self._decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and self._codec in _ALPHA_DECODERS:
            self._decoder = av.CodecContext.create(_ALPHA_DECODERS[self._codec], "r")
        self._decoder.options = {"err_detect": _STRICT, "max_pixels": str(_max_pixels())}
        self._views: dict[int, Orientation] = {}  # by rotation, which is the same for all frames, or nearly
        self._pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        if not 1 / _MAX_PIXEL_ASPECT <= self._pixel_aspect <= _MAX_PIXEL_ASPECT:
            raise ValueError(
                f"{path} claims a pixel aspect ratio of {self._pixel_aspect}; re-encode it with square pixels"
            )

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of the timestamps."""
        return Fraction(self._stream.time_base or 1)

    @property
    def rate(self) -> float | None:
        """Frames per second on average, as the container says."""
        rate = self._stream.average_rate or self._stream.base_rate
        return float(rate) if rate else None

    @property
    def counts_frames(self) -> bool:
        """Whether the container has a rate and numbers of frames instead of their times (AVI)."""
        return self._container.format.name == "avi"

    def begin_at(self, number: int, key: int, seek: int) -> None:
        """Decode from a key frame on; to be called before any frame was read.

        Args:
            number: Which frame of the video it is.
            key: Its timestamp. What is shown before it is left out: it may refer to frames before the key frame.
            seek: Where in the file to look for it, a timestamp not later than `key`. Some containers go too far.

        Raises:
            ValueError: The container cannot seek.
        """
        with explained(self.path):
            self._container.seek(seek, stream=self._stream)
        self._first, self._begin = number, key

    def frames(self) -> Iterator[VideoFrame]:
        """Frames in the order in which they are shown.

        Raises:
            ValueError: A packet or frame is damaged or missing, interlaced, or of high dynamic range.
        """
        with explained(self.path):
            packets = self._container.demux(self._stream)
        packet, shown = None, self._first
        while True:
            with explained(self.path, self._near(shown)):
                packet = next(packets, None)
            if packet is None:
                return
            if self._begin is not None and packet.pts is not None and packet.pts < self._begin:
                continue
            if packet.size:
                self._packets += 1
                self._end = max(self._end, (packet.dts or 0) + (packet.duration or 0))
                self._timestamps += [] if packet.is_discard else [packet.pts]
            if packet.is_corrupt or self._packets > self._size:
                raise ValueError(f"{self.path}: {self._near(shown)}; replace or re-encode the video")
            with explained(self.path, self._near(shown)):
                frames = self._decoder.decode(packet)
            for frame in frames:
                self._check(frame, shown)
                yield frame
                shown += 1

    def check_complete(self, shown: Sequence[int | None]) -> None:
        """After a pass through all frames, refuse a stream that has lost some.

        Args:
            shown: Timestamps of the frames.

        Raises:
            ValueError: Names the first frame that is missing, or both counts.
        """
        if self.counts_frames:
            self._check_count(self._end if self._promised is None else self._packets)
            return
        first = min((timestamp for timestamp in shown if timestamp is not None), default=0)
        if self._codec in _ONE_FRAME_A_PACKET:
            # before the first frame there may be some that refer to what was cut off
            lost = Counter(t for t in self._timestamps if t is not None and t > first) - Counter(shown)
            if lost:
                number = sum(timestamp is not None and timestamp < min(lost) for timestamp in shown)
                raise ValueError(f"{self.path}: frame {number} is damaged; replace or re-encode the video")
        self._check_count(self._packets)

    def oriented_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height in pixels at which a frame is seen."""
        return self._view(frame).size(frame)

    def image(self, frame: VideoFrame) -> Image.Image:
        """A frame as it is seen, RGB.

        Raises:
            ValueError: Its pixels cannot be converted.
        """
        with explained(self.path, f"frames of pixel format {frame.format.name} cannot be read"):
            return self._view(frame).image(frame)

    def alpha(self, frame: VideoFrame) -> np.ndarray | None:
        """A frame's alpha as it is seen, `(height, width)` float32 in [0, 1]; None where it has none.

        Raises:
            ValueError: Its pixels cannot be converted.
        """
        with explained(self.path, f"frames of pixel format {frame.format.name} cannot be read"):
            return self._view(frame).alpha(frame)

    def raw_mask(self, frame: VideoFrame) -> RawMask:
        """A frame of a mask as it is; `mpp.media.mask` says what it means.

        Raises:
            ValueError: Its pixels cannot be converted.
        """
        with explained(self.path, f"frames of pixel format {frame.format.name} cannot be read"):
            colours, white = self._view(frame).colours(frame)
        return RawMask(self.path, colours, white, self.alpha(frame), self._codec not in _LOSSLESS)

    def _view(self, frame: VideoFrame) -> Orientation:
        rotation = frame.rotation
        if rotation not in self._views:
            self._views[rotation] = Orientation(self._pixel_aspect, find_turn(frame))
        return self._views[rotation]

    def _check(self, frame: VideoFrame, number: int) -> None:
        if frame.is_corrupt:
            raise ValueError(f"{self.path}: frame {number} is damaged; replace or re-encode the video")
        try:
            check_look(frame)
            width, height = self.oriented_size(frame)
        except ValueError as error:
            raise ValueError(f"{self.path}: frame {number} {error}") from error
        if not 0 < width * height <= _max_pixels():
            raise ValueError(f"{self.path}: frames of {width}x{height} are too large; scale the video down")

    def _check_count(self, found: int) -> None:
        promised = self._stream.frames if self._promised is None else self._promised
        if found < promised:
            raise ValueError(f"{self.path} is truncated: {promised} frames by its head, {found} found; copy it again")

    def _near(self, shown: int) -> str:
        """Where something went wrong: by the clock where it is known, for packets come earlier than their frames."""
        known = [timestamp for timestamp in self._timestamps[-1:] if timestamp is not None]
        if known and self.rate and self._timestamps[0] is not None:
            since = float((known[0] - self._timestamps[0]) * self.time_base)
            shown = max(shown, self._first + round(since * self.rate))
        return f"damaged or truncated near frame {shown}"


@contextmanager
def open_video(path: MediaPath, *, whole: bool = False) -> Iterator[OpenVideo]:
    """Open a video file for one pass through its frames.

    Args:
        path: A file on this machine, or on any file system whose paths have `open("rb")`.
        whole: Also check the whole container for damage that FFmpeg would skip.

    Raises:
        ValueError: The file cannot be read, is empty or no video, or ends before its head says it does.
    """
    with reaching(path):
        file = path.open("rb")
    with file:
        packets = None
        if whole:
            try:
                packets = check_container(file)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
            except Exception as error:
                raise ValueError(f"{path} cannot be read ({short(error)})") from error
        options = {"max_pixels": str(_max_pixels()), "format_whitelist": _FORMATS}
        with explained(path):
            size = file.seek(0, 2)
            file.seek(0)
            container = av.open(file, options=options, metadata_errors="replace", buffer_size=1 << 17)
        with container:
            yield OpenVideo(path, container, size, packets)


@contextmanager
def explained(path: MediaPath, what: str = "not a readable video, or truncated") -> Iterator[None]:
    """Turn whatever a library raises into one ValueError that names the file."""
    try:
        yield
    except Exception as error:  # FFmpeg's, Pillow's, and those of the clients of object storages
        raise ValueError(f"{path}: {what} ({short(error)})") from error


def _max_pixels() -> int:
    """Pillow's limit for images holds for frames."""
    return Image.MAX_IMAGE_PIXELS or (1 << 31) - 1
