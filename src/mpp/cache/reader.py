"""A cache as training reads it, whoever wrote it: our own files, or another program's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from mpp.cache.format import CacheIdentity, Notes
from mpp.cache.index import Entry, Index
from mpp.cache.provenance import LatentsProvenance, MaskProvenance
from mpp.core.loss import MaskedPriorLoss
from mpp.models.contract import Architecture, Conditioning


@runtime_checkable
class Reader(Protocol):
    """What a cache offers to training. Constructing one touches nothing.

    All methods raise ValueError, with the file's name and what to do, where files are missing, damaged, or disagree.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    def identity(self) -> CacheIdentity:
        """What the cache was made with."""
        ...

    def notes(self) -> Notes:
        """What its preparation found; empty where nothing is known of it."""
        ...

    def entries(self) -> Index:
        """All samples."""
        ...

    def latents(self, entry: Entry) -> Tensor:
        """A sample's latents `(c, f, h, w)`: float32, finite, normalised."""
        ...

    def mask(self, entry: Entry) -> Tensor:
        """A sample's mask `(1, f, h, w)`: float32 in [0, 1]; all ones without one."""
        ...

    def latents_made_from(self, entry: Entry) -> LatentsProvenance | None:
        """What a sample's latents were made from; None where that is not known."""
        ...

    def mask_made_from(self, entry: Entry) -> MaskProvenance | None:
        """What a sample's mask was made from; None where that is not known."""
        ...

    def conditioning(self, entry: Entry, record: type[Conditioning]) -> Conditioning:
        """A sample's text and image conditioning as the family's record."""
        ...

    def has_text(self, name: str) -> bool:
        """Whether embeddings of that name (`text_name`) are there."""
        ...

    def prompt(self, name: str, model: Architecture) -> Conditioning | None:
        """The conditioning of a prompt for generations, as it was prepared for a model; None where it was not."""
        ...

    def preview(self, key: str, suffix: str = "") -> Path | None:
        """The preview of a sample's first frame, or with `FrameAxis.suffix` of another; None where there is none."""
        ...

    def advice(self, loss: MaskedPriorLoss) -> list[str]:
        """Warnings about using this cache with a loss."""
        ...

    def check_some(self, entries: Sequence[Entry]) -> None:
        """`check_files` of as many samples as do not delay the start of a run, evenly spread."""
        ...

    def check_files(self, entry: Entry) -> None:
        """Refuse a sample whose files are missing, cut short or disagree, without reading them whole."""
        ...
