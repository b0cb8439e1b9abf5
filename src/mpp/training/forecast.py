"""Whether a run fits its card: said at its start, and when it did not."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning import Trainer

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import bucket_of
from mpp.cache.index import Entry
from mpp.training.costs import Costs
from mpp.training.measuring import Run
from mpp.training.module import MaskedPriorModule
from mpp.training.planning import ASIDE, Bucket, Choice, choices, costing, gib, lines_of, next_cheaper, table

log = logging.getLogger("mpp")


def _first(error: Exception) -> str:
    """What an error says in its first line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def run_of(trainer: Trainer, module: MaskedPriorModule) -> Run:
    """What decides on the costs of a run's steps."""
    return Run(
        architecture=module.architecture,
        adapter=module.adapter,
        memory=module.memory,
        loss=module.loss,
        optimizer=module.make_optimizer,
        precision=str(trainer.precision),
        accumulates=trainer.accumulate_grad_batches > 1,
    )


def largest(data: LatentDataModule, shape: Sequence[int] | None = None) -> Bucket:
    """The largest samples of a run, with the conditioning of one of them.

    Args:
        data: Set up.
        shape: Of the latents of a batch; None: the largest that it has.
    """
    given = data.architecture.given_frames

    def fits(entry: Entry) -> bool:
        return shape is None or (entry.shape[1] - given, *entry.shape[2:]) == tuple(shape[2:])

    entries = [entry for entry in (*data.train_entries, *data.val_entries) if fits(entry)]
    entry = max(entries or data.train_entries, key=lambda entry: math.prod(entry.shape))
    record = data.cache.conditioning(entry, data.architecture.conditioning)
    return Bucket(entry.shape, bucket_of(entry.shape, data.architecture.latents), record)


@dataclass(frozen=True)
class Forecast:
    """What a run will take of a card.

    Attributes:
        costs: Of steps of its largest samples.
        bucket: Their name.
        capacity: Bytes of the card.
    """

    costs: Costs
    bucket: str
    capacity: int

    @classmethod
    def of(cls, trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule) -> "Forecast | None":
        """Count it, where there is a card: a CPU has no such limit, and small runs start sooner without it.

        None as well where a model does what cannot be counted, which is no reason not to train it.
        """
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return None
        bucket = largest(data)
        try:
            costs = costing(run_of(trainer, module)).count(bucket.shape, data.batch_size, bucket.conditioning)
        except Exception as error:  # noqa: BLE001 (whatever the counting of a new model raises)
            log.warning("what the run takes of the card could not be counted (%s)", _first(error))
            return None
        return cls(costs, bucket.name, torch.cuda.get_device_properties(device).total_memory)

    def check(self) -> None:
        """Refuse a run whose weights alone are larger than the card.

        Raises:
            ValueError: As above.
        """
        if self.costs.resting > self.capacity:
            raise ValueError(
                f"weights ({gib(self.costs.base)}), adapter and optimizer ({gib(self._trained)}) alone are larger than "
                f"the card ({gib(self.capacity)}); set memory.base=fp8 or nf4, or see python -m mpp.plan for what fits"
            )

    def say(self) -> None:
        """What is expected, and a warning where it may not fit."""
        log.info(self.line())
        if self.costs.peak + ASIDE * 2**30 > self.capacity:
            log.warning(
                "this may not fit: %s are expected of %s, of which about %g GiB are not torch's; python -m mpp.plan "
                "says what takes less",
                gib(self.costs.peak),
                gib(self.capacity),
                ASIDE,
            )

    def line(self) -> str:
        """What is expected, in a line."""
        return (
            f"memory: {gib(self.costs.peak)} of {gib(self.capacity)} at most (weights {gib(self.costs.base)}, adapter "
            f"and optimizer {gib(self._trained)}, step {gib(self.costs.step)}; samples of {self.bucket})"
        )

    @property
    def _trained(self) -> int:
        return self.costs.adapter + self.costs.optimizer


def out_of_memory(trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule, error: Exception) -> str:
    """What is said of a run that ran out of memory: where, its plan, and what takes less."""
    run, bucket = run_of(trainer, module), largest(data, module.shape)
    where = f"out of memory in step {trainer.global_step + 1}, on {data.batch_size} x {bucket.name} ({_first(error)})"
    try:
        counting = costing(run)
        now = Choice(run.memory, counting.count(bucket.shape, data.batch_size, bucket.conditioning))
        found = list(choices(counting, bucket, data.batch_size))
    except Exception as failed:  # noqa: BLE001 (as above)
        return f"{where}; what takes less could not be counted ({_first(failed)})"
    lines = [
        where,
        f"what {now.name} takes for it, as counted:",
        *lines_of(now),
        "peaks, and which cards (GiB) they fit:",
        *table(found),
        way_out(now, next_cheaper(now, found), trainer.default_root_dir),
    ]
    return "\n".join(lines)


def way_out(now: Choice, less: Choice | None, folder: str) -> str:
    """What to do next, in words."""
    if less is None:
        return "nothing here takes less: prepare smaller images or fewer frames, or take a smaller data.batch_size"
    takes = f"takes {gib(less.costs.peak)} instead of {gib(now.costs.peak)}"
    if less.memory.base == now.memory.base:
        return (
            f"next: go on from the last save with resume={folder} memory.activations={less.memory.activations}, {takes}"
        )
    return f"next: a run of its own with {less.name}, {takes}; the base's precision is never changed by itself"
