"""Batches in an order that is a function of (seed, epoch), for one rank, resumable at any batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from mpp.batching.batch import Batch, Sample
from mpp.batching.visits import Visit
from mpp.cache.format import chunks
from mpp.core import draws
from mpp.workers import ReadAhead

Shape = tuple[object, ...]  # sizes, and tuples of sizes
T = TypeVar("T")


class BatchOrder:
    """Which samples make up which batch of an epoch.

    Samples are shuffled within their shape, cut into batches of at most `batch_size` (the last of a shape may be
    smaller), and the batches are shuffled. The epoch's list is the same on every rank, and each rank takes every
    `world_size`-th batch; the list wraps around so that all ranks have equally many.

    Each epoch also holds samples of a pool, of each shape in turn: `pool_count` in proportion to the shapes, but at
    least one of each, so that none is never seen. Number `i` of the pool on its visit `v` within the epoch is sample
    `len(shapes) + v * len(pool) + i`.

    Where a model consists of experts that share the range of sigma, each batch is one expert's: batches are cut
    within shape and expert, and those of one expert follow each other, so that weights are swapped once an epoch.
    An epoch has the same number of batches whatever the draws: a batch is divided where they would be fewer.

    Args:
        shapes: What samples of one batch share: the latent shape, and shapes of images where there are any.
        batch_size: Samples per batch at most.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
        pool: Latent shape of each sample of the pool.
        pool_count: How many of them an epoch holds; 0 is none.
        routes: Number of experts.
        route: Which of them a sample (by number) falls to in an epoch; asked only with several.
        limit: Batches of an epoch that run on this rank, or the share of them that do; None: all.

    Raises:
        ValueError: `limit` leaves no batch.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        pool: Sequence[Shape] = (),
        pool_count: int = 0,
        routes: int = 1,
        route: Callable[[int, int], int] | None = None,
        limit: int | float | None = None,
    ) -> None:
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.first_of_pool, self.pool_size = len(shapes), len(pool)
        self.groups, self.pool = _by_shape(shapes), _by_shape(pool)
        self.quota = pool_quota(pool, pool_count)
        self.routes, self.route = routes, route
        self.stop = _limited(len(self), limit)
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; another epoch starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def epoch_batches(self) -> list[list[int]]:
        """All batches of this rank in the current epoch."""
        found: list[list[int]] = []
        for shape in sorted({*self.groups, *self.pool}):
            members = self.groups.get(shape, []) + self._picks(shape)
            order = draws.order(len(members), self.seed, self.epoch, f"samples {shape}")
            found += self._cut([members[i] for i in order])
        order = draws.order(len(found), self.seed, self.epoch, "batches")
        if self.routes > 1:
            order = self._by_route(found, order)
        padded = order + [order[i % len(order)] for i in range(-len(order) % self.world_size)]
        return [found[i] for i in padded[self.rank :: self.world_size]]

    def __iter__(self) -> Iterator[list[Visit]]:
        """The batches that are left of the current epoch."""
        epoch = self.epoch
        return ([Visit(number, epoch) for number in batch] for batch in self.epoch_batches()[self.position : self.stop])

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        sizes = [len(self.groups.get(s, ())) + self.quota.get(s, 0) for s in {*self.groups, *self.pool}]
        total = sum(self._batches(size) for size in sizes)
        return -(-total // self.world_size)  # noqa: PLE0303 (rounds up)

    def _batches(self, size: int) -> int:
        """Batches that `size` samples of one shape make."""
        return min(size, -(-size // self.batch_size) + self.routes - 1)

    def _cut(self, members: list[int]) -> list[list[int]]:
        """Batches of one shape's samples."""
        if self.routes == 1:
            return list(chunks(members, self.batch_size))
        lists: dict[int, list[int]] = {}
        for index in members:
            lists.setdefault(self.route(index, self.epoch), []).append(index)
        found = [part for _, group in sorted(lists.items()) for part in chunks(group, self.batch_size)]
        while len(found) < self._batches(len(members)):
            largest = max(found, key=len)
            found.remove(largest)
            half = len(largest) // 2
            found += [largest[:half], largest[half:]]
        return found

    def _by_route(self, found: list[list[int]], order: list[int]) -> list[int]:
        """The same order, but one expert's batches after the other's; every second epoch the other way round."""
        direction = -1 if self.epoch % 2 else 1
        return sorted(order, key=lambda i: direction * self.route(found[i][0], self.epoch))

    def _picks(self, shape: Shape) -> list[int]:
        """This epoch's samples of the pool in one shape; successive epochs go through the pool in turn."""
        members, count = self.pool.get(shape, []), self.quota.get(shape, 0)
        if not count:
            return []
        start, size = self.epoch * count, len(members)
        turns = range(start // size, (start + count - 1) // size + 1)
        row = [
            self.first_of_pool + visit * self.pool_size + members[i]
            for visit, turn in enumerate(turns)
            for i in draws.order(size, self.seed, turn, f"pool {shape}")
        ]
        return row[start % size : start % size + count]


class TrainLoader:
    """Training batches; its position is in the checkpoint, so a resumed run goes on with the very next batch.

    Lightning saves and restores it through `state_dict`, and sets the epoch on `sampler`.

    Args:
        dataset: Samples.
        order: Which samples make up which batch.
        collate: Samples to a batch.
        window: Batches per optimizer step; with more than one, each batch is told the masks of its window.
        num_workers: Processes that read ahead.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        order: BatchOrder,
        collate: Callable[[list[Sample]], Batch],
        *,
        window: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.sampler = order
        self.window = window
        self._loader = ReadAhead(
            partial(_read_batch, dataset, collate),
            order,
            "data.num_workers",
            workers=num_workers,
            persistent=True,
            pinned=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of the current epoch and run: none at its end, until the next epoch is set."""
        order, batches = self.sampler, iter(self._loader)
        # A run that stopped in the middle of a window goes on with what is left of it.
        while group := list(islice(batches, self.window - order.position % self.window)):
            masks = tuple(batch.mask for batch in group) if self.window > 1 else None
            for batch in group:
                order.position += 1
                yield replace(batch, window=masks)

    def state_dict(self) -> dict[str, int]:
        """Position: batches handed out in this epoch."""
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the position."""
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]


class ValidationLoader:
    """This rank's validation batches, in a fixed order.

    Every rank gets equally many: where the list does not divide, the last batch is a repeat that is marked as not
    counted, so that collectives stay in step and no sample counts twice. Read in the main process.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        shapes: Sequence[Shape],
        batch_size: int,
        collate: Callable[[list[Sample]], Batch],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        found = [part for _, members in sorted(_by_shape(shapes).items()) for part in chunks(members, batch_size)]
        positions = range(rank, -(-len(found) // world_size) * world_size, world_size)
        self._counted = [position < len(found) for position in positions]
        batches = [found[position % len(found)] for position in positions]
        self._loader = ReadAhead(partial(_read_batch, dataset, collate), batches, "data.num_workers")

    def __len__(self) -> int:
        """Batches on this rank."""
        return len(self._counted)

    def __iter__(self) -> Iterator[Batch]:
        """All batches of this rank."""
        for batch, counted in zip(self._loader, self._counted, strict=True):
            yield replace(batch, counted=counted)


def pool_quota(shapes: Sequence[Shape], count: int) -> dict[Shape, int]:
    """Samples of the pool in an epoch, over all ranks, by shape.

    `count` is shared out in proportion to the samples of each shape, largest remainders first; at least 1 each.

    Args:
        shapes: Of each sample of the pool.
        count: How many an epoch should hold; 0 is none.
    """
    if not shapes or count == 0:
        return {}
    exact = {shape: count * len(members) / len(shapes) for shape, members in _by_shape(shapes).items()}
    shares = {shape: int(value) for shape, value in exact.items()}
    by_remainder = sorted(exact, key=lambda shape: (shares[shape] - exact[shape], shape))
    for shape in by_remainder[: count - sum(shares.values())]:
        shares[shape] += 1
    return {shape: max(1, share) for shape, share in shares.items()}


def _read_batch(dataset: Dataset[Sample], collate: Callable[[list[Sample]], Batch], members: Sequence[Any]) -> Batch:
    return collate([dataset[member] for member in members])


def _limited(length: int, limit: int | float | None) -> int:
    """How many of `length` batches run, counted as Lightning counts."""
    count = length if limit is None else min(length, limit) if isinstance(limit, int) else int(length * limit)
    if length and not count:
        raise ValueError(
            f"trainer.limit_train_batches={limit} leaves none of the {length} batches of an epoch; set a number of "
            "batches, or a larger share"
        )
    return count


def _by_shape(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    groups: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return groups
