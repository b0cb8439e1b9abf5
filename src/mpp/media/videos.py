"""Videos and folders of frames: which frames there are and when, and reading some of them in bounded memory."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from mpp.media.decoding import OpenVideo, open_video
from mpp.media.images import SUFFIXES, read_image, read_mask, read_raw_mask
from mpp.media.mask import Judge
from mpp.media.paths import MediaPath

_LONGEST_PAUSE = 600.0
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Timeline:
    """Frames of a video, or of a folder of frames, as they are shown.

    Attributes:
        size: Width and height of the upright frames, with square pixels.
        count: How many frames there are, >= 1.
        times: When each appears, in seconds from the first; None for a folder of frames, which has no clock.
        duration: Seconds until the last frame ends; None for a folder of frames.
        transparent: Whether any frame has an alpha that is not opaque.
        keys: Numbers of the frames at which decoding may begin; () where the file must be read from its start.
        clock: Timestamp of the first frame, and numerator and denominator of the seconds per unit of timestamps.
        files: Names of a folder's frames, in order; () for a video file.
    """

    size: tuple[int, int]
    count: int
    times: tuple[float, ...] | None
    duration: float | None
    transparent: bool = False
    keys: tuple[int, ...] = ()
    clock: tuple[int, int, int] | None = None
    files: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values that JSON keeps exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Timeline":
        """A timeline from what `to_json` gave, perhaps through a file.

        Raises:
            ValueError: Names are missing or unknown.
        """
        if not isinstance(content, dict) or content.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"this is no timeline of a video: {str(content)[:120]}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})

    def timestamp(self, number: int) -> int:
        """A frame's timestamp in the file; only where there are `keys`."""
        assert self.clock is not None
        assert self.times is not None
        first, numerator, denominator = self.clock
        return first + round(self.times[number] * denominator / numerator)


def read_timeline(path: MediaPath, *, mask: bool = False) -> Timeline:
    """Decode a video, or a folder of frames, once from start to end.

    Args:
        path: Which one.
        mask: Also see to it that all frames together are a mask.

    Raises:
        ValueError: It cannot be read, holds no frames, a frame is damaged or missing, frames differ in size or are
            interlaced, timestamps run backwards or stand still for minutes, see `mpp.media.decoding`; or it is no mask,
            see `mpp.media.mask`.
    """
    if path.is_dir():
        return _folder_timeline(path, mask=mask)
    timestamps, keys, transparent, size, end = [], [], False, None, 0
    judge = Judge()
    with open_video(path, whole=True) as video:
        for number, frame in enumerate(video.frames()):
            found = video.oriented_size(frame)
            if size not in (None, found):
                raise ValueError(_other_size(path, f"frame {number}", found, size))
            size = found
            timestamps.append(frame.pts)
            keys += [number] if frame.key_frame else []
            end = frame.duration or 0
            if mask:
                judge.mask(video.raw_mask(frame))
            else:
                transparent = transparent or _is_transparent(video.alpha(frame))
        judge.close()
        if size is None:
            raise ValueError(f"{path} holds no frames; drop it or replace it")
        video.check_complete(timestamps)
        return _timeline(video, size, timestamps, tuple(keys), end, transparent=transparent)


