"""Visits: which sample a number of the epoch stands for, and what it looks like this time.

A sample is visited as often in an epoch as it repeats. Each visit has draws of its own: noise and sigma, and here
whether it comes without its mask, and with which caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mpp.batching.batch import Sample, read_sample
from mpp.cache.format import text_name
from mpp.cache.index import Entry
from mpp.cache.reader import Reader
from mpp.core import draws
from mpp.models.contract import Architecture


class Visit(NamedTuple):
    """One place in an epoch."""

    number: int
    epoch: int


@dataclass(frozen=True)
class Changes:
    """What is changed about a sample from visit to visit.

    Args:
        unmasked_probability: Share of the visits on which a sample trains without its mask, in [0, 1].
        caption_dropout: Share of the visits on which it has the empty caption, in [0, 1].
        seed: Seed of the draws.

    Raises:
        ValueError: A share out of range.
    """

    unmasked_probability: float = 0.0
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shares out of range."""
        for name in ("unmasked_probability", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be between 0 and 1, got {getattr(self, name)}")

    def caption(self, entry: Entry, epoch: int, key: str) -> str:
        """The caption of one visit: empty, or one of the sample's captions, each as likely."""
        if self.caption_dropout and draws.uniform(self.seed, epoch, key, "caption dropout") < self.caption_dropout:
            return ""
        captions = (entry.caption, *entry.variants)
        if len(captions) == 1:
            return entry.caption
        return captions[int(draws.uniform(self.seed, epoch, key, "caption") * len(captions))]

    def unmasked(self, epoch: int, key: str) -> bool:
        """Whether a visit trains without its mask."""
        share = self.unmasked_probability
        return bool(share) and bool(draws.uniform(self.seed, epoch, key, "unmasked") < share)


class Numbering:
    """Which sample, and which visit of it, each number of an epoch stands for.

    First come the training samples, each as often as it repeats; after them the preservation samples, again and
    again: number `count + v * len(pool) + i` is the visit `v` of preservation sample `i`.

    Args:
        repeats: How often an epoch visits each training sample.
        pool: Number of preservation samples.
    """

    def __init__(self, repeats: Sequence[int] | np.ndarray, pool: int = 0) -> None:
        repeats = np.asarray(repeats, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(repeats)])
        self.rows = np.repeat(np.arange(len(repeats)), repeats)
        self.pool = pool

    @property
    def count(self) -> int:
        """Visits of training samples in an epoch."""
        return len(self.rows)

    def locate(self, number: int) -> tuple[int | None, int, int]:
        """Training sample (None: it is a preservation sample), preservation sample, and visit."""
        if number < self.count:
            row = int(self.rows[number])
            return row, 0, int(number - self._first[row])
        visit, member = divmod(number - self.count, self.pool)
        return None, member, visit


class TrainSamples(Dataset[Sample]):
    """The samples of an epoch by visit.

    Args:
        cache: Where the training samples lie.
        entries: The training samples.
        architecture: Whose records the caches hold.
        changes: What is changed from visit to visit.
        repeats: How often an epoch visits each training sample.
        pool: The preservation samples and their caches.
    """

    def __init__(
        self,
        cache: Reader,
        entries: Sequence[Entry],
        architecture: Architecture,
        changes: Changes,
        *,
        repeats: Sequence[int] | np.ndarray,
        pool: Sequence[tuple[Reader, Entry]] = (),
    ) -> None:
        self.cache, self.entries, self.pool = cache, entries, pool
        self.architecture, self.changes = architecture, changes
        self.numbering = Numbering(repeats, len(pool))

    def __len__(self) -> int:
        """Visits of an epoch, each preservation sample counted once."""
        return self.numbering.count + len(self.pool)

    def find(self, number: int) -> tuple[Reader, Entry, str, bool]:
        """Cache, entry and draw key of a visit, and whether it is a preservation sample's."""
        row, member, visit = self.numbering.locate(number)
        if row is None:
            cache, entry = self.pool[member]
            return cache, entry, f"{entry.key}#preserve{member}.{visit}", True
        entry = self.entries[row]
        return self.cache, entry, f"{entry.key}#{visit}" if visit else entry.key, False

    def __getitem__(self, visit: Visit) -> Sample:
        """Read one sample; a preservation sample's mask is zeros and its caption its own."""
        cache, entry, key, preserved = self.find(visit.number)
        if preserved:
            sample = read_sample(cache, entry, self.architecture)
            return replace(sample, key=key, mask=torch.zeros_like(sample.mask), preserved=True)
        caption = self.changes.caption(entry, visit.epoch, key)
        if caption != entry.caption:
            entry = replace(entry, caption=caption, text=text_name(caption, entry.seen))
        if self.changes.unmasked(visit.epoch, key):
            entry = replace(entry, mask=None)
        return replace(read_sample(cache, entry, self.architecture), key=key)
