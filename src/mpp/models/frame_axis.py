"""What stands on the frame axis of latents: the moments of a clip, or the layers of an image.

Whoever treats the two differently asks the object here, which `LatentSpec.frames` gives; nobody else tells them apart.
"""

from dataclasses import dataclass
from typing import ClassVar

_KEPT = 8  # moments of a clip that are kept as previews


@dataclass(frozen=True)
class Moments:
    """Frames follow one another in time; a single one is an image.

    Attributes:
        channels: Of the pixels that the VAE takes: RGB.
        has_layers: Whether a sample consists of an image and its layers.
    """

    channels: ClassVar[int] = 3
    has_layers: ClassVar[bool] = False

    def plays(self, frames: int) -> bool:
        """Whether so many frames are a clip."""
        return frames > 1

    def shown(self, frames: int, most: int = _KEPT) -> list[int]:
        """Numbers of the frames that stand for all: at most `most`, evenly spread, the first and last included."""
        count = min(frames, most)
        return [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]

    def compared(self, frames: int, given: int) -> list[int]:
        """Numbers of the latent frames whose regions are shown at the start of a run: the first that is learned."""
        return [next((number for number in self.shown(frames) if number >= given), 0)]

    def suffix(self, number: int) -> str:
        """What names a latent frame's preview file, besides its sample."""
        return f".frame{number}" if number else ""

    def name(self, number: int, frames: int) -> str:
        """What a latent frame is called; an only one has no name."""
        return f"latent frame {number}" if frames > 1 else ""

    def count(self, frames: int, stride: int) -> str:
        """So many latent frames in words, in pixel frames."""
        return f"{(frames - 1) * stride + 1} frames"

    def length(self, asked: int) -> int:
        """Frames of a generation for which so many are asked."""
        return asked


@dataclass(frozen=True)
class Layers:
    """Frames are the RGBA layers of one image from bottom to top, the whole image before them."""

    channels: ClassVar[int] = 4
    has_layers: ClassVar[bool] = True

    def plays(self, frames: int) -> bool:
        """Never: layers are no clip."""
        del frames
        return False

    def shown(self, frames: int, most: int = 0) -> list[int]:
        """All of them, however many."""
        del most
        return list(range(frames))

    def compared(self, frames: int, given: int) -> list[int]:
        """All that are learned."""
        return list(range(given, frames))

    def suffix(self, number: int) -> str:
        """Layers are numbered from 0; the whole image bears its sample's name alone."""
        return f".layer{number - 1}" if number else ""

    def name(self, number: int, frames: int) -> str:
        """As `suffix` numbers them."""
        del frames
        return f"layer {number - 1}" if number else "whole"

    def count(self, frames: int, stride: int) -> str:
        """The layers, without the whole image."""
        del stride
        return f"{frames - 1} {'layers' if frames > 2 else 'layer'}"

    def length(self, asked: int) -> int:
        """So many layers are asked for, and the whole image stands before them."""
        return asked + 1


FrameAxis = Moments | Layers