def read_frames(path: MediaPath, timeline: Timeline, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Upright RGB images of chosen frames, one after the other.

    Decoding begins at the key frame before the first one, where the file's timestamps prove that it got there, and ends
    with the last one. At any time one image is held, besides what the decoder and the caller keep.

    Args:
        path: The video or folder of frames.
        timeline: Its timeline.
        numbers: Source frames in ascending order; a repeated number gives the same object again.

    Raises:
        ValueError: A frame cannot be read or decoded, or the file is no longer what the timeline was read from.
    """

    def of_file(file: MediaPath) -> Image.Image:
        return read_image(file).rgb

    return _read(path, timeline, numbers, of_file, OpenVideo.image)


def read_mask_frames(path: MediaPath, timeline: Timeline | None, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The same for masks: values of the chosen frames, `(height, width)` float32 in [0, 1].

    That all frames together are a mask was found by `read_timeline`.

    Args:
        path: A mask video, a folder of masks, or, without a timeline, one image that holds for all frames.
        timeline: Its timeline; None for an image.
        numbers: As above.

    Raises:
        ValueError: As above, or a frame is none of a mask.
    """
    if timeline is None:
        still = read_mask(path)
        return (still for _ in numbers)

    def of_file(file: MediaPath) -> np.ndarray:
        return read_raw_mask(file).mask().values

    def of_frame(video: OpenVideo, frame: VideoFrame) -> np.ndarray:
        return video.raw_mask(frame).mask().values

    return _read(path, timeline, numbers, of_file, of_frame)


def read_alpha_frames(path: MediaPath, timeline: Timeline, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The same for the alpha of transparent videos and folders of frames; ones where a frame has none.

    Raises:
        ValueError: As above.
    """
    opaque = np.ones((timeline.size[1], timeline.size[0]), np.float32)

    def of_file(file: MediaPath) -> np.ndarray:
        alpha = read_image(file).alpha
        return opaque if alpha is None else alpha

    def of_frame(video: OpenVideo, frame: VideoFrame) -> np.ndarray:
        alpha = video.alpha(frame)
        return opaque if alpha is None else alpha

    return _read(path, timeline, numbers, of_file, of_frame)


def check_counts(media: Timeline, mask: Timeline, name: str, mask_name: str) -> None:
    """Refuse a moving mask that has not one frame for each frame of its media.

    Raises:
        ValueError: Says both counts.
    """
    if media.count != mask.count:
        raise ValueError(
            f"{name} has {media.count} frames, its mask {mask_name} has {mask.count}; export one mask frame for each "
            "frame, or one image for all of them"
        )


def _read(
    path: MediaPath,
    timeline: Timeline,
    numbers: Sequence[int],
    of_file: Callable[[MediaPath], _Item],
    of_frame: Callable[[OpenVideo, VideoFrame], _Item],
) -> Iterator[_Item]:
    """Items of ascending frame numbers; what repeats is made once."""
    times = Counter(numbers)
    wanted = list(times)
    if any(later < number for number, later in pairwise(numbers)):
        raise ValueError(f"{path}: frames are read in ascending order, got {list(numbers)[:20]}")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < timeline.count:
        raise ValueError(f"{path} has frames 0 to {timeline.count - 1}, asked for {wanted[0]} to {wanted[-1]}")
    items = (
        _from_folder(path, timeline, wanted, of_file)
        if timeline.files
        else _from_file(path, timeline, wanted, of_frame)
    )
    return (item for number, item in zip(wanted, items, strict=True) for _ in range(times[number]))


def _from_folder(
    path: MediaPath, timeline: Timeline, wanted: Sequence[int], of_file: Callable[[MediaPath], _Item]
) -> Iterator[_Item]:
    for number in wanted:
        item = of_file(path / timeline.files[number])
        size = item.size if isinstance(item, Image.Image) else (item.shape[1], item.shape[0])
        if size != timeline.size:
            raise ValueError(_other_size(path, timeline.files[number], size, timeline.size))
        yield item


def _from_file(
    path: MediaPath, timeline: Timeline, wanted: Sequence[int], of_frame: Callable[[OpenVideo, VideoFrame], _Item]
) -> Iterator[_Item]:
    if not wanted:
        return
    keys = [key for key in timeline.keys if key <= wanted[0]][-3:]
    for seek in dict.fromkeys((keys[-1], keys[0])) if keys[-1:] > [0] else ():
        with open_video(path) as video:
            found = _from_key(video, timeline, keys[-1], seek, wanted[0])
            if found is not None:
                yield from _picked(video, timeline, wanted, found, of_frame)
                return
    with open_video(path) as video:
        yield from _picked(video, timeline, wanted, enumerate(video.frames()), of_frame)


def _from_key(
    video: OpenVideo, timeline: Timeline, key: int, seek: int, first: int
) -> Iterator[tuple[int | None, VideoFrame]] | None:
    """Numbered frames from `first` on, decoded from a key frame on; None where that cannot be done for certain.

    Some containers miss the key frame, so frames are known by their timestamps, and all from the key frame to the first
    must come without an error.
    """
    numbers = {timeline.timestamp(number): number for number in range(timeline.count)}
    try:
        video.begin_at(key, timeline.timestamp(key), timeline.timestamp(seek))
        numbered = ((numbers.get(frame.pts), frame) for frame in video.frames())
        for expected, (number, frame) in zip(range(key, first + 1), numbered, strict=False):
            if number != expected:
                return None
            if number == first:
                return chain([(number, frame)], numbered)
    except ValueError:
        return None
    return None


def _picked(
    video: OpenVideo,
    timeline: Timeline,
    wanted: Sequence[int],
    numbered: Iterator[tuple[int | None, VideoFrame]],
    of_frame: Callable[[OpenVideo, VideoFrame], _Item],
) -> Iterator[_Item]:
    changed = f"{video.path} is no longer the video that it was when it was checked; run `python -m mpp.prepare` again"
    missing = set(wanted)
    before = None
    for number, frame in numbered:
        if before is not None and number != before + 1:
            raise ValueError(changed)
        before = number
        if number in missing:
            if video.oriented_size(frame) != timeline.size:
                raise ValueError(changed)
            missing.remove(number)
            yield of_frame(video, frame)
        if not missing:
            return
    raise ValueError(changed)


def _timeline(
    video: OpenVideo,
    size: tuple[int, int],
    timestamps: Sequence[int | None],
    keys: tuple[int, ...],
    end: int,
    *,
    transparent: bool,
) -> Timeline:
    """Of a file that is whole, where `end` is its last frame's duration."""
    base = video.time_base
    counted = video.counts_frames and not _ascending(timestamps)
    if counted:
        base, timestamps = Fraction(video.rate or 1 / base).limit_denominator(1 << 20) ** -1, range(len(timestamps))
    times = _times(video.path, timestamps, base)
    duration = times[-1] + _last_shown(times, end * video.time_base, video.rate)
    if counted:
        return Timeline(size, len(times), times, duration, transparent)
    clock = (timestamps[0], base.numerator, base.denominator)
    return Timeline(size, len(times), times, duration, transparent, keys, clock)


def _folder_timeline(folder: MediaPath, *, mask: bool) -> Timeline:
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not names:
        raise ValueError(f"the folder {folder} holds no frames ({', '.join(sorted(SUFFIXES))})")
    names.sort(key=_in_order)
    for name, other in pairwise(names):
        if _in_order(name)[0] == _in_order(other)[0]:
            raise ValueError(f"{folder / name} and {folder / other} are the same frame by number; remove one of them")
    size, transparent, judge = None, False, Judge()
    for name in names:
        if mask:
            found = judge.mask(read_raw_mask(folder / name)).size
        else:
            image = read_image(folder / name)
            found, transparent = image.rgb.size, transparent or _is_transparent(image.alpha)
        if size not in (None, found):
            raise ValueError(_other_size(folder, name, found, size))
        size = found
    judge.close()
    return Timeline(size, len(names), None, None, transparent=transparent, files=tuple(names))


def _is_transparent(alpha: np.ndarray | None) -> bool:
    return alpha is not None and bool(alpha.min() < 1)


def _in_order(name: str) -> tuple[list[object], str]:
    """Sort key of a frame's file: runs of digits by their value, so that frame 10 comes after frame 9."""
    parts = re.split(r"(\d+)", name.rpartition(".")[0].lower())
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name


def _ascending(timestamps: Sequence[int | None]) -> bool:
    return None not in timestamps and all(a < b for a, b in pairwise(timestamps))


def _times(path: MediaPath, timestamps: Sequence[int | None], base: Fraction) -> tuple[float, ...]:
    """Seconds of each frame from the first."""
    if not _ascending(timestamps):
        wrong = (n for n, (a, b) in enumerate(pairwise(timestamps), 1) if a is None or b is None or b <= a)
        raise ValueError(
            f"{path}: the timestamp of frame {next(wrong, 0)} is missing or not after the one before; write the clock "
            "anew, for example with `ffmpeg -i IN -vf setpts=N/FRAME_RATE/TB OUT`"
        )
    times = tuple(float((timestamp - timestamps[0]) * base) for timestamp in timestamps)
    for number, (time, later) in enumerate(pairwise(times)):
        if later - time > _LONGEST_PAUSE:
            raise ValueError(
                f"{path}: frame {number} stays for {later - time:.0f} s; cut out the pause, or write the clock anew"
            )
    return times


def _last_shown(times: Sequence[float], said: Fraction, rate: float | None) -> float:
    """Seconds for which the last frame is shown: as the file says, or else as long as the one before."""
    if 0 < said <= _LONGEST_PAUSE:
        return float(said)
    if len(times) > 1:
        return times[-1] - times[-2]
    return 1 / rate if rate else 0.0


def _other_size(path: MediaPath, what: str, found: tuple[int, int], before: tuple[int, int]) -> str:
    return (
        f"{path}: {what} is {found[0]}x{found[1]}, those before are {before[0]}x{before[1]}; export all frames at one "
        "size"
    )
