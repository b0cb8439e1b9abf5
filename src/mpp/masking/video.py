"""Frames of videos as masks and pictures, and the times at which a result of them is shown."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from mpp.data.decoding import open_video
from mpp.data.media import Picture
from mpp.data.video import read_timeline
from mpp.masking.frames import Mask

_MICROSECOND = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class Times:
    """When the frames of a video are shown.

    Attributes:
        pts: Timestamp of each frame in units of `base`, ascending.
        base: Seconds.
        rate: Frames per second on average.
    """

    pts: tuple[int, ...]
    base: Fraction
    rate: Fraction


def read_times(path: Path) -> Times:
    """Decode a whole video, so that damage is found before anything is made of it, for its timestamps.

    Raises:
        ValueError: As `mpp.data.video.read_timeline`.
    """
    timeline = read_timeline(path)
    rate = Fraction(timeline.count / timeline.duration if timeline.duration else 25).limit_denominator(1001)
    if timeline.clock is None:  # a container that counts frames
        return Times(tuple(round(time / _MICROSECOND) for time in timeline.times), _MICROSECOND, rate)
    first, numerator, denominator = timeline.clock
    early = min(first, 0)  # no container has times before 0
    pts = tuple(timeline.timestamp(number) - early for number in range(timeline.count))
    return Times(pts, Fraction(numerator, denominator), rate)


def video_masks(path: Path) -> Iterator[Mask]:
    """A mask video's frames: luminance, 8 bits deep.

    Raises:
        ValueError: The video is damaged, or has a transparent alpha; frames before that were given.
    """
    with open_video(path) as video:
        for frame in video.frames():
            alpha = video.alpha(frame)
            if alpha is not None and alpha.min() < 1:
                raise ValueError(
                    f"{path}: this mask has a transparent alpha channel, so it is unclear whether its grey or its "
                    "alpha is meant; save it as plain greyscale, or make masks of its alpha with tool=from_alpha"
                )
            yield Mask(np.asarray(video.picture(frame).convert("L"), dtype=np.float32) / 255)


def video_pictures(path: Path) -> Iterator[Picture]:
    """A video's frames as pictures, with alpha where the video has it.

    Raises:
        ValueError: The video is damaged; frames before that were given.
    """
    with open_video(path) as video:
        for frame in video.frames():
            yield Picture(video.picture(frame), video.alpha(frame))
