"""Which images look alike, and whether a clip moves: from small greys of the previews.

An image's print is a difference hash in both directions, 128 bits: whether each of 9 x 8 greys is darker than its
right neighbour, and each of 8 x 9 than the one below. Two images are nearly the same where at most 16 bits differ and
8 x 8 colours agree to 16 of 255 levels on average. The same photo scaled, compressed again or a little brighter stays
within that; of the photos that come with scikit-image no two differ in fewer than 33 bits. Images that are
mostly flat have nothing to compare and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

_BITS, _LEVELS = 16, 16.0
_EDGE = 2  # levels by which a neighbour is darker; less is noise of compression
_EDGES = 32  # of the 128 neighbours that must differ at all, or the image shows nothing
_MOTION_SIDE = 32


@dataclass(frozen=True)
class Print:
    """What of an image is compared.

    Attributes:
        bits: The difference hash, two uint64.
        colours: 8 x 8 RGB, uint8.
    """

    bits: np.ndarray
    colours: np.ndarray


def open_small(path: Path, side: int) -> Image.Image:
    """A JPEG decoded at a fraction of its size, both sides at least `side` where it has as many.

    Raises:
        OSError: It is missing or damaged.
    """
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        return image.convert("RGB")


def print_of(image: Image.Image) -> Print | None:
    """An image's print; None where it is flat."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    steps = np.concatenate([(across[:, 1:] - across[:, :-1]).ravel(), (down[1:] - down[:-1]).ravel()])
    if (np.abs(steps) > _EDGE).sum() < _EDGES:
        return None
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
    return Print(np.packbits(steps > _EDGE).view(np.uint64), colours)


def near_duplicates(prints: Sequence[Print | None], origins: Sequence[str]) -> list[list[int]]:
    """Groups of nearly equal images, by their numbers; those of one origin are not compared.

    Args:
        prints: Of each image.
        origins: Of each: clips of one video, or an image and its mirror, share one.
    """
    known = np.array([number for number, one in enumerate(prints) if one is not None], dtype=np.int64)
    if not len(known):
        return []
    bits = np.stack([prints[number].bits for number in known])
    colours = np.stack([prints[number].colours for number in known]).astype(np.int16)
    numbers: dict[str, int] = {}
    own = np.array([numbers.setdefault(origins[number], len(numbers)) for number in known])
    labels = np.arange(len(known))  # the group of each
    for position in range(len(known)):
        others = slice(position + 1, None)
        near = np.bitwise_count(bits[others] ^ bits[position]).sum(1) <= _BITS
        found = position + 1 + np.flatnonzero(near & (own[others] != own[position]))
        found = found[np.abs(colours[found] - colours[position]).mean((1, 2, 3)) <= _LEVELS]
        joined = np.unique(labels[found])
        if len(joined) and (joined != labels[position]).any():
            labels[np.isin(labels, joined)] = labels[position]
    groups: dict[int, list[int]] = {}
    for number, label in zip(known.tolist(), labels.tolist(), strict=True):
        groups.setdefault(label, []).append(number)
    return sorted(group for group in groups.values() if len(group) > 1)


def motion(frames: Sequence[Image.Image]) -> float:
    """How far a clip's frames are from its first: mean difference in levels of 32 x 32 greys, the largest of them.

    Each frame's mean is taken off first, so that a fade is no motion.
    """
    size = (_MOTION_SIDE, _MOTION_SIDE)
    greys = [np.asarray(f.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32) for f in frames]
    greys = [grey - grey.mean() for grey in greys]
    return max((float(np.abs(grey - greys[0]).mean()) for grey in greys[1:]), default=0.0)
