"""The DataModule that streams cached latents, masks and text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import Dataset

from mpp.batching.batch import Collate, Sample, read_sample
from mpp.batching.empty_masks import EmptyMasks, OnEmptyMask, check_word, without_empty_masks
from mpp.batching.freshness import Changed, SourceChanges, source_changes
from mpp.batching.loader import BatchOrder, Shape, TrainLoader, ValidationLoader, pool_quota
from mpp.batching.preservation import Preservation
from mpp.batching.training_set import TrainingSet
from mpp.batching.visits import Changes, TrainSamples
from mpp.cache.format import Cache, CacheIdentity, evenly_spread, text_name
from mpp.cache.index import Entry, Index
from mpp.cache.reader import Reader
from mpp.core import draws
from mpp.models.contract import Architecture, draw_sigma
from mpp.models.experts import expert_numbers
from mpp.musubi.cache import MusubiCache


class CachedSamples(Dataset[Sample]):
    """Samples of a cache by number."""

    def __init__(self, cache: Reader, entries: Sequence[Entry], architecture: Architecture) -> None:
        self.cache, self.entries, self.architecture = cache, entries, architecture

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample."""
        return read_sample(self.cache, self.entries[index], self.architecture)


class LatentDataModule(LightningDataModule):
    """Streams a cache made by `python -m mpp.prepare`, or one of musubi-tuner.

    Args:
        architecture: The model that trains; the cache must be its own.
        cache_dir: The cache.
        batch_size: Samples of one shape per batch, at most.
        val_fraction: Share of the training images held out for validation, in [0, 1), where the cache has no
            validation folder of its own.
        require_mask: Refuse a cache in which a training sample has no mask.
        strict_masks: Refuse to train where masks were added, edited or deleted since the cache was prepared.
        strict_sources: The same for masks, captions and media, all of which are looked at, however many there are.
        on_empty_mask: What becomes of samples whose mask is wholly black, in training and validation: `warn` of them,
            `skip` them, or stop with an `error`. A floor of the loss learns all of such a sample, background included;
            without a floor nothing is learned from it.
        unmasked_probability: Share of the visits on which a sample trains without its mask, in [0, 1].
        caption_dropout: Share of the visits on which a sample has the empty caption, in [0, 1].
        preservation: Samples whose whole area keeps the base model's prediction, mixed into training.
        num_workers: Processes that read ahead.
        seed: Seed of order and split.
        layout: Whose files the cache consists of.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        *,
        architecture: Architecture,
        cache_dir: str,
        batch_size: int = 1,
        val_fraction: float = 0.0,
        require_mask: bool = False,
        strict_masks: bool = False,
        strict_sources: bool = False,
        on_empty_mask: OnEmptyMask = "warn",
        unmasked_probability: float = 0.0,
        caption_dropout: float = 0.0,
        preservation: Preservation | None = None,
        num_workers: int = 0,
        seed: int = 0,
        layout: Literal["mpp", "musubi"] = "mpp",
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"data.batch_size must be at least 1 and data.num_workers at least 0, got "
                f"{batch_size} and {num_workers}"
            )
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction must be at least 0 and below 1, got {val_fraction}")
        self.architecture = architecture
        if layout not in ("mpp", "musubi"):
            raise ValueError(f"data.layout must be mpp or musubi, got {layout!r}")
        self.cache: Reader = Cache(cache_dir) if layout == "mpp" else MusubiCache(cache_dir, architecture)
        self.batch_size, self.val_fraction, self.seed = batch_size, val_fraction, seed
        self.require_mask, self.num_workers = require_mask, num_workers
        self.strict_masks, self.strict_sources = strict_masks, strict_sources
        check_word(on_empty_mask)
        self.on_empty_mask: OnEmptyMask = on_empty_mask
        self.preservation = preservation or Preservation()
        self.changes = Changes(unmasked_probability, caption_dropout, seed)
        self.train_entries = Index.of([])
        self.pool: list[tuple[Reader, Entry]] = []
        self.val_entries = Index.of([])
        self.unchecked: list[str] = []
        self.source_changes = SourceChanges()
        self.empty_masks = EmptyMasks()
        self._visits: TrainSamples | None = None
        self._set: TrainingSet | None = None
        self._routed: tuple[int, dict[int, int]] = (-1, {})

    def setup(self, stage: str | None = None) -> None:
        """Read the index and refuse a cache that does not fit, from identities and file headers alone.

        Raises:
            ValueError: Another model's cache, a damaged file, a missing mask with `require_mask`, an empty one with
                `on_empty_mask=error`, a batch larger than the set, or preservation samples that are not there.
        """
        del stage
        if len(self.train_entries):
            return
        model = self.architecture
        identity = self.cache.identity()
        self.unchecked = identity.check(CacheIdentity.of(model, model.identity()), self.cache.folder)
        entries = self.cache.entries()
        train, self.val_entries = split_entries(entries, self.val_fraction, self.seed)
        if not train:
            raise ValueError(
                f"the cache {self.cache.folder} leaves no training sample: {len(entries)} samples, "
                f"{len(self.val_entries)} of them for validation; lower data.val_fraction or add images"
            )
        check_frames(entries, model)
        self.cache.check_some(entries)
        train, self.val_entries, self.empty_masks = without_empty_masks(
            self.cache, train, self.val_entries, self.on_empty_mask, model.given_frames
        )
        if self.batch_size > len(train):
            raise ValueError(
                f"data.batch_size={self.batch_size} is larger than the training set of {len(train)} samples; lower it "
                f"(trainer.accumulate_grad_batches repeats smaller batches)"
            )
        bare = train.where(~train.masked)
        if self.require_mask and len(bare):
            raise ValueError(
                f"{bare[0].key} and {len(bare) - 1} other training samples have no mask; data.require_mask=true"
            )
        self._check_empty_caption(train)
        self._compare_sources(entries)
        self.pool = self.preservation.pool(self.cache, train)
        check_frames([entry for _, entry in self.pool], model)
        self.train_entries = train

    def train_dataloader(self) -> TrainLoader:
        """This rank's training batches, by shape."""
        trainer = self.trainer
        samples = self._visits = self.visits()
        order = self.order(*self._path(), limit=trainer.limit_train_batches if trainer else None)
        window = trainer.accumulate_grad_batches if trainer else 1
        collate = Collate(self.architecture)
        return TrainLoader(samples, order, collate, window=window, num_workers=self.num_workers)

    def order(self, rank: int, world_size: int, *, limit: int | float | None) -> BatchOrder:
        """Which samples make up which batch on a rank.

        Raises:
            ValueError: `limit`, a number of batches or a share of them, leaves none.
        """
        shapes = self.train_entries.signatures(self.architecture.given_frames)
        numbering = (self._visits or self.visits()).numbering
        return BatchOrder(
            [shapes[row] for row in numbering.rows],
            self.batch_size,
            self.seed,
            rank,
            world_size,
            pool=self._pool_shapes(),
            pool_count=self.preservation.count(numbering.count),
            routes=len(self.architecture.boundaries) + 1,
            route=self.route,
            limit=limit,
        )

    def visits(self) -> TrainSamples:
        """The samples of an epoch by visit."""
        entries = self.train_entries
        return TrainSamples(
            self.cache, entries, self.architecture, self.changes, repeats=entries.repeats, pool=self.pool
        )

    def training_set(self) -> TrainingSet:
        """What a run trains on, as its checkpoints say it."""
        self._set = self._set or TrainingSet.of(self.cache, self.train_entries, self.pool)
        return self._set

    def val_dataloader(self) -> ValidationLoader:
        """This rank's validation batches."""
        rank, world = self._path()
        shapes = self.val_entries.signatures(self.architecture.given_frames)
        samples = CachedSamples(self.cache, self.val_entries, self.architecture)
        collate = Collate(self.architecture)
        return ValidationLoader(samples, shapes, self.batch_size, collate, rank=rank, world_size=world)

    def route(self, number: int, epoch: int) -> int:
        """Number of the expert that serves a visit's sigma in an epoch."""
        if self._routed[0] != epoch:
            self._routed = (epoch, {})
        known = self._routed[1]
        if number not in known:
            model = self.architecture
            self._visits = self._visits or self.visits()
            _, entry, key, _ = self._visits.find(number)
            sigma = draw_sigma(model, [key], entry.signature(model.given_frames)[:4], self.seed, epoch)
            known[number] = int(expert_numbers(sigma, model.boundaries))
        return known[number]

    @property
    def pool_picks(self) -> int:
        """Preservation samples in an epoch, over all ranks."""
        count = self.preservation.count(int(self.train_entries.repeats.sum()))
        return sum(pool_quota(self._pool_shapes(), count).values())

    def _pool_shapes(self) -> list[Shape]:
        return [entry.signature(self.architecture.given_frames) for _, entry in self.pool]

    def _compare_sources(self, entries: Index) -> None:
        """Look for masks, captions and media that changed since the cache was prepared.

        Raises:
            ValueError: With `strict_masks` or `strict_sources`, there are any, or it cannot be told.
        """
        strict = self.strict_masks or self.strict_sources
        changes = source_changes(self.cache, entries, self.architecture.latents.frames, thorough=strict)
        self.source_changes = changes
        option = "data.strict_sources" if self.strict_sources else "data.strict_masks"
        told = changes if self.strict_sources else replace(changes, captions=Changed(), media=Changed())
        if strict and (told or changes.unchecked):
            folder = f"the cache {self.cache.folder}"
            what = told.lines(folder) or [f"the sources of {folder} cannot be compared with it: {changes.unchecked}"]
            raise ValueError("; ".join([*what, f"run `python -m mpp.prepare` again, or set {option}=false"]))

    def _check_empty_caption(self, entries: Index) -> None:
        """Refuse caption dropout where the empty caption was not prepared.

        Raises:
            ValueError: As above.
        """
        if not self.changes.caption_dropout:
            return
        for entry in evenly_spread(entries):
            if not self.cache.has_text(text_name("", entry.seen)):
                raise ValueError(
                    f"data.caption_dropout={self.changes.caption_dropout}: {self.cache.folder} has no embeddings of "
                    "the empty caption; run `python -m mpp.prepare` again with data.empty_caption=true"
                )

    def _path(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def check_frames(entries: Sequence[Entry], model: Architecture) -> None:
    """Refuse samples that hold nothing to learn, because the model sees their only frame.

    Raises:
        ValueError: Names the first of them.
    """
    least = max(model.least_frames, model.given_frames + 1)
    if least == 1:
        return
    short = [entry for entry in entries if entry.shape[1] < least]
    if short:
        raise ValueError(
            f"{short[0].key} has {short[0].shape[1]} latent frame, and this model sees the first: nothing is left to "
            f"learn ({len(short)} such samples); it learns from clips of at least {least} latent frames"
        )


def split_entries(entries: Index, fraction: float, seed: int) -> tuple[Index, Index]:
    """Training and validation samples.

    A validation folder in the cache wins; otherwise the share `fraction` of the training images and videos is held
    out, at least one where it is above 0, chosen by name alone, so that adding images moves few others. All clips
    of a video go the same way, and mirrored copies of what is held out are used for neither.
    """
    train, val = entries.of_split("train"), entries.of_split("val")
    if len(val) or fraction == 0:
        return train, val
    origins = [entry.origin for entry in train]
    ranked = sorted(set(origins), key=lambda origin: draws.generator(seed, "validation", origin).initial_seed())
    held = set(ranked[: max(1, round(fraction * len(ranked)))])
    chosen = np.array([origin in held for origin in origins])
    return train.where(~chosen), train.where(chosen).originals()
