"""What masks look like, and which of them look wrong: one rule for prepare, the start of training and the report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpp.cache.format import evenly_spread
from mpp.cache.index import Entry, Index
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.wording import few

WHITE = 1 - 1 / 510  # a raw value that would be saved as 255, and below `1 - WHITE` as 0
BINS = 20  # of raw values between black and white
_RING = 0.1  # width of the border over the image's shorter side
_STILL = 1e-3
_TINY_SHARE, _TINY_CELLS = 0.005, 2.0
_CENTRE, _CONTRAST = 0.05, 2.0


@dataclass(frozen=True)
class MaskLook:
    """What the rules ask about a raw mask, all over the frames that are not given.

    Attributes:
        lowest: Its lowest value.
        highest: Its highest value.
        border: Mean over the outer tenth of the image.
        centre: Mean over the middle half of its width and height.
        learned: Mean target weight, leaving out the loss's floor.
        cells: Sum of these weights in the frame where it is largest.
    """

    lowest: float
    highest: float
    border: float
    centre: float
    learned: float
    cells: float

    @classmethod
    def of(cls, mask: Tensor, loss: MaskedPriorLoss) -> "MaskLook":
        """Of a mask `(1, 1, f, h, w)` under a loss."""
        weights = replace(loss, mask_min_weight=0.0).weights(mask)
        raw, learned = weights.raw[0, 0], weights.target[0, 0]
        border, centre = _border_and_centre(raw.mean(0))
        cells = float(learned.sum((1, 2)).max())
        return MaskLook(float(raw.min()), float(raw.max()), border, centre, float(learned.mean()), cells)


@dataclass(frozen=True)
class MaskFacts(MaskLook):
    """What the report shows of a mask besides.

    Attributes:
        still: Whether all frames are equal; False for one frame.
        values: Share of the cells that are black, that fall into each of `BINS` bins between, and that are white.
        frames: Mean target and prior weight of each frame.
    """

    still: bool
    values: tuple[float, ...]
    frames: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, mask: Tensor, loss: MaskedPriorLoss) -> "MaskFacts":
        """Of a mask `(1, 1, f, h, w)` under a loss."""
        weights = loss.weights(mask)
        raw = weights.raw[0, 0]
        frames = zip(weights.target.mean((0, 1, 3, 4)).tolist(), weights.prior.mean((0, 1, 3, 4)).tolist(), strict=True)
        still = raw.shape[0] > 1 and bool((raw - raw[:1]).abs().max() < _STILL)
        return cls(**vars(MaskLook.of(mask, loss)), still=still, values=value_shares(raw), frames=tuple(frames))


def _border_and_centre(raw: Tensor) -> tuple[float, float]:
    """Means over the outer ring and the middle of a mask `(h, w)`."""
    height, width = raw.shape
    ring = max(1, round(_RING * min(height, width)))
    inner = torch.zeros_like(raw, dtype=torch.bool)
    inner[ring : height - ring, ring : width - ring] = True
    top, left = height // 4, width // 4
    return float(raw[~inner].mean()), float(raw[top : height - top, left : width - left].mean())


def value_shares(raw: Tensor) -> tuple[float, ...]:
    """Share of the cells that are black, in each of `BINS` equal bins between, and white."""
    values = raw.flatten()
    black, white = values < 1 - WHITE, values > WHITE
    between = torch.histc(values[~(black | white)], bins=BINS, min=0.0, max=1.0).tolist()
    return tuple(count / len(values) for count in (float(black.sum()), *between, float(white.sum())))


# ---------------------------------------------------------------- what looks wrong: a note, or None


def is_black(mask: Tensor) -> bool:
    """Whether a mask would be saved as black everywhere."""
    return bool(mask.max() < 1 - WHITE)


def empty(mask: MaskLook, _: MaskedPriorLoss) -> str | None:
    """It is wholly black."""
    return "" if mask.highest < 1 - WHITE else None


def full(mask: MaskLook, _: MaskedPriorLoss) -> str | None:
    """It is wholly white."""
    return "" if mask.lowest > WHITE else None


def below_threshold(mask: MaskLook, loss: MaskedPriorLoss) -> str | None:
    """All of it lies below the threshold, though it is not empty."""
    threshold = loss.prior_threshold
    if loss.prior_weight == 0 or threshold is None or empty(mask, loss) is not None:
        return None
    return f"highest value {mask.highest:.2f}" if mask.highest < threshold else None


def above_threshold(mask: MaskLook, loss: MaskedPriorLoss) -> str | None:
    """None of it lies below the threshold, though it is not full."""
    threshold = loss.prior_threshold
    if loss.prior_weight == 0 or threshold is None or full(mask, loss) is not None:
        return None
    return f"lowest value {mask.lowest:.2f}" if mask.lowest >= threshold else None


def tiny(mask: MaskLook, loss: MaskedPriorLoss) -> str | None:
    """It learns next to nothing, though it is not empty."""
    if empty(mask, loss) is not None or below_threshold(mask, loss) is not None:
        return None
    if mask.learned >= _TINY_SHARE and mask.cells >= _TINY_CELLS:
        return None
    return f"{mask.learned:.2%} of the area, {mask.cells:.1f} latent cells"


def inverted(mask: MaskLook, _: MaskedPriorLoss) -> str | None:
    """The border learns and the centre does not."""
    if 1 - mask.centre < max(_CENTRE, _CONTRAST * (1 - mask.border)):
        return None
    return f"border {mask.border:.0%} learned, centre {mask.centre:.0%}"


_COUNTED: dict[str, Callable[[MaskLook, MaskedPriorLoss], str | None]] = {
    "inverted": inverted,
    "empty": empty,
    "tiny": tiny,
}


def black_under(loss: MaskedPriorLoss) -> str:
    """What a wholly black mask comes to under a loss, in words."""
    weights = loss.weights(torch.zeros(1, 1, 1, 1, 1))
    if weights.target.max() > 0:
        when = "" if loss.normalization == "per_sample" else ", where no other sample is in its batch"
        return (
            f"all of it is learned, background included, and at full weight{when}: loss.mask_min_weight="
            f"{loss.mask_min_weight:g} leaves each cell a weight, and the loss is a mean over what has one"
        )
    kept = ", and all of it keeps the base model's prediction" if weights.prior.max() > 0 else ""
    return f"nothing is learned from it{kept}"


# ---------------------------------------------------------------- counted over a cache


@dataclass(frozen=True)
class MaskDoubts:
    """Masks of a cache that look wrong, by keys of their images and videos.

    Attributes:
        looked_at: How many images and videos.
        inverted: Their border learns and their centre does not.
        empty: They are wholly black.
        tiny: They learn next to nothing.
    """

    looked_at: int = 0
    inverted: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()

    def lines(self, empty: str | None = None) -> list[str]:
        """In words, with some of the names.

        Args:
            empty: What becomes of empty ones; None: they are said elsewhere.
        """
        found = [
            (self.inverted, "look inverted", "the border learns and the centre is kept; data.invert_mask=true of "
             "prepare inverts all of them"),
            (self.empty, "are wholly black", empty),
            (self.tiny, "are tiny", "less than 0.5 % of the area or 2 latent cells learn, and each counts for very "
             "much"),
        ]  # fmt: skip
        shown = ((len(keys), what, ", ".join(few(keys)), why) for keys, what, why in found if keys and why)
        return [f"{count} of {self.looked_at} masks {what} ({names}): {why}" for count, what, names, why in shown]

    @classmethod
    def of(
        cls, cache: Reader, entries: Index, loss: MaskedPriorLoss, given: int = 0, *, most: int = 10_000
    ) -> "MaskDoubts":
        """Look at the masks of some samples, evenly spread.

        Args:
            cache: The cache.
            entries: Its samples.
            loss: Whose regions they are.
            given: Leading frames that the model is given, which belong to neither region.
            most: Samples that are looked at, at most: one takes 0.4 ms, of a clip 2 ms.

        Raises:
            ValueError: A mask is missing or damaged.
        """
        found: dict[str, dict[str, None]] = {name: {} for name in _COUNTED}
        seen: set[str] = set()
        for entry in masked_samples(entries, most):
            seen.add(entry.origin)
            facts = MaskLook.of(cache.mask(entry)[None, :, given:], loss)
            for name, rule in _COUNTED.items():
                if rule(facts, loss) is not None:
                    found[name][entry.origin] = None
        return cls(len(seen), **{name: tuple(keys) for name, keys in found.items()})


def masked_samples(entries: Index, most: int) -> Iterator[Entry]:
    """The samples with masks of their own, without mirrored copies, at most `most`, evenly spread."""
    own: Sequence[Entry] = entries.where(entries.masked).originals()
    yield from evenly_spread(own, most)
