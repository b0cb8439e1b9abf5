"""Records that travel from the cache to the module."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpp.cache.index import Entry
from mpp.cache.reader import Reader
from mpp.models.contract import Architecture, Conditioning


@dataclass(frozen=True)
class Sample:
    """One sample as read from the cache: latents `(c, f, h, w)`, mask `(1, f, h, w)`, unbatched conditioning.

    `preserved` tells a preservation sample, whose mask is zeros by intention.
    """

    key: str
    latents: Tensor
    mask: Tensor
    conditioning: Conditioning
    preserved: bool = False


def read_sample(cache: Reader, entry: Entry, architecture: Architecture) -> Sample:
    """One sample from a cache, without the leading frames that the model is given clean.

    Raises:
        ValueError: As `Reader.latents`, `mask` and `conditioning` raise.
    """
    given = architecture.given_frames
    latents, mask = cache.latents(entry)[:, given:], cache.mask(entry)[:, given:]
    return Sample(entry.key, latents, mask, cache.conditioning(entry, architecture.conditioning))


@dataclass(frozen=True)
class Batch:
    """Samples of one shape.

    Attributes:
        keys: Names of the samples; their noise and sigma depend on them.
        latents: `(b, c, f, h, w)` float32, normalised.
        mask: `(b, 1, f, h, w)` in [0, 1], 1 = learn; all ones for samples without a mask.
        conditioning: The family's record, batched.
        host_mask: The mask again, kept on the CPU, so that decisions about it need not wait for the device. None:
            `mask` itself.
        window: Masks of all batches of this accumulation window on this rank, this one included; they decide what a
            `global` mean divides by. Stays on the CPU. None: this batch alone.
        preserved: How many are preservation samples.
        counted: False for a repeat that only keeps the ranks in step during validation.
    """

    keys: tuple[str, ...]
    latents: Tensor
    mask: Tensor
    conditioning: Conditioning
    host_mask: Tensor | None = None
    window: tuple[Tensor, ...] | None = None
    preserved: int = 0
    counted: bool = True

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; what only the host needs stays."""
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            conditioning=self.conditioning.to(device),
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory: copies to a GPU from any other wait for what is queued there."""
        mask = self.mask.pin_memory()
        return replace(
            self,
            latents=self.latents.pin_memory(),
            mask=mask,
            conditioning=self.conditioning.pin_memory(),
            host_mask=None if self.host_mask is None else mask,
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)


@dataclass(frozen=True)
class Collate:
    """Samples of one shape to a batch. Each worker gets a copy, so it holds the family's settings and no weights."""

    architecture: Architecture

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch.

        Raises:
            ValueError: As `Architecture.collate` raises.
        """
        mask = torch.stack([sample.mask for sample in samples])
        return Batch(
            keys=tuple(sample.key for sample in samples),
            latents=torch.stack([sample.latents for sample in samples]),
            mask=mask,
            conditioning=self.architecture.collate([sample.conditioning for sample in samples]),
            host_mask=mask,
            preserved=sum(sample.preserved for sample in samples),
        )
