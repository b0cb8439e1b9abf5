"""Judges of toy images, by their pixels alone.

They know the world's rules and what a caption asked for, never how an image was made. Thresholds were set on
rendered scenes, which all pass, and on scenes broken on purpose, which all fail (`tests/benchmarks`).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from benchmarks.phantom_limb.world import (
    COLOURS,
    CORE_RATIO,
    NAMED_TEXTURES,
    PALETTES,
    RADIUS,
    SHAPES,
    SIZE,
    TEXTURES,
    Colour,
    Subject,
    shape_coverage,
    texture_blend,
)

CHROMA = 0.36  # an object's pixels have more, a palette's less than 0.3
SPECK = 4  # pixels; smaller spots are ignored
COLOUR_RADIUS = 0.30  # in RGB
COLOUR_SHARE = 0.90
SHAPE_IOU = 0.85
GROUND_RADIUS = 0.12  # in RGB
GROUND_SHARE = 0.05  # of the background's pixels may be off
ANCHOR_RADIUS = 0.45  # in RGB
SUBJECT_IOU = 0.60
BYSTANDER_PIXELS = 8
SUBJECT_GROUND_SHARE = 0.10  # of each of the two colours


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Masks dilated by a square, (B, H, W) bool."""
    return functional.max_pool2d(mask[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def objects(images: Tensor) -> Tensor:
    """Which pixels are saturated, which is where objects are, (B, H, W) bool."""
    return (images.amax(1) - images.amin(1)) > CHROMA


# ---------------------------------------------------------------- whole objects


def object_faults(images: Tensor, captions: list[str]) -> list[str]:
    """What is wrong with each image's object: `count`, `colour`, `shape`, or nothing.

    A caption with `nothing` wants no object, all others exactly one, whole, of the named shape and colour. Where no
    shape or colour is named, any of the world's will do.
    """
    return [
        _object_fault(image, mask, caption.split())
        for image, mask, caption in zip(images, objects(images), captions, strict=True)
    ]


def _object_fault(image: Tensor, mask: Tensor, words: list[str]) -> str:
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(mask.numpy(), labels, range(1, count + 1)) if count else np.zeros(0)
    large = np.flatnonzero(areas >= SPECK) + 1
    wanted = 0 if "nothing" in words else 1
    if len(large) != wanted:
        return "count"
    if wanted == 0:
        return ""
    body = torch.from_numpy(labels == large[0])
    inside = torch.from_numpy(ndimage.binary_erosion(body.numpy()))
    if not inside.any():
        return "shape"
    allowed = torch.tensor([COLOURS[w] for w in words if w in COLOURS] or list(COLOURS.values()))
    right = torch.cdist(image[:, inside].T, allowed) <= COLOUR_RADIUS
    if right.float().mean(0).max() < COLOUR_SHARE:
        return "colour"
    templates, kinds = _shape_templates()
    best = int(_overlap(templates, body.flatten()[None].float())[0].argmax())
    fits = float(_overlap(templates[best : best + 1], body.flatten()[None].float())) >= SHAPE_IOU
    return "" if fits and SHAPES[kinds[best]] in ([w for w in words if w in SHAPES] or SHAPES) else "shape"


@cache
def _shape_templates() -> tuple[Tensor, list[int]]:
    """Every shape at every half-pixel place within the image, in sizes near the world's: (T, H * W) and its kind."""
    axis = torch.arange(5.0, SIZE - 4.9, 0.5)
    sizes = torch.tensor([RADIUS - 0.5, RADIUS - 0.25, RADIUS, RADIUS + 0.25])
    kind, x, y, size = (
        g.flatten() for g in torch.meshgrid(torch.arange(float(len(SHAPES))), axis, axis, sizes, indexing="ij")
    )
    pixels = shape_coverage(kind.long(), torch.stack([x, y], 1), size) > 0.5
    return pixels.flatten(1).float(), kind.long().tolist()


def _overlap(templates: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of (T, N) templates with (B, N) masks, (B, T)."""
    both = masks @ templates.T
    return both / (templates.sum(1) + masks.sum(1, keepdim=True) - both).clamp(min=1)


# ---------------------------------------------------------------- backgrounds


def background_off(images: Tensor, captions: list[str]) -> Tensor:
    """Share of each image's background that is off the named texture and palette, (B,).

    What is not named may be any of the world's. Objects, grown by two pixels, are no background; an image that has
    none left is all off.
    """
    free = ~grow(objects(images), 2)
    shares = []
    for image, where, caption in zip(images, free, captions, strict=True):
        words = caption.split()
        textures = [w for w in words if w in NAMED_TEXTURES] or NAMED_TEXTURES
        palettes = [w for w in words if w in PALETTES] or PALETTES
        if where.float().mean() < 0.1:
            shares.append(1.0)
            continue
        wanted = torch.stack([_ground(texture, palette) for texture in textures for palette in palettes])
        error = torch.linalg.vector_norm(wanted - image, dim=1)[:, where]
        shares.append(float((error > GROUND_RADIUS).float().mean(1).min()))
    return torch.tensor(shares)


@cache
def _ground(texture: str, palette: str) -> Tensor:
    first, second = (torch.tensor(colour)[:, None, None] for colour in PALETTES[palette])
    return first + texture_blend(torch.tensor([TEXTURES.index(texture)])) * (second - first)


# ---------------------------------------------------------------- the subject


@dataclass(frozen=True)
class Found:
    """What of a subject, and of its company, was found in a batch of images.

    Attributes:
        success: Whether a whole subject is there, (B,) bool.
        location: Where the best match lies, (B, H, W) bool; nowhere if there is none.
        phantom: Pixels in the subject's colours away from the best match, a pixel of margin allowed, (B,).
        area: All pixels in the subject's colours, (B,).
        bystander: Whether its bystander is there, (B,) bool.
        ground: Whether its checkers are there, (B,) bool.
    """

    success: Tensor
    location: Tensor
    phantom: Tensor
    area: Tensor
    bystander: Tensor
    ground: Tensor


def find(images: Tensor, subject: Subject) -> Found:
    """Look for a subject at every place, with its ring and core each overlapping by at least `SUBJECT_IOU`.

    The overlap is judged within two pixels of the place, so that what lies elsewhere does not count against it: that
    is what `phantom` counts.
    """
    names = _nearest(images, subject)
    ring, core = (names == 0).float(), (names == 1).float()
    whole, inner, near = _subject_templates(subject.shape)
    outer = whole - inner

    def local(templates: Tensor, mask: Tensor) -> Tensor:
        both, here = mask @ templates.T, mask @ near.T
        return both / (templates.sum(1) + here - both).clamp(min=1)

    score, best = torch.minimum(local(outer, ring), local(inner, core)).max(1)
    shape = (-1, *images.shape[-2:])
    location = (whole[best].view(shape) > 0) & (score > 0)[:, None, None]
    coloured = ((ring + core) > 0).view(shape)
    grounds = torch.stack([(names == k).float().mean(1) for k in (3, 4)])
    return Found(
        success=score >= SUBJECT_IOU,
        location=location,
        phantom=(coloured & ~grow(location, 1)).flatten(1).sum(1),
        area=coloured.flatten(1).sum(1),
        bystander=(names == 2).sum(1) >= BYSTANDER_PIXELS,
        ground=grounds.amin(0) >= SUBJECT_GROUND_SHARE,
    )


def _nearest(images: Tensor, subject: Subject) -> Tensor:
    """Nearest colour of every pixel: 0 subject, 1 core, 2 bystander, 3 and 4 its ground; -1 the world's or none."""
    own: list[Colour] = [subject.colour, subject.core, subject.bystander, *subject.ground]
    anchors = torch.tensor([*own, *COLOURS.values(), *(colour for pair in PALETTES.values() for colour in pair)])
    distance, index = torch.cdist(images.flatten(2).transpose(1, 2), anchors).min(-1)
    return torch.where((distance <= ANCHOR_RADIUS) & (index < len(own)), index, -1)


@cache
def _subject_templates(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """A subject, its core, and its surroundings of two pixels at every half-pixel place, each (T, H * W)."""
    axis = torch.arange(5.0, SIZE - 4.9, 0.5)
    x, y = (g.flatten() for g in torch.meshgrid(axis, axis, indexing="ij"))
    centre = torch.stack([x, y], 1)
    kind = torch.full((len(x),), SHAPES.index(shape))
    whole = shape_coverage(kind, centre) > 0.5
    inner = shape_coverage(torch.zeros_like(kind), centre, CORE_RATIO * RADIUS) > 0.5
    return whole.flatten(1).float(), inner.flatten(1).float(), grow(whole, 2).flatten(1).float()
