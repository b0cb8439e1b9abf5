"""What looks wrong about a set of masks under a loss, with a remedy for each."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from mpp.cache import mask_facts
from mpp.cache.format import Notes
from mpp.cache.mask_facts import WHITE, MaskFacts, MaskLook
from mpp.core.loss import MaskedPriorLoss
from mpp.media.geometry import MUCH_CROPPED
from mpp.reporting.near_duplicates import near_duplicates
from mpp.reporting.rows import ReportRow
from mpp.wording import few

Severity = Literal["error", "warning", "info"]
_Note = Callable[[ReportRow, MaskedPriorLoss], str | None]

_MOTION = 8.0  # levels, see near_duplicates.motion
_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One kind of thing that looks wrong.

    Attributes:
        kind: Its name in the page's address.
        severity: `error`: training would fail or learn nothing there; `warning`: most often a mistake; `info`: a hint.
        title: What it is.
        remedy: Why it matters and what to do.
        samples: Numbers of the samples concerned, those of one group next to each other.
        notes: For each of them what is particular to it; "" for nothing.
        lines: What is concerned besides samples: files, reasons.
    """

    kind: str
    severity: Severity
    title: str
    remedy: str
    samples: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Samples or lines concerned."""
        return len(self.samples) or len(self.lines)


@dataclass(frozen=True)
class _Rule:
    """A finding that a sample has or has not: its note, or None; `under` says before the remedy what a loss does."""

    kind: str
    severity: Severity
    title: str
    remedy: str
    note: _Note
    under: Callable[[MaskedPriorLoss], str] = lambda _: ""


def find(samples: Sequence[ReportRow], loss: MaskedPriorLoss, notes: Notes) -> list[Finding]:
    """All findings that concern something, the worst first."""
    found = [*_left_out(notes), *_missing(samples, loss), *_settings(loss)]
    for rule in _RULES:
        said = [(number, note) for number, s in enumerate(samples) if (note := rule.note(s, loss)) is not None]
        if said:
            numbers, texts = zip(*said, strict=True)
            found.append(Finding(rule.kind, rule.severity, rule.title, rule.under(loss) + rule.remedy, numbers, texts))
    found += _duplicates(samples)
    order: list[Severity] = ["error", "warning", "info"]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _left_out(notes: Notes) -> Iterator[Finding]:
    aspect = tuple(reason for reason in notes.skipped if "another aspect ratio" in reason)
    others = tuple(reason for reason in notes.skipped if "another aspect ratio" not in reason)
    if aspect:
        remedy = "These media are not in the cache. Export each mask at its image's aspect ratio and prepare again."
        yield Finding("off_aspect", "error", "Mask has another shape", remedy, lines=aspect)
    if others:
        remedy = "These media are not in the cache. Mend or remove them and prepare again."
        yield Finding("skipped", "error", "Left out by prepare", remedy, lines=others)
    if notes.unused:
        remedy = "Masks, control images, caption files or rows of a table. Most often a misspelt name."
        yield Finding("unused", "warning", "Mask without media", remedy, lines=notes.unused)


def _missing(samples: Sequence[ReportRow], loss: MaskedPriorLoss) -> Iterator[Finding]:
    bare = tuple(number for number, sample in enumerate(samples) if sample.entry.mask is None)
    if not bare or (len(bare) == len(samples) and loss.prior_weight == 0):
        return
    if len(bare) == len(samples):
        remedy = "The prior never applies: prepare with data.mask_dir, or choose loss=plain."
    else:
        remedy = "They train on the whole image, background included. Add masks, or set data.require_mask=true."
    yield Finding("missing", "warning", "No mask", remedy, bare, ("",) * len(bare))


def _settings(loss: MaskedPriorLoss) -> Iterator[Finding]:
    if advice := loss.advice():
        remedy = "Allowed, and rarely meant."
        yield Finding("settings", "warning", "Settings of the loss", remedy, lines=tuple(advice))


def _duplicates(samples: Sequence[ReportRow]) -> Iterator[Finding]:
    groups = near_duplicates([sample.print for sample in samples], [sample.entry.origin for sample in samples])
    notes = {number: note for group in groups for number, note in _likes(samples, group)}
    if notes:
        remedy = "Each counts as a sample of its own, so this image weighs more; in validation it is no test. Keep one."
        yield Finding("duplicate", "warning", "Near duplicate", remedy, tuple(notes), tuple(notes.values()))


def _likes(samples: Sequence[ReportRow], group: Sequence[int]) -> Iterator[tuple[int, str]]:
    """For each sample of a group which others it is like; a few are named."""
    origins = Counter(samples[number].entry.origin for number in group)
    for number in group:
        own = samples[number]
        others = (samples[n] for n in group if samples[n].entry.origin != own.entry.origin)
        names = [f"{other.entry.key}{_across(own, other)}" for other in islice(others, _NAMED)]
        total = len(group) - origins[own.entry.origin]
        yield number, f"like {', '.join(few(names, _NAMED, total))}"


def _across(sample: ReportRow, other: ReportRow) -> str:
    if sample.entry.split == other.entry.split:
        return ""
    return " (in validation)" if other.entry.split == "val" else " (in training)"


def _own(sample: ReportRow) -> MaskFacts | None:
    """Facts about a mask that the sample has itself."""
    return sample.mask if sample.entry.mask is not None else None


def _about_masks(rule: Callable[[MaskLook, MaskedPriorLoss], str | None]) -> _Note:
    """A rule about masks as one about samples."""

    def note(sample: ReportRow, loss: MaskedPriorLoss) -> str | None:
        mask = _own(sample)
        return None if mask is None else rule(mask, loss)

    return note


def _unreadable(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    return sample.problem


def _still_mask(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    mask = _own(sample)
    if mask is None or not mask.still or sample.motion is None or sample.motion < _MOTION:
        return None
    return "" if mask.lowest <= WHITE and mask.highest >= 1 - WHITE else None


def _cropped(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    share = sample.cropped
    return f"{share:.0%} of the image" if share is not None and share > MUCH_CROPPED else None


def _cut_caption(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    return f"not read: {sample.unread}" if sample.unread else None


def _no_caption(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    return None if any(text.strip() for text in (sample.entry.caption, *sample.entry.variants)) else ""


def _no_preview(sample: ReportRow, _: MaskedPriorLoss) -> str | None:
    lacking = [view.name for view in sample.views if view.image is None]
    return ", ".join(lacking) if lacking else None


_RULES = (
    _Rule(
        "unreadable",
        "error",
        "Cannot be read",
        "Training would stop here. Run prepare again.",
        _unreadable,
    ),
    _Rule(
        "empty",
        "error",
        "Empty mask",
        "Draw the mask, drop the image, or set data.on_empty_mask=skip for training.",
        _about_masks(mask_facts.empty),
        lambda loss: f"All black: {mask_facts.black_under(loss)}. ",
    ),
    _Rule(
        "below_threshold",
        "error",
        "All below the threshold",
        "The whole mask lies below loss.prior_threshold. Lower the threshold, or raise the mask's values.",
        _about_masks(mask_facts.below_threshold),
    ),
    _Rule(
        "above_threshold",
        "warning",
        "Nothing below the threshold",
        "No part of the mask lies below loss.prior_threshold, so the teacher is skipped. A floor may be baked into the "
        "mask: remove it, or raise the threshold above it.",
        _about_masks(mask_facts.above_threshold),
    ),
    _Rule(
        "full",
        "warning",
        "Full mask",
        "All white: the background is learned too, nothing is preserved, the teacher is skipped.",
        _about_masks(mask_facts.full),
    ),
    _Rule(
        "tiny",
        "warning",
        "Tiny mask",
        "Less than 0.5 % of the area or 2 latent cells learn, and each counts for very much. Choose a higher "
        "resolution, crop the image, or set loss.area_scale_beta=0.5.",
        _about_masks(mask_facts.tiny),
    ),
    _Rule(
        "inverted",
        "warning",
        "Looks inverted",
        "The border learns and the centre is preserved, while white is what is learned. Invert the mask "
        "(data.invert_mask=true for all of them), unless it is meant.",
        _about_masks(mask_facts.inverted),
    ),
    _Rule(
        "cropped",
        "warning",
        "Much is cropped away",
        f"The bucket leaves out more than {MUCH_CROPPED:.0%} of the image, evenly on both sides. Raise "
        "data.max_aspect, or crop the image and its mask around the subject.",
        _cropped,
    ),
    _Rule(
        "cut_caption",
        "warning",
        "Caption is cut",
        "It is longer than what the text encoder reads, so its last words do nothing. Shorten it, or put first what "
        "matters.",
        _cut_caption,
    ),
    _Rule(
        "still_mask",
        "info",
        "Still mask on a moving clip",
        "The clip changes while its mask is the same in all frames. A video as the mask follows the subject.",
        _still_mask,
    ),
    _Rule(
        "no_caption",
        "info",
        "No caption",
        "Trained with the empty prompt. Add a caption, such as NAME.txt beside the image.",
        _no_caption,
    ),
    _Rule(
        "no_preview",
        "info",
        "No preview image",
        "The page shows the masks alone. Prepare again to have the images; imported caches may have none.",
        _no_preview,
    ),
)
