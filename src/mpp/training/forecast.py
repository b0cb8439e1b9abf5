"""Whether a run fits its card: said at its start, and when it did not."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from lightning import Trainer

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import bucket_of
from mpp.cache.index import Entry
from mpp.training.choosing import is_open, settle
from mpp.training.costs import Costs
from mpp.training.measuring import Run
from mpp.training.module import MaskedPriorModule
from mpp.training.plan_lines import TABLE, gib, lines_of, table
from mpp.training.planning import (
    ASIDE,
    Bucket,
    Choice,
    choices,
    costing,
    next_cheaper,
    transferred,
)

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
        choice: How it runs, and what steps of its largest samples take.
        bucket: Their name.
        room: Bytes of the card that are free.
        chosen: Some of it was chosen here.
        fits: It is expected to.
        processes: Of this run on this machine.
    """

    choice: Choice
    bucket: str
    room: int
    chosen: bool = False
    fits: bool = True
    processes: int = 1

    @classmethod
    def of(cls, trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule) -> "Forecast | None":
        """Count it, and choose what is `auto`, where there is a card, or one is named.

        A CPU has no such limit, and small runs start sooner without it. None as well where a model does what cannot be
        counted, which is no reason not to train it.
        """
        wanted, device = module.memory, trainer.strategy.root_device
        named = math.inf if wanted.card is None else wanted.card * 2**30
        if device.type != "cuda" and (wanted.card is None or not is_open(wanted)):
            return None
        room = int(min(named, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else named)
        bucket = largest(data)
        try:
            found = settle(wanted, costing(run_of(trainer, module)), bucket, data.batch_size, room)
        except Exception as error:  # noqa: BLE001 (whatever the counting of a new model raises)
            log.warning("what the run takes of the card could not be counted (%s)", _first(error))
            return None
        here = trainer.num_devices if device.type == "cuda" else 0
        return cls(found.choice, bucket.name, room, is_open(wanted), found.fits, here)

    @property
    def costs(self) -> Costs:
        """What it takes."""
        return self.choice.costs

    def check(self) -> None:
        """Refuse a run whose weights alone are larger than the card, or than what is free of the CPU's memory.

        Raises:
            ValueError: As above.
        """
        if self.costs.resting > self.room:
            raise ValueError(
                f"weights ({gib(self.costs.base)}), adapter and optimizer ({gib(self._trained)}) alone are larger than "
                f"what is free of the card ({gib(self.room)}); set memory.resident=2, or memory.base=fp8 or nf4, or "
                "see python -m mpp.plan for what fits"
            )
        waiting, free = self.costs.waiting * self.processes, psutil.virtual_memory().available
        if waiting > free:
            raise ValueError(
                f"memory.resident={self.choice.memory.resident}: the blocks of the model wait in the CPU's memory, "
                f"{gib(waiting)} for {self.processes} process{'es' * (self.processes > 1)}, of which {gib(free)} are "
                "free; set memory.base=fp8 or nf4, or memory.resident=all where the card holds it"
            )

    def say(self) -> None:
        """What is expected, and a warning where it may not fit."""
        for line in self.lines():
            log.info(line)
        if not self.fits:
            log.warning(
                "this may not fit: %s are expected of %s that are free, of which about %g GiB are not torch's; python "
                "-m mpp.plan says what takes less; a base in fewer bits (memory.base=fp8) is never chosen by itself",
                gib(self.costs.peak),
                gib(self.room),
                ASIDE,
            )

    def lines(self) -> list[str]:
        """What was chosen, and what is expected."""
        costs, memory = self.costs, self.choice.memory
        lines = [f"memory: auto chose {self.choice.changes}"] if self.chosen else []
        lines.append(
            f"memory: {gib(costs.peak)} of {gib(self.room)} at most (weights {gib(costs.base)}, adapter and optimizer "
            f"{gib(self._trained)}, step {gib(costs.step)}; samples of {self.bucket})"
        )
        if costs.streamed:
            brought = transferred(costs, memory, prior=costs.prior > 0) / 1e9
            lines.append(
                f"memory: {memory.resident} of {self.choice.weights.count} blocks on the GPU at once, {brought:.3g} GB "
                f"between GPU and CPU in each batch's step, {gib(costs.waiting)} of the CPU's memory"
            )
        return lines

    @property
    def _trained(self) -> int:
        return self.costs.adapter + self.costs.optimizer


def out_of_memory(trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule, error: Exception) -> str:
    """What is said of a run that ran out of memory: where, its plan, and what takes less."""
    run, bucket = run_of(trainer, module), largest(data, module.shape)
    where = f"out of memory in step {trainer.global_step + 1}, on {data.batch_size} x {bucket.name} ({_first(error)})"
    try:
        counting = costing(run)
        costs = counting.count(bucket.shape, data.batch_size, bucket.conditioning)
        now = Choice(run.memory, costs, counting.weights)
        found = list(choices(counting, bucket, data.batch_size))
    except Exception as failed:  # noqa: BLE001 (as above)
        return f"{where}; what takes less could not be counted ({_first(failed)})"
    lines = [
        where,
        f"what {now.name} takes for it, as counted:",
        *lines_of(now),
        TABLE,
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
        return f"next: go on from the last save with resume={folder} {less.changes}, {takes}"
    return f"next: a run of its own with {less.name}, {takes}; the base's precision is never changed by itself"
