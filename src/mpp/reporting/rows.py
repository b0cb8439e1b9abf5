"""What the page knows about each sample: its images, and what its mask comes to under a loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from mpp.cache.coverage import SampleCoverage, bucket_of, cover
from mpp.cache.format import Cache, CacheIdentity, made_from
from mpp.cache.index import Entry
from mpp.cache.mask_facts import MaskFacts
from mpp.cache.provenance import LatentsProvenance, TextProvenance
from mpp.core.loss import MaskedPriorLoss
from mpp.media.geometry import Geometry
from mpp.models.frame_axis import FrameAxis
from mpp.reporting.near_duplicates import Print, motion, open_small, print_of

_SMALL_SIDE = 64


@dataclass(frozen=True)
class View:
    """One image of a sample: itself, a key frame of a clip, or a layer.

    Attributes:
        name: How it is called; "" where it is the only one.
        frame: Its latent frame.
        image: Its preview; None where the cache has none.
        given: Whether the model is given this frame, which then belongs to neither region.
    """

    name: str
    frame: int
    image: Path | None
    given: bool


@dataclass(frozen=True)
class ReportRow:
    """One row of the report: a sample, and what was found out about it.

    Attributes:
        entry: Its row in the index.
        bucket: Size in pixels and number of frames or layers, in words.
        views: Its images.
        coverage: What its mask comes to; None where that cannot be said.
        mask: Facts about the mask; None as above.
        problem: Why there is no coverage.
        print: Of its image; None where there is none, or nothing to compare.
        motion: How far a clip's frames are from its first; None where that is not known.
        cropped: Share of the image's area that its bucket leaves out; None where that is not known.
        unread: Words of the caption that the text encoder does not read; "" also where that is not known.
    """

    entry: Entry
    bucket: str
    views: tuple[View, ...]
    coverage: SampleCoverage | None = None
    mask: MaskFacts | None = None
    problem: str | None = None
    print: Print | None = None
    motion: float | None = None
    cropped: float | None = None
    unread: str = ""


def look_at(cache: Cache, entry: Entry, loss: MaskedPriorLoss, identity: CacheIdentity) -> ReportRow:
    """One sample; a mask or preview that cannot be read is said in the record.

    Args:
        cache: The cache.
        entry: The sample.
        loss: Whose regions are measured.
        identity: The cache's.
    """
    given = identity.given_frames
    views = views_of(cache, entry, identity)
    made = made_from(cache.text_path(entry.text), TextProvenance)
    sample = ReportRow(
        entry,
        bucket_of(entry.shape, identity.latents),
        views,
        cropped=_cropped(cache, entry),
        unread="" if made is None else made.unread,
    )
    sample = _with_images(sample, identity.latents.frames)
    if entry.shape[1] <= given:
        return replace(sample, problem=f"all {entry.shape[1]} latent frames are given to the model: nothing to learn")
    try:
        mask = cache.mask(entry)[None, :, given:]
    except ValueError as error:
        return replace(sample, problem=str(error))
    return replace(sample, coverage=cover(loss, mask, entry), mask=MaskFacts.of(mask, loss))


def views_of(cache: Cache, entry: Entry, identity: CacheIdentity) -> tuple[View, ...]:
    """A sample's images: one for each layer, or for each key frame of a clip."""
    axis, frames, views = identity.latents.frames, entry.shape[1], []
    for number in axis.shown(frames):
        preview = cache.preview(entry.key, axis.suffix(number))
        views.append(View(axis.name(number, frames), number, preview, number < identity.given_frames))
    return tuple(views)


def mask_of(cache: Cache, sample: ReportRow) -> Tensor | None:
    """A sample's raw mask `(f, h, w)` in [0, 1], given frames included; None with a problem."""
    return None if sample.coverage is None else cache.mask(sample.entry)[0].clamp(0, 1)


def _cropped(cache: Cache, entry: Entry) -> float | None:
    made = made_from(cache.latents_path(entry.key), LatentsProvenance)
    return None if made is None else Geometry(made.geometry[:2], made.geometry[2:4]).cropped


def _with_images(sample: ReportRow, axis: FrameAxis) -> ReportRow:
    """With print and motion, and without the images that cannot be read."""
    small = [_small(view.image) for view in sample.views]
    views = tuple(
        view if image is not None else replace(view, image=None)
        for view, image in zip(sample.views, small, strict=True)
    )
    clip = axis.plays(len(views))
    shown = small[len(small) // 2 if clip else 0]  # clips often begin with a black frame
    moved = motion(small) if clip and None not in small else None
    return replace(sample, views=views, print=None if shown is None else print_of(shown), motion=moved)


def _small(path: Path | None) -> Image.Image | None:
    try:
        return None if path is None else open_small(path, _SMALL_SIDE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def used_for_training(samples: Sequence[ReportRow]) -> list[SampleCoverage]:
    """Coverage of the training samples that have one."""
    return [s.coverage for s in samples if s.entry.split == "train" and s.coverage is not None]
