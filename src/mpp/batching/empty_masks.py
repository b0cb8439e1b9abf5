"""Samples whose masks are wholly black: a floor of the loss learns all of them, and without one they teach nothing."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mpp.cache.format import evenly_spread
from mpp.cache.index import Index
from mpp.cache.mask_facts import is_black
from mpp.cache.reader import Reader
from mpp.wording import few

OnEmptyMask = Literal["warn", "skip", "error"]


@dataclass(frozen=True)
class EmptyMasks:
    """What was found of them.

    Attributes:
        keys: Of the samples with a wholly black mask.
        looked_at: How many masks were looked at.
        skipped: Whether these samples were left out.
    """

    keys: tuple[str, ...] = ()
    looked_at: int = 0
    skipped: bool = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.keys)

    def __str__(self) -> str:
        """In words, with a few of the names."""
        return f"{len(self.keys)} of {self.looked_at} masks are wholly black ({', '.join(few(self.keys))})"


def check_word(on_empty_mask: str) -> None:
    """Refuse another word than those there are.

    Raises:
        ValueError: As said.
    """
    if on_empty_mask not in get_args(OnEmptyMask):
        raise ValueError(f"data.on_empty_mask must be {', '.join(get_args(OnEmptyMask))}, got {on_empty_mask!r}")


def without_empty_masks(
    cache: Reader, train: Index, val: Index, on_empty_mask: OnEmptyMask, given: int
) -> tuple[Index, Index, EmptyMasks]:
    """Training and validation samples, without those whose mask is wholly black where these are to be left out.

    Args:
        cache: The cache.
        train: Training samples.
        val: Validation samples; a mask that would train as a whole image would be measured as one too.
        on_empty_mask: `warn`: leave all in, and look at 10,000 of each at most, evenly spread; `skip` or `error`: look
            at all.
        given: Leading frames that the model is given, which belong to no mask.

    Raises:
        ValueError: There are any with `error`, none is left with `skip`, or a mask is missing or damaged.
    """
    keys, looked_at, kept = [], 0, []
    for entries in (train, val):
        rows = np.flatnonzero(entries.masked)
        rows = rows if on_empty_mask != "warn" else np.asarray(evenly_spread(rows))
        black = [int(row) for row in rows if is_black(cache.mask(entries[int(row)])[:, given:])]
        keys += [entries[row].key for row in black]
        looked_at += len(rows)
        chosen = np.ones(len(entries), bool)
        chosen[black] = False
        kept.append(entries.where(chosen))
    found = EmptyMasks(tuple(keys), looked_at, skipped=on_empty_mask == "skip")
    if found and on_empty_mask == "error":
        raise ValueError(f"{found}, and data.on_empty_mask=error; draw them, or set data.on_empty_mask=skip or warn")
    if not found.skipped:
        return train, val, found
    if not len(kept[0]):
        raise ValueError(f"{found}, and data.on_empty_mask=skip leaves no training sample; are the masks inverted?")
    return kept[0], kept[1], found
