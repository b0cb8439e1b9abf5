"""Masks of the main object of an image, by a network that lies in the package."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from mpp.masking import u2net
from mpp.masking.alpha import FromAlpha
from mpp.masking.pixels import enlarge
from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool
from mpp.media.mask import Mask

_OPAQUE = 0.99  # mean of an alpha channel: less than that is a cut-out, more has soft corners or a few soft pixels


@dataclass(frozen=True)
class Salient(Tool):
    """Masks of the main object, whatever it is, by U²-Net small. Nothing is downloaded and nothing described.

    What is nowhere as likely as `threshold` is no object: images and frames without one get black masks. An alpha
    channel by which a hundredth of the image is transparent is a mask already, and is taken as it is.

    Args:
        threshold: Probability in the middle of the mask's edge, in (0, 1).
        softness: Range of probabilities around it over which the mask rises from 0 to 1; 0: black and white.
        smooth: Of clips: as many frames, an odd number, give each mask by their median; 1: each frame by itself.
        device: Where the network runs.

    Raises:
        ValueError: A setting is out of range.
    """

    threshold: float = 0.5
    softness: float = 0.8
    smooth: int = 5
    device: str = "cpu"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not 0 < self.threshold < 1:
            raise ValueError(f"tool.threshold must be between 0 and 1, both excluded, got {self.threshold}")
        most = 2 * min(self.threshold, 1 - self.threshold)
        if not 0 <= self.softness <= most:
            raise ValueError(
                f"tool.softness must be between 0 and {most:g} with tool.threshold={self.threshold:g}, so that the "
                f"edge ends within the probabilities, got {self.softness}"
            )
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"tool.smooth must be 1, 3, 5 or another odd number of frames, got {self.smooth}")

    @cached_property
    def _network(self) -> u2net.U2NetSmall:
        try:
            return u2net.load().to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={self.device} cannot be used: {str(error).splitlines()[0]}") from error

    def prepare(self, clips: Sequence[FrameSequence]) -> None:
        """Load the network."""
        del clips
        _ = self._network

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks, of the size of their images."""
        del other
        if any(alpha is not None and alpha.values.mean() < _OPAQUE for alpha in clip.alphas()):
            yield from FromAlpha(missing="white").apply(clip, None)
            return
        sizes: deque[tuple[int, int]] = deque()
        for chance in medians(self._chances(clip, sizes), self.smooth):
            likely = enlarge(with_core(chance, self._low, self.threshold), sizes.popleft())
            yield Mask(self._edged(likely))

    @property
    def _low(self) -> float:
        return self.threshold - self.softness / 2

    def _chances(self, clip: FrameSequence, sizes: deque[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The network's probabilities for each frame, `(320, 320)` float32; width and height go to `sizes`."""
        for image in clip.images():
            sizes.append(image.rgb.size)
            yield self._chance(image.rgb)

    @torch.no_grad()
    def _chance(self, image: Image.Image) -> np.ndarray:
        return self._network(u2net.seen(image).to(self.device))[0, 0].cpu().numpy()

    def _edged(self, chance: np.ndarray) -> np.ndarray:
        if self.softness == 0:
            return (chance >= self.threshold).astype(np.float32)
        return ((chance - self._low) / self.softness).clip(0, 1).astype(np.float32)


def with_core(chance: np.ndarray, low: float, threshold: float) -> np.ndarray:
    """Probabilities of those connected parts alone that reach the threshold somewhere; 0 elsewhere.

    Args:
        chance: `(height, width)`, in [0, 1].
        low: From which a pixel belongs to a part.
        threshold: At least `low`.
    """
    parts, _ = ndimage.label(chance >= low)
    cores = np.unique(parts[chance >= threshold])
    return np.where(np.isin(parts, cores) & (parts > 0), chance, 0)


def medians(frames: Iterator[np.ndarray], window: int) -> Iterator[np.ndarray]:
    """The median over time around each frame, which is in the middle: at a clip's ends the window is narrower.

    A mean would trail behind what moves. The median of an edge that passes is that edge, and what is there or missing
    in less than half of the frames goes.

    Args:
        frames: Arrays of one shape.
        window: How many of them, an odd number.
    """
    held: deque[np.ndarray] = deque()
    middle = 0
    for frame in frames:
        held.append(frame)
        if len(held) - middle <= window // 2:
            continue
        yield _median(held, middle)
        middle += 1
        if middle > window // 2:
            held.popleft()
            middle -= 1
    for left in range(middle, len(held)):
        yield _median(held, left)


def _median(held: deque[np.ndarray], middle: int) -> np.ndarray:
    reach = min(middle, len(held) - 1 - middle)
    return np.median([held[n] for n in range(middle - reach, middle + reach + 1)], axis=0)
