"""What a preparation did, in numbers and words."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from textwrap import shorten

from mpp.cache.mask_facts import MaskDoubts
from mpp.media.geometry import MUCH_CROPPED
from mpp.preparing.planning import Job
from mpp.preparing.shards import Shard
from mpp.sources.folders import LeftOver
from mpp.sources.items import Item
from mpp.sources.passed import lines
from mpp.wording import duration, few

_SHOWN = 20
_HARDLY = 0.005
_WORDS = 60
_EMPTY = (
    "training learns nothing there, or under a floor (loss.mask_min_weight above 0) all of it, background included; "
    "its data.on_empty_mask says what becomes of them"
)


@dataclass
class Summary:
    """What a preparation did, counted per sample."""

    shard: Shard = field(default_factory=Shard)
    encoded: int = 0
    current: int = 0
    clips: int = 0
    videos: int = 0
    masks_written: int = 0
    masks_current: int = 0
    masks: Counter[str] = field(default_factory=Counter)
    texts_encoded: int = 0
    texts_current: int = 0
    texts_removed: int = 0
    no_caption: int = 0
    unread: dict[str, str] = field(default_factory=dict)
    in_srgb: set[str] = field(default_factory=set)
    misfits: set[str] = field(default_factory=set)
    enlarged: dict[str, float] = field(default_factory=dict)
    cropped: dict[str, float] = field(default_factory=dict)
    validation: int = 0
    prompts: int = 0
    doubts: MaskDoubts = field(default_factory=MaskDoubts)
    skipped: list[str] = field(default_factory=list)
    left_over: LeftOver = field(default_factory=lambda: LeftOver([], [], []))
    buckets: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    waiting: tuple[int, ...] = ()
    seconds: float = 0.0
    seconds_loading: float = 0.0

    def count(self, items: Sequence[Item], jobs: Sequence[Job]) -> None:
        """Count the samples that are there now, all of them."""
        used = {job.item.key for job in jobs}
        self.no_caption = sum(not item.captioned for item in items if item.key in used)
        self.videos = sum(item.video for item in items if item.key in used)
        for job in jobs:
            self.encoded += not job.latents_current
            self.current += job.latents_current
            self.masks_written += job.mask_kind is not None and not job.mask_current
            self.masks_current += job.mask_current
            geometry, clip = job.cut.geometry, job.cut.clip
            self.masks[job.mask_kind or "none"] += 1
            self.buckets[*geometry.size, 1 if clip is None else len(clip.frames)] += 1
            self.cropped[job.item.key] = geometry.cropped
            self.in_srgb |= {job.item.key} if job.in_srgb else set()
            self.misfits |= {job.item.key} if "misfit" in job.profiles else set()
            if geometry.scale > 1:
                self.enlarged[job.item.key] = geometry.scale
            self.clips += clip is not None
            self.validation += job.item.split == "val"

    def spent(self, stage: str, start: float) -> None:
        """Note the time of a stage that began at `start`."""
        self.stages[stage] = time.monotonic() - start

    def lines(self) -> list[str]:
        """The summary in words."""
        with_mask = sum(n for kind, n in self.masks.items() if kind != "none")
        kinds = ", ".join(f"{n} from {kind}" for kind, n in sorted(self.masks.items()) if kind != "none")
        total = self.encoded + self.current
        clips = f", {self.clips} of them clips of {self.videos} videos" if self.videos else ""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.stages.items())
        loading = f", {self.seconds_loading:.1f} s of it loading models" if self.seconds_loading else ""
        found = [
            f"samples: {total}{clips} ({self.encoded} encoded, {self.current} already current, {self.validation} for "
            f"validation), {len(self.skipped)} skipped",
            f"masks: {with_mask} of {total}{f' ({kinds})' if kinds else ''}, {self.masks_written} written, "
            f"{self.masks_current} already current; {total - with_mask} samples train everywhere",
            f"captions: {self.texts_encoded + self.texts_current} distinct ({self.texts_encoded} encoded, "
            f"{self.texts_current} already current), {self.no_caption} images and videos without one (empty caption)",
            *_unread(self.unread),
            *_colours(self.in_srgb, self.misfits),
            "buckets: " + ", ".join(f"{_size(bucket)}: {n}" for bucket, n in sorted(self.buckets.items())),
            f"time: {duration(self.seconds)}{loading} ({stages})",
        ]
        if self.texts_removed:
            found.insert(3, f"embeddings of {self.texts_removed} captions that are gone were removed")
        if self.prompts:
            found.insert(3, f"prompts for samples: {self.prompts}")
        found[1:1] = [*_cropped(self.cropped), *_enlarged(self.enlarged)]
        if self.shard.count > 1:
            found.insert(0, f"shard {self.shard} (from {self.shard.said_by})")
        found += [f"skipped: {reason}" for reason in few(self.skipped, _SHOWN)]
        found += self.doubts.lines(_EMPTY) + _left_over(self.left_over)
        if self.waiting:
            found.append(f"the index is written when these shards have finished too: {_shards(self)}")
        return found


def _cropped(left_out: dict[str, float]) -> list[str]:
    """What buckets leave out, [] where it is next to nothing."""
    most = max(left_out.values(), default=0.0)
    if most < _HARDLY:
        return []
    much = {key: part for key, part in left_out.items() if part > MUCH_CROPPED}
    mean = sum(left_out.values()) / len(left_out)
    named = (
        f"; above {MUCH_CROPPED:.0%}: {_ranked(much, '{:.0%}')}; a higher data.max_aspect keeps more" if much else ""
    )
    return [f"cropped: buckets leave out {mean:.1%} of the images' area on average, {most:.0%} at most{named}"]


def _enlarged(factors: dict[str, float]) -> list[str]:
    if not factors:
        return []
    return [
        f"enlarged: {len(factors)} images and videos are smaller than their bucket: {_ranked(factors, '{:.2f} times')}"
    ]


def _unread(words: dict[str, str]) -> list[str]:
    if not words:
        return []
    ends = [f"{name} ({shorten(text, _WORDS, placeholder=' ...')!r})" for name, text in sorted(words.items())]
    named = ", ".join(few(ends, _SHOWN))
    return [f"cut captions: {len(words)} are longer than what the text encoder reads; not read: {named}"]


def _colours(in_srgb: Collection[str], misfits: Collection[str]) -> list[str]:
    found = [f"colours: {len(in_srgb)} images have a profile and are converted to sRGB"] if in_srgb else []
    if misfits:
        names = ", ".join(few(sorted(misfits), _SHOWN))
        found.append(f"colours: {len(misfits)} images have a profile that does not fit them, ignored: {names}")
    return found


def _ranked(values: dict[str, float], form: str) -> str:
    """Names with their values, the greatest first."""
    ranked = sorted(values.items(), key=lambda row: (-row[1], row[0]))
    return ", ".join(few([f"{name} ({form.format(value)})" for name, value in ranked], _SHOWN))


def _left_over(left_over: LeftOver) -> list[str]:
    found = [f"passed over: {line}" for line in lines(left_over.passed)]
    if left_over.unused:
        names = ", ".join(few(left_over.unused, _SHOWN))
        found.append(f"without media, by their names (masks, control images, captions): {names}")
    if left_over.doubtful:
        names = ", ".join(few(left_over.doubtful))
        found.append(f"taken as media though called like masks, of media that are not there: {names}")
    return found


def _size(bucket: tuple[int, int, int]) -> str:
    width, height, frames = bucket
    return f"{width}x{height}" if frames == 1 else f"{width}x{height}x{frames}"


def _shards(summary: Summary) -> str:
    return ", ".join(f"{index}/{summary.shard.count}" for index in summary.waiting)
