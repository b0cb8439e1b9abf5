"""Frames of videos as masks and images, and the times at which a result of them is shown."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mpp.media.decoding import open_video
from mpp.media.images import DecodedImage
from mpp.media.mask import Mask, judged
from mpp.media.videos import read_timeline

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
        ValueError: As `mpp.media.videos.read_timeline`.
    """
    timeline = read_timeline(path)
    rate = Fraction(timeline.count / timeline.duration if timeline.duration else 25).limit_denominator(1001)
    if timeline.clock is None:  # a container that counts frames
        return Times(tuple(round(time / _MICROSECOND) for time in timeline.times), _MICROSECOND, rate)
    first, numerator, denominator = timeline.clock
    early = min(first, 0)  # no container has times before 0
    pts = tuple(timeline.timestamp(number) - early for number in range(timeline.count))
    return Times(pts, Fraction(numerator, denominator), rate)


def video_masks(path: Path, *, labels: bool = False) -> Iterator[Mask]:
    """A mask video's frames.

    Args:
        path: A video file.
        labels: Whether numbers of labels are wanted, which are no masks otherwise.

    Raises:
        ValueError: The video is damaged, or no mask; frames before that were given.
    """
    with open_video(path) as video:
        yield from judged(map(video.raw_mask, video.frames()), labels=labels)


def video_images(path: Path) -> Iterator[DecodedImage]:
    """A video's frames as images, with alpha where the video has it.

    Raises:
        ValueError: The video is damaged; frames before that were given.
    """
    with open_video(path) as video:
        for frame in video.frames():
            yield DecodedImage(video.image(frame), video.alpha(frame))
