"""Which samples an image or video makes, and what of them is current in the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mpp.cache.fingerprints import Fingerprints, Timelines
from mpp.cache.format import Cache, made_from, text_name
from mpp.cache.index import Entry
from mpp.cache.provenance import LatentsProvenance, MaskProvenance, Source
from mpp.media.colours import Profile
from mpp.media.geometry import Buckets, Geometry
from mpp.media.images import image_head, read_image
from mpp.models.contract import Architecture, Identity
from mpp.preparing.frames import (
    Cut,
    check_controls,
    check_layers,
    check_masks,
    frame_files,
    mask_kind,
    mask_sources,
    moves,
    transparent,
)
from mpp.preparing.unsynced import Unsynced
from mpp.sources.items import Item
from mpp.sources.source import FolderSource


@dataclass(frozen=True)
class Job:
    """One cache sample to make sure of.

    Attributes:
        key: Of the sample.
        item: What it is made from.
        cut: Which part of it.
        shape: Latent shape.
        mask_kind: Where its mask comes from, or None.
        latents_current: Whether its latents are in the cache.
        mask_current: Whether its mask is.
        has_alpha: Whether the image has an alpha that is not opaque.
        images: Shapes of its image conditioning.
        seen: Identities of the images that the text encoder sees.
        profiles: What becomes of the colour profiles of its image files.
    """

    key: str
    item: Item
    cut: Cut
    shape: tuple[int, int, int, int]
    mask_kind: str | None
    latents_current: bool
    mask_current: bool
    has_alpha: bool
    images: dict[str, tuple[int, ...]]
    seen: tuple[str, ...]
    profiles: tuple[Profile, ...]

    @property
    def in_srgb(self) -> bool:
        """Whether colours of one of its files are converted to sRGB."""
        return "converted" in self.profiles

    def entry(self) -> Entry:
        """Its row in the index."""
        return Entry(
            key=self.key,
            split=self.item.split,
            shape=self.shape,
            text=text_name(self.item.caption, self.seen),
            caption=self.item.caption,
            mask=self.mask_kind,
            flip=self.cut.geometry.flip,
            images=self.images,
            seen=self.seen,
            source=self.item.key if self.cut.clip is not None else "",
            repeats=self.item.repeats,
            variants=self.item.variants,
        )


class Planner:
    """Plans samples; decodes what is not current, so that errors come before encoding.

    Args:
        source: Settings of buckets, clips and masks.
        architecture: Whose latents are cached.
        cache: Where they are.
        identity: Of the model's weights.
        fingerprints: Of this run.
        unsynced: What an interrupted preparation may have left.
    """

    def __init__(
        self,
        source: FolderSource,
        architecture: Architecture,
        cache: Cache,
        identity: Identity,
        fingerprints: Fingerprints,
        *,
        unsynced: Unsynced,
    ) -> None:
        self.source, self.architecture, self.cache = source, architecture, cache
        self.identity, self.fingerprints, self.unsynced = identity, fingerprints, unsynced
        self.buckets = Buckets(source.resolution, architecture.latents.pixel_step, source.max_aspect)
        self.timelines = Timelines(cache.folder / "timelines", fingerprints)
        self._head = lru_cache(maxsize=64)(image_head)  # for what is asked of one image several times

    def jobs(self, item: Item) -> list[Job]:
        """The samples of one item.

        Raises:
            ValueError: Something about it cannot be used.
        """
        check_controls(item, self.architecture.images)
        cuts = self._clips(item) if item.video else self._whole(item)
        current = [self._current_latents(item, cut) for cut in cuts]
        known = next((made for made in current if made), None)
        prepared = known is not None and all(current)
        has_alpha = known.alpha if prepared else self._decode(item, cuts[0])
        kind = mask_kind(item, transparent=has_alpha)
        if kind is None and item.require_mask:
            raise ValueError(f"{item.media}: no mask, and data.require_mask=true; add one or leave it out")
        return [self._job(item, cut, made, kind, has_alpha=has_alpha) for cut, made in zip(cuts, current, strict=True)]

    def _whole(self, item: Item) -> list[Cut]:
        """An image, and its mirror."""
        model = self.architecture
        check_layers(item, model.latents)
        if len(frame_files(item)) < model.least_frames:
            raise ValueError(
                f"{item.media}: this model sees the first frame and learns from clips of at least {model.least_frames} "
                "latent frames; images hold nothing for it to learn: give it videos, or choose a model that starts "
                "from text"
            )
        return [Cut(geometry) for geometry in self._geometries(item, self._head(item.media).size)]

    def _clips(self, item: Item) -> list[Cut]:
        """The clips of a video, each with its mirror."""
        model = self.architecture
        self._check_lengths(item)
        timeline = self.timelines.of(item.media)
        mask = self.timelines.of(item.mask, mask=True) if moves(item.mask) else None
        fps = self.source.clips.fps or model.fps
        clips = self.source.clips.of(timeline, str(item.media), fps, item.starts)
        geometries = self._geometries(item, timeline.size)
        return [Cut(geometry, clip, timeline, mask) for clip in clips for geometry in geometries]

    def _check_lengths(self, item: Item) -> None:
        """Refuse clips that the model cannot learn from."""
        model, clips = self.architecture, self.source.clips
        try:
            clips.check(model.latents)
        except ValueError as error:
            raise ValueError(f"{item.media}: {error}") from error
        least = (model.least_frames - 1) * model.latents.temporal_stride + 1
        if min(clips.frames) < least:
            raise ValueError(
                f"data.clips.frames={list(clips.frames)}: this model sees the first frame, so its clips have at least "
                f"{least} frames; leave out the shorter ones"
            )

    def _geometries(self, item: Item, size: tuple[int, int]) -> list[Geometry]:
        flips = [False, True] if self.source.flip and item.split == "train" else [False]
        return [Geometry(size, self.buckets.choose(*size), flip) for flip in flips]

    def _decode(self, item: Item, cut: Cut) -> bool:
        """Read an image's files whole; videos were, for their timelines. Returns whether it has an alpha."""
        if cut.media is not None:
            return cut.media.transparent
        for path in (*item.layers, *item.controls):
            read_image(path)
        return transparent(read_image(item.media))

    def _job(self, item: Item, cut: Cut, made: LatentsProvenance | None, kind: str | None, *, has_alpha: bool) -> Job:
        spec = self.architecture.latents
        key = key_of(item, cut)
        frames = len(cut.clip.frames) if cut.clip is not None else len(frame_files(item))
        shape = spec.shape(frames, cut.geometry.size[1], cut.geometry.size[0])
        mask_current = kind is not None and self._mask_current(key, item, cut, kind, shape)
        if not mask_current:
            check_masks(item, cut)
        return Job(
            key=key,
            item=item,
            cut=cut,
            shape=shape,
            mask_kind=kind,
            latents_current=made is not None,
            mask_current=mask_current,
            has_alpha=has_alpha,
            images=dict(made.images) if made else {},
            seen=self._seen(item, cut),
            profiles=self._profiles(item),
        )

    def _seen(self, item: Item, cut: Cut) -> tuple[str, ...]:
        """Identities of the images that the text encoder sees, () where it sees none."""
        inputs = self.architecture.images
        if not inputs.in_text:
            return ()
        files, geometry = item.controls, list(cut.numbers)
        if inputs.first_frame:
            files = (item.media,)
        first = "" if cut.clip is None else f" frame {cut.clip.frames[0]}"
        # what tells an image whose colours are converted from the same one as earlier versions read it
        srgb = {path: " sRGB" for path in image_files(item) if self._head(path).profile == "converted"}
        return tuple(f"{self.fingerprints.content(path)} {geometry}{first}{srgb.get(path, '')}" for path in files)

    def _profiles(self, item: Item) -> tuple[Profile, ...]:
        return tuple(self._head(path).profile for path in image_files(item))

    def _current_latents(self, item: Item, cut: Cut) -> LatentsProvenance | None:
        """What a sample's latents were made from; None where they are not what would be made now."""
        key = key_of(item, cut)
        made = made_from(self.cache.latents_path(key), LatentsProvenance)
        if made is None or not self.cache.preview_path(key).is_file():
            return None
        if made.images and made_from(self.cache.images_path(key), LatentsProvenance) != made:
            return None
        wanted = LatentsProvenance(
            (), cut.numbers, cut.frames, self.identity.vae, srgb="converted" in self._profiles(item)
        )
        files = [self.cache.latents_path(key), self.cache.preview_path(key), self.cache.images_path(key)]
        current = self.fingerprints.current(made, wanted, source_files(item)) and all(map(self.unsynced.trusts, files))
        return made if current else None

    def _mask_current(self, key: str, item: Item, cut: Cut, kind: str, shape: Sequence[int]) -> bool:
        made = made_from(self.cache.mask_path(key), MaskProvenance)
        wanted = mask_provenance(item, cut, kind, shape)
        current = self.fingerprints.current(made, wanted, mask_sources(item))
        return current and self.unsynced.trusts(self.cache.mask_path(key))


def key_of(item: Item, cut: Cut) -> str:
    """Name of the sample that a cut of an item makes."""
    clip = "" if cut.clip is None else f"@{cut.clip.name}"
    return f"{item.key}{clip}{'@flip' if cut.geometry.flip else ''}"


def source_files(item: Item) -> tuple[Path, ...]:
    """The files that a sample's latents and image conditioning are made from."""
    return (*frame_files(item), *item.controls)


def image_files(item: Item) -> tuple[Path, ...]:
    """Those of them that are images: videos and folders of frames keep their colours as they are."""
    return source_files(item)[item.video :]


def mask_provenance(
    item: Item, cut: Cut, kind: str, shape: Sequence[int], sources: tuple[Source, ...] = ()
) -> MaskProvenance:
    """What a sample's mask is made from and how, for latents of a shape."""
    return MaskProvenance(sources, cut.numbers, cut.frames, kind, tuple(shape[1:]), item.invert)
