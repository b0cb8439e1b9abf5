"""One self-contained HTML page from samples, findings and charts."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mpp import __version__
from mpp.cache.coverage import Coverage, mode_of, step_cost
from mpp.cache.format import Cache, CacheIdentity
from mpp.core.loss import MaskedPriorLoss
from mpp.media.region_colours import HATCHING, LEARNED, OPACITY, PRESERVED, WORDS
from mpp.reporting.charts import bins_of, charts_of
from mpp.reporting.findings import Finding
from mpp.reporting.inline import Lines, filled
from mpp.reporting.rows import ReportRow, mask_of, used_for_training
from mpp.wording import few

MARK = '<meta name="generator" content="mpp report">'
_STYLES = ("page.css", "samples.css")
_SCRIPTS = (
    "elements.js", "data.js", "rule.js", "regions.js", "draw.js", "charts.js", "cards.js", "detail.js", "overview.js",
    "controls.js", "settings.js", "main.js",
)  # fmt: skip
_PIXELS = 60e6  # of all images together: about 12 MB of JPEG
_SIDES = 112, 512
_LINES = 500  # of one finding
_MASKS = 24e6  # bytes of all masks together; of clips beyond them the key frames are embedded
_CLASS = "plain", MaskedPriorLoss()
_COSTS = {  # of steps where the teacher runs for all samples, over those without it: long videos, small images
    "checkpointed": step_cost(1, gradient_checkpointing=True),
    "kept": step_cost(1, gradient_checkpointing=False),
}
_COLOURS = {
    "learned": LEARNED, "preserved": PRESERVED, "hatching": HATCHING, "opacity": OPACITY, "words": WORDS,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a page is about.

    Attributes:
        cache: The cache.
        identity: Its identity.
        loss: Whose regions are shown.
        preset: What the loss is said against in commands: a preset's name and the preset itself.
        total: Samples in the cache.
        made: When, in words.
    """

    cache: Cache
    identity: CacheIdentity
    loss: MaskedPriorLoss
    preset: tuple[str, MaskedPriorLoss] | None
    total: int
    made: str


def render(subject: Subject, samples: Sequence[ReportRow], findings: Sequence[Finding], shown: Sequence[int]) -> str:
    """The page.

    Args:
        subject: What it is about.
        samples: All samples that were looked at, at least one.
        findings: About them.
        shown: Numbers of those that the page holds, ascending.
    """
    charts = charts_of(samples)
    buckets = {label: number for number, label in enumerate(charts[-1].labels)}
    images, masks = Lines(), Lines()
    side = image_side(sum(view.image is not None for number in shown for view in samples[number].views))
    said = _said(findings)
    rows = []
    for number in tqdm(shown, desc="images", unit="sample", disable=None):
        sample = samples[number]
        row = _row(subject, sample, side, images, masks)
        rows.append(row | {"bins": bins_of(sample, buckets), "findings": said.get(number, [])})
    data = _summary(subject, samples) | {
        "charts": [asdict(chart) for chart in charts],
        "findings": [_finding(finding, set(shown)) for finding in findings],
        "samples": rows,
        "colours": _COLOURS,
    }
    return filled("page.html", _STYLES, _SCRIPTS, data, images=images, masks=masks)


def image_side(count: int) -> int:
    """Longest side in pixels at which `count` images are embedded: the more, the smaller."""
    low, high = _SIDES
    return int(min(high, max(low, math.sqrt(_PIXELS / max(1, count)))))


def _summary(subject: Subject, samples: Sequence[ReportRow]) -> dict[str, Any]:
    training = used_for_training(samples)
    coverage = Coverage.of(training) if training else None
    kinds = [sample.entry.mask or "none" for sample in samples]
    splits = [sample.entry.split for sample in samples]
    return {
        "cache": str(subject.cache.folder),
        "family": subject.identity.family,
        "version": __version__,
        "made": subject.made,
        "loss": _loss(subject),
        "total": subject.total,
        "scanned": len(samples),
        "coverage": None if coverage is None else {"learn": coverage.learn, "preserve": coverage.preserve},
        "teacher": {"share": None if coverage is None else coverage.taught, "costs": _COSTS},
        "masks": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "splits": {split: splits.count(split) for split in ("train", "val")},
    }


