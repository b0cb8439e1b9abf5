"""Which frames of a video become training clips, and their masks pooled in time as the VAE pools them."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mpp.media.videos import Timeline
from mpp.models.contract import LatentSpec

Extract = Literal["head", "uniform", "all", "chosen"]
_MOST_ROUNDING = 0.002


@dataclass(frozen=True)
class Clip:
    """A clip of a video.

    Attributes:
        start: Number of the source frame with which it begins.
        frames: Number of the source frame that each of its frames shows; ascending, perhaps with repeats.
    """

    start: int
    frames: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among the clips of one video: start and length."""
        return f"{self.start:05d}-{len(self.frames):03d}"


@dataclass(frozen=True)
class Clips:
    """How clips are cut out of videos.

    A clip at the frame rate `fps` shows at its frame k the source frame that is on screen k / fps seconds after its
    start, so frames are dropped or repeated and none are blended. Folders of frames have no clock: each of their frames
    is one of the clip's. No clip goes on after the video's end.

    Args:
        fps: Frames per second of the clips; None: the rate that the model was made for.
        frames: Lengths that clips may have, in frames; each clip gets the longest that fits.
        extract: `head`: one clip from the first frame on. `uniform`: `count` clips of one length, spread evenly over
            the video. `all`: one clip after the other without overlap, the last one perhaps shorter. `chosen`: one clip
            from each of `starts` on.
        count: Clips per video with `uniform`; fewer where a video is too short for different ones. A single one comes
            from the middle.
        starts: Source frames at which `chosen` clips begin, in videos that name none themselves.

    Raises:
        ValueError: An unknown word, or numbers out of range.
    """

    fps: float | None = None
    frames: Sequence[int] = (17, 33, 49, 81)
    extract: Extract = "head"
    count: int = 4
    starts: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.extract not in get_args(Extract):
            raise ValueError(f"data.clips.extract must be one of {', '.join(get_args(Extract))}, got {self.extract!r}")
        if self.fps is not None:
            _check_rate(self.fps)
        if not self.frames or any(length < 1 for length in self.frames):
            raise ValueError(f"data.clips.frames must name lengths of at least 1, got {list(self.frames)}")
        if self.count < 1:
            raise ValueError(f"data.clips.count must be at least 1, got {self.count}")
        if any(start < 0 for start in self.starts):
            raise ValueError(f"data.clips.starts must be frame numbers from 0 on, got {list(self.starts)}")
        if self.starts and self.extract != "chosen":
            raise ValueError(
                f"data.clips.starts={list(self.starts)} is for data.clips.extract=chosen, got {self.extract}; set "
                "that, or leave starts out"
            )

    def check(self, spec: LatentSpec) -> None:
        """Refuse lengths that the model's VAE cannot encode whole.

        Raises:
            ValueError: The model takes single images only, or names a length off its grid and those next to it.
        """
        stride = spec.temporal_stride
        if stride == 1:
            raise ValueError("this model learns single images; take the videos out of the data, or another model")
        for length in self.frames:
            below = (length - 1) // stride * stride + 1
            if length != below:
                raise ValueError(
                    f"data.clips.frames={list(self.frames)}: clips of this model have 1, {1 + stride}, "
                    f"{1 + 2 * stride}, ... frames; instead of {length} use {below} or {below + stride}"
                )

    def of(self, timeline: Timeline, name: str, fps: float, starts: Sequence[int] = ()) -> list[Clip]:
        """The clips of one video, by start.

        Args:
            timeline: The video's.
            name: How errors call it.
            fps: The model's rate, which holds where `fps` of these settings is None.
            starts: Source frames at which `chosen` clips begin in this very video; (): those of these settings.

        Raises:
            ValueError: The video is too short for any length, or a start lies outside it or too near its end.
        """
        rate = _check_rate(self.fps if self.fps is not None else fps)
        cutter = _Cutter(timeline, name, rate, sorted(set(self.frames)))
        if self.extract == "chosen":
            return cutter.chosen(starts or self.starts)
        if starts:
            raise ValueError(
                f"{name} names starts {list(starts)}, which are for data.clips.extract=chosen, got {self.extract}"
            )
        cutter.check_length(0)
        if self.extract == "uniform":
            return cutter.uniform(self.count)
        return cutter.consecutive() if self.extract == "all" else [cutter.longest(0)]


