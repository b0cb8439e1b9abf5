"""What masks come to under a loss: how much of a set learns and is preserved, and what the teacher costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mpp.cache.format import evenly_spread
from mpp.cache.index import Entry
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.models.contract import LatentSpec

_SCANNED = 512  # masks read at the start of a run; more would delay it without changing the means
# Student step over teacher forward (S/T) between no attention and all attention: a frozen linear layer costs 1
# forward in its backward, flash attention 2.5, and checkpointing recomputes the forward.
_STEP_OVER_TEACHER = {False: (2.0, 3.5), True: (3.0, 4.5)}


@dataclass(frozen=True)
class SampleCoverage:
    """What one sample's mask comes to under a loss.

    Attributes:
        learn: Mean target weight, in [0, 1].
        preserve: Mean prior weight.
        taught: Whether the teacher runs for it.
        lowest: Lowest value of its mask; None without one.
        repeats: How often an epoch visits it.
    """

    learn: float
    preserve: float
    taught: bool
    lowest: float | None
    repeats: int


@dataclass(frozen=True)
class Coverage:
    """What the masks of a set come to under a loss, measured on some of them.

    Attributes:
        scanned: How many samples were looked at.
        learn: Mean target weight, in [0, 1].
        preserve: Mean prior weight.
        taught: Share of the visits for which the teacher runs.
        lowest: Lowest value of any mask; 1 where there is none.
    """

    scanned: int
    learn: float
    preserve: float
    taught: float
    lowest: float

    @classmethod
    def of(cls, samples: Iterable[SampleCoverage]) -> "Coverage":
        """Means over the visits of an epoch: a sample counts as often as it repeats.

        Raises:
            ValueError: There is no sample.
        """
        count = visits = 0
        learn = preserve = taught = 0.0
        lowest = 1.0
        for sample in samples:
            count, visits = count + 1, visits + sample.repeats
            learn += sample.repeats * sample.learn
            preserve += sample.repeats * sample.preserve
            taught += sample.repeats * sample.taught
            if sample.lowest is not None:
                lowest = min(lowest, sample.lowest)
        if not count:
            raise ValueError("no sample to measure the coverage of")
        return cls(count, learn / visits, preserve / visits, taught / visits, lowest)


def cover(loss: MaskedPriorLoss, mask: torch.Tensor, entry: Entry) -> SampleCoverage:
    """What one sample's mask `(1, 1, f, h, w)` comes to under a loss."""
    weights = loss.weights(mask)
    return SampleCoverage(
        learn=float(weights.target.mean()),
        preserve=float(weights.prior.mean()),
        taught=bool(weights.needs_prior()[0]),
        lowest=None if entry.mask is None else float(mask.min()),
        repeats=entry.repeats,
    )


def measure_coverage(cache: Reader, entries: Sequence[Entry], loss: MaskedPriorLoss, given: int = 0) -> Coverage:
    """Mean weights of both regions and the share of visits the teacher runs for, over evenly spread samples.

    Args:
        cache: The cache.
        entries: Its samples.
        loss: Whose regions are measured.
        given: Leading frames that the model is given, which belong to neither region.

    Raises:
        ValueError: There is no sample, or a mask is missing or damaged.
    """
    chosen = evenly_spread(entries, _SCANNED)
    return Coverage.of(cover(loss, cache.mask(entry)[None, :, given:], entry) for entry in chosen)


def bucket_of(shape: Sequence[int], spec: LatentSpec) -> str:
    """Width and height in pixels of latents `(c, f, h, w)`, with the number of layers or frames of several."""
    _, frames, height, width = shape
    size = f"{width * spec.spatial_stride}x{height * spec.spatial_stride}"
    return size if frames == 1 else f"{size}, {spec.frames.count(frames, spec.temporal_stride)}"


def mode_of(loss: MaskedPriorLoss) -> str:
    """What a loss does, in words."""
    if loss.prior_weight == 0:
        return "masked training without a prior"
    if loss.prior_threshold is None:
        return "masked prior preservation, continuous mode"
    return "masked prior preservation, threshold mode"


def step_cost(taught: float, *, gradient_checkpointing: bool) -> tuple[float, float]:
    """How many times as long steps take with the teacher: for long videos, and for small images.

    Args:
        taught: Share of the visits for which the teacher runs, in [0, 1].
        gradient_checkpointing: Whether the student recomputes its activations, which makes the teacher's share smaller.
    """
    low, high = _STEP_OVER_TEACHER[gradient_checkpointing]
    return 1 + taught / high, 1 + taught / low