def _loss(subject: Subject) -> dict[str, Any]:
    name, preset = subject.preset or _CLASS
    return {
        "name": subject.preset[0] if subject.preset else None,
        "mode": mode_of(subject.loss),
        "settings": vars(subject.loss),
        "preset": {"name": name, "settings": vars(preset)},
    }


def _said(findings: Sequence[Finding]) -> dict[int, list[tuple[int, str, int]]]:
    """For each sample the findings that concern it: which, its note, and its place among the samples concerned."""
    said: dict[int, list[tuple[int, str, int]]] = {}
    for position, finding in enumerate(findings):
        for rank, (number, note) in enumerate(zip(finding.samples, finding.notes, strict=True)):
            said.setdefault(number, []).append((position, note, rank))
    return said


def _finding(finding: Finding, shown: set[int]) -> dict[str, Any]:
    lines = few(finding.lines, _LINES)
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "title": finding.title,
        "remedy": finding.remedy,
        "count": finding.count,
        "lines": lines,
        "hidden": sum(number not in shown for number in finding.samples),
    }


def _row(subject: Subject, sample: ReportRow, side: int, images: Lines, masks: Lines) -> dict[str, Any]:
    """A sample as the page's script reads it; its images and its mask go into the text blocks."""
    entry, coverage, mask = sample.entry, sample.coverage, sample.mask
    own = mask is not None and entry.mask is not None
    clip = subject.identity.latents.frames.plays(entry.shape[1])
    mask_line, held = _embed(mask_of(subject.cache, sample), sample, subject.identity.given_frames, masks)
    stride = subject.identity.latents.spatial_stride
    return {
        "key": entry.key,
        "origin": entry.origin,
        "split": entry.split,
        "caption": entry.caption,
        "variants": entry.variants,
        "mask": entry.mask,
        "flip": entry.flip,
        "repeats": entry.repeats,
        "clip": entry.shape[1] if clip else 0,
        "cells": entry.shape[2:],
        "size": [entry.shape[3] * stride, entry.shape[2] * stride],
        "learn": None if coverage is None else coverage.learn,
        "preserve": None if coverage is None else coverage.preserve,
        "taught": None if coverage is None else coverage.taught,
        "problem": sample.problem,
        "range": [mask.lowest, mask.highest] if own else None,
        "values": [(n, round(share, 4)) for n, share in enumerate(mask.values) if share] if own else [],
        "frames": [[round(value, 4) for value in pair] for pair in mask.frames] if mask and clip else None,
        "views": [
            {
                "name": view.name,
                "frame": view.frame,
                "given": view.given,
                "image": _image(view.image, side, images),
            }
            for view in sample.views
        ],
        "raw": mask_line,
        "held": held,
        "whole": len(held) == entry.shape[1] - subject.identity.given_frames,
    }


def _embed(mask: Tensor | None, sample: ReportRow, given: int, masks: Lines) -> tuple[int | None, list[int]]:
    """Put a sample's mask into its text block; the line, and the latent frames that it holds."""
    if mask is None:
        return None, []
    held = list(range(given, len(mask)))
    packed = pack_floats(mask[held].numpy())
    if masks.size + len(packed) * 4 / 3 > _MASKS and len(sample.views) < len(mask):
        held = [view.frame for view in sample.views if not view.given]
        packed = pack_floats(mask[held].numpy())
    return masks.put(packed), held


def pack_floats(values: np.ndarray) -> bytes:
    """Compressed float32: first the lowest byte of each number, then the second, ..., which compress best apart."""
    little = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    return zlib.compress(little.view(np.uint8).reshape(-1, 4).T.tobytes(), 9)


def _image(path: Path | None, side: int, images: Lines) -> int | None:
    """Embed a preview; None where it cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            return images.put_image(image, side)
    except (OSError, ValueError, SyntaxError):
        return None