@dataclass(frozen=True)
class _Cutter:
    """Cuts one video at one rate; `lengths` ascend."""

    timeline: Timeline
    name: str
    rate: float
    lengths: Sequence[int]

    @property
    def rounding(self) -> float:
        """Seconds by which a frame's time may be late: containers round both ends of an interval to their unit."""
        _, numerator, denominator = self.timeline.clock or (0, 1, 1000)
        return min(1.001 * numerator / denominator + 1e-9, _MOST_ROUNDING)

    def available(self, start: int) -> int:
        """Clip frames from a source frame to the video's end."""
        times, duration = self.timeline.times, self.timeline.duration
        if times is None or duration is None:
            return self.timeline.count - start
        left = duration - times[start] - self.rounding
        return max(1, math.ceil(left * self.rate - 1e-9))  # k / rate < left

    def shown(self, start: int, number: int) -> int:
        """Source frame on screen at a clip's frame."""
        times = self.timeline.times
        if times is None:
            return start + number
        moment = times[start] + number / self.rate
        return max(start, bisect_right(times, moment + self.rounding) - 1)

    def cut(self, start: int, length: int) -> Clip:
        return Clip(start, tuple(self.shown(start, number) for number in range(length)))

    def longest(self, start: int) -> Clip | None:
        available = self.available(start)
        fitting = [length for length in self.lengths if length <= available]
        return self.cut(start, fitting[-1]) if fitting else None

    def check_length(self, start: int) -> None:
        available = self.available(start)
        if available < self.lengths[0]:
            clock = "" if self.timeline.times is None else f" at {self.rate:g} frames per second"
            since = f" from frame {start} on" if start else ""
            raise ValueError(
                f"{self.name} has {available} frames{clock}{since}, the shortest clip of data.clips.frames is "
                f"{self.lengths[0]}; add a shorter length, or leave the video out"
            )

    def chosen(self, starts: Sequence[int]) -> list[Clip]:
        if not starts:
            raise ValueError(
                f"{self.name}: data.clips.extract=chosen and no starts for this video; name source frames for it, or "
                "for all videos in data.clips.starts"
            )
        clips = []
        for start in sorted(set(starts)):
            if not 0 <= start < self.timeline.count:
                raise ValueError(f"{self.name} has frames 0 to {self.timeline.count - 1}; no clip can begin at {start}")
            self.check_length(start)
            clips.append(self.longest(start))
        return clips

    def uniform(self, count: int) -> list[Clip]:
        length = max(length for length in self.lengths if length <= self.available(0))
        # available(start) descends
        last = bisect_left(range(self.timeline.count), True, key=lambda start: self.available(start) < length) - 1
        steps = [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
        return [self.cut(start, length) for start in sorted({round(step * last) for step in steps})]

    def consecutive(self) -> list[Clip]:
        clips, start = [], 0
        while start < self.timeline.count and (clip := self.longest(start)) is not None:
            clips.append(clip)
            start = max(clip.frames[-1] + 1, self.shown(start, len(clip.frames)))
        return clips


def pool_in_time(frames: Tensor | Iterable[Tensor], stride: int) -> Tensor:
    """Masks of pixel frames to masks of latent frames, grouped as a causal VAE groups its frames.

    The first latent frame stands for the first pixel frame alone, each further one for the next `stride` of them.

    Args:
        frames: `(h, w)` each, `1 + m * stride` of them, as one tensor `(n, h, w)` or one after the other, so that they
            need not be in memory together.
        stride: Pixel frames per latent frame after the first, >= 1.

    Returns:
        Their means `(1 + m, h, w)`, of the frames' type.

    Raises:
        ValueError: There are none, or they do not fill the last group.
    """
    pooled: list[Tensor] = []
    total, count = None, 0
    for number, frame in enumerate(frames):
        total = frame.double() if total is None else total + frame.double()
        count += 1
        if number % stride == 0:
            pooled.append((total / count).to(frame.dtype))
            total, count = None, 0
    if not pooled or count:
        got = (len(pooled) - 1) * stride + 1 + count if pooled else 0
        raise ValueError(
            f"masks of {got} frames do not fill latent frames of 1, then {stride} each; use 1 + m * {stride}"
        )
    return torch.stack(pooled)


def _check_rate(fps: float) -> float:
    if not 0 < fps <= 1000:
        raise ValueError(f"data.clips.fps must be above 0 and at most 1000, got {fps}")
    return float(fps)
