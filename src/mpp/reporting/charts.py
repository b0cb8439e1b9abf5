"""Histograms of a set: which bin each sample falls into, and how many fall into each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpp.cache.mask_facts import BINS
from mpp.reporting.rows import ReportRow

_TENTHS = 10
_NOTHING, _ALL = 1e-6, 1 - 1e-6
_ROUNDING = 1e-5  # in tenths: a share that is a tenth but for rounding begins the next bar
_NOTED = 0.01  # share of a sample's cells from which it counts as having a mask value
_COVERAGE_LABELS = ("nothing", *(f"{10 * n} to {10 * n + 10} %" for n in range(_TENTHS)), "all of it")
_VALUE_LABELS = ("black", *(f"{n / BINS:.2f} to {(n + 1) / BINS:.2f}" for n in range(BINS)), "white")


@dataclass(frozen=True)
class Chart:
    """One histogram.

    Attributes:
        name: `learn`, `preserve`, `values` or `bucket`.
        title: What it shows.
        note: What its bars are, shown while no bar is pointed at.
        labels: Of the bars.
        counts: Samples in each; of `values` the mean share of the cells.
        ticks: Bars below which a label stands, and the label.
        scale: Of the height: `linear` or `log`.
    """

    name: str
    title: str
    note: str
    labels: tuple[str, ...]
    counts: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...] = ()
    scale: str = "linear"


def charts_of(samples: Sequence[ReportRow]) -> list[Chart]:
    """All histograms; that of mask values only where there are masks."""
    found = []
    for name, title in (("learn", "Area that learns"), ("preserve", "Area that is preserved")):
        counts = Counter(coverage_bin(getattr(s.coverage, name)) for s in samples if s.coverage is not None)
        ticks = ((0.5, "0"), *((1.0 + n, f"{10 * n} %") for n in range(2, 10, 2)), (_TENTHS + 1.5, "all"))
        bars = tuple(counts[n] for n in range(_TENTHS + 2))
        found.append(Chart(name, title, "samples by mean weight", _COVERAGE_LABELS, bars, ticks))
    masked = [mask.values for s in samples if (mask := s.mask) is not None and s.entry.mask is not None]
    if masked:
        means = tuple(sum(column) / len(masked) for column in zip(*masked, strict=True))
        ticks = ((0.5, "0"), *((1 + BINS * part, f"{part}") for part in (0.25, 0.5, 0.75)), (BINS + 1.5, "1"))
        note = "share of the latent cells, logarithmic"
        found.append(Chart("values", "Raw mask values", note, _VALUE_LABELS, means, ticks, "log"))
    buckets = Counter(sample.bucket for sample in samples).most_common()
    labels, counts = zip(*buckets, strict=True)
    return [*found, Chart("bucket", "Buckets", "samples of one shape train in one batch", labels, counts)]


def coverage_bin(share: float) -> int:
    """Number of the bar of a share of the area: none at all, ten tenths, all of it."""
    if share <= _NOTHING:
        return 0
    return _TENTHS + 1 if share >= _ALL else 1 + min(int(share * _TENTHS + _ROUNDING), _TENTHS - 1)


def bins_of(sample: ReportRow, buckets: dict[str, int]) -> dict[str, Any]:
    """Number of a sample's bar in each histogram; of `values` all that hold a part of it worth noting."""
    coverage, mask = sample.coverage, sample.mask
    own = mask.values if mask is not None and sample.entry.mask is not None else ()
    return {
        "learn": None if coverage is None else coverage_bin(coverage.learn),
        "preserve": None if coverage is None else coverage_bin(coverage.preserve),
        "values": [number for number, share in enumerate(own) if share >= _NOTED],
        "bucket": buckets[sample.bucket],
    }
