"""What fits: a run's costs beside those of other bases and activations, and the cards that they need."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpp.cache.coverage import bucket_of
from mpp.cache.format import Cache
from mpp.core.loss import MaskedPriorLoss
from mpp.memory.activations import ACTIVATIONS
from mpp.memory.bases import QUANTISED
from mpp.memory.settings import Memory, Resident, TeacherPass
from mpp.memory.streaming import PASSING
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Architecture
from mpp.training.costs import Costing, Costs, Weights
from mpp.training.measuring import Run

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
ASIDE = 1.0  # GiB of a card that CUDA, its libraries and torch's own pieces take, by experience
_GIB = 2**30
_PRIOR = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1)  # where a loss has none: what one would cost


@dataclass(frozen=True)
class Bucket:
    """A shape of samples.

    Attributes:
        shape: Of their latents, with the frames that the model is given: (channels, frames, height, width).
        name: Width, height and frames in pixels.
        conditioning: One sample's record; None: that of the longest text.
    """

    shape: tuple[int, ...]
    name: str
    conditioning: Conditioning | None = None


@dataclass(frozen=True)
class Choice:
    """One way to run, and what it takes.

    Attributes:
        memory: Settled.
        costs: Of a step.
        weights: Which of them can wait; None: it is not known.
    """

    memory: Memory
    costs: Costs
    weights: Weights | None = None

    @property
    def name(self) -> str:
        """As one types it."""
        return f"memory.base={self.memory.base} {self.changes}"

    @property
    def changes(self) -> str:
        """The settings of it that may change while a run goes on, as one types them."""
        memory = self.memory
        typed = f"memory.activations={memory.activations} memory.resident={memory.resident}"
        return typed if memory.resident == "all" else f"{typed} memory.teacher={memory.teacher}"

    def with_resident(self, resident: Resident, teacher: TeacherPass = "lockstep") -> "Choice":
        """The same with other blocks on the device, of a choice that has all of them there and the teacher apart."""
        memory = replace(self.memory, resident=resident, teacher=teacher)
        return replace(self, memory=memory, costs=self.weights.under(memory, self.costs))

    @property
    def least(self) -> "Choice | None":
        """The same with as few blocks on the device as can be; None where all have to be there."""
        if self.memory.activations == "keep" or self.weights is None or self.weights.count < PASSING:
            return None
        return self.with_resident(PASSING)

    def most(self, room: float, teacher: TeacherPass = "lockstep") -> "Choice | None":
        """The same with as many blocks on the device as its memory holds; None where it cannot.

        Args:
            room: As `holds`.
            teacher: As `memory.teacher`.
        """
        for number in range(self.weights.count - 1 if self.least else 0, PASSING - 1, -1):
            choice = self.with_resident(number, teacher)
            if holds(choice.costs, room):
                return choice
        return None


@dataclass(frozen=True)
class Plan:
    """For which samples is counted, and what is known of the machine.

    Args:
        cache_dir: A cache, whose largest samples count; None: `size` and `frames` say it.
        size: Width and height in pixels, such as 832x480.
        frames: Frames of a clip; 1 is an image.
        batch_size: Samples of a batch.
        precision: As `trainer.precision`.
        accumulate: Batches whose gradients are added up, as `trainer.accumulate_grad_batches`.
        tflops: TFLOP/s that the GPU does at best, for the least time that a step takes; None: it is not said.
        bandwidth: GB/s that its memory reads at best, likewise.
        transfer: GB/s that it reads of the CPU's memory at best, likewise.
        table: Count all bases and activations, not only those that are set.

    Raises:
        ValueError: Neither a cache nor a size, or a setting is out of its range.
    """

    cache_dir: str | None = None
    size: str | None = None
    frames: int = 1
    batch_size: int = 1
    precision: str = "bf16-mixed"
    accumulate: int = 1
    tflops: float | None = None
    bandwidth: float | None = None
    transfer: float | None = None
    table: bool = True

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if (self.cache_dir is None) == (self.size is None):
            raise ValueError(
                "what is to be counted? set data.cache_dir=CACHE, or size=832x480 (and frames=81) where there is none"
                + (", not both" if self.size else "")
            )
        if self.size is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size):
            raise ValueError(f"size must be width and height in pixels, such as 832x480, got {self.size!r}")
        for name in ("frames", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("tflops", "bandwidth", "transfer"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")

    def bucket(self, architecture: Architecture) -> Bucket:
        """The largest samples.

        Raises:
            ValueError: No finished cache, an empty one, one of another model, or a size that the model does not take.
        """
        if self.cache_dir is not None:
            cache = Cache(self.cache_dir)
            made = cache.identity()
            if made.family != architecture.family:
                raise ValueError(f"data.cache_dir={self.cache_dir} was made for {made.family}; choose its model")
            entries = cache.entries()
            if not len(entries):
                raise ValueError(f"the cache {cache.folder} holds no samples; run `python -m mpp.prepare` again")
            entry = max(entries, key=lambda entry: math.prod(entry.shape))
            record = cache.conditioning(entry, architecture.conditioning)
            return Bucket(entry.shape, bucket_of(entry.shape, architecture.latents), record)
        width, height = map(int, str(self.size).split("x"))
        step = architecture.latents.pixel_step
        if width % step or height % step:
            near = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
            raise ValueError(f"size={self.size}: this model takes multiples of {step} pixels, such as {near}")
        frames = max(self.frames, architecture.latents.temporal_stride * (architecture.least_frames - 1) + 1)
        shape = architecture.latents.shape(frames, height, width)
        return Bucket(shape, bucket_of(shape, architecture.latents))

    def seconds(self, costs: Costs, memory: Memory, *, prior: bool) -> float | None:
        """The least time of an optimizer step; None where nothing is known of the machine."""
        least = least_seconds(costs, memory, self.tflops, self.transfer, self.bandwidth, prior=prior)
        return least * self.accumulate if least else None


def least_seconds(
    costs: Costs,
    memory: Memory,
    tflops: float | None,
    transfer: float | None,
    bandwidth: float | None = None,
    *,
    prior: bool,
) -> float:
    """What a batch's FLOPs, reading the weights, or bringing them take at best, whichever is most, in seconds.

    Args:
        costs: Of the step.
        memory: Settled.
        tflops: TFLOP/s; None, here and below: it does not count.
        transfer: GB/s between the CPU's memory and the GPU's.
        bandwidth: GB/s of the GPU's memory.
        prior: Whether the teacher runs.
    """
    passes = 2 + memory.recomputes + prior
    taken = (
        (costs.plain + (costs.prior if prior else 0), tflops and tflops * 1e12),
        (transferred(costs, memory, prior=prior), transfer and transfer * 1e9),
        (passes * costs.base, bandwidth and bandwidth * 1e9),
    )
    return max((work / speed for work, speed in taken if speed), default=0.0)


def costing(run: Run) -> Costing:
    """What counts a run; with a prior also where its loss has none."""
    return Costing(run if run.loss.prior_weight > 0 else replace(run, loss=_PRIOR))


def choices(known: Costing, bucket: Bucket, batch: int) -> Iterator[Choice]:
    """What a run takes with every base and all activations, all blocks there, as one after the other is counted."""
    counted: dict[tuple[str, str], Costs] = {}
    for base in ("bf16", *QUANTISED):
        run = known.run
        try:
            run = replace(run, memory=replace(run.memory, base=base))
        except ValueError:  # its package is not installed
            continue
        eight = base == "int8"  # which takes what fp8 takes: a byte a weight, and the same scales
        each = None if eight else known if base == known.run.memory.base else Costing(run)
        for activations in ACTIVATIONS:
            if activations == "keep" and known.weights.take_turns:  # as `check_turns` says
                continue
            memory = replace(run.memory, activations=activations, resident="all", teacher="apart")
            if each is not None:
                weights = each.weights
                counted[base, activations] = each.with_memory(memory).count(bucket.shape, batch, bucket.conditioning)
            costs = counted["fp8" if eight else base, activations]
            yield Choice(memory, costs, weights)


def transferred(costs: Costs, memory: Memory, *, prior: bool) -> int:
    """Bytes that a batch's step moves between the CPU's memory and the GPU's.

    Blocks that wait are brought for the student and for computing them again, and for a teacher that runs apart.
    """
    return costs.streamed * (3 if prior and memory.teacher == "apart" else 2) + 2 * costs.moved


def holds(costs: Costs, room: float) -> bool:
    """Whether so many bytes hold it, with what others take of them."""
    return costs.peak + ASIDE * _GIB <= room


def fits(costs: Costs, card: float) -> bool:
    """Whether it fits a card of so many GiB."""
    return holds(costs, card * _GIB)


def next_cheaper(now: Choice, others: Sequence[Choice]) -> Choice | None:
    """The choice that takes less with the least change: of the same base where there is one."""
    others = [way for choice in others for way in (choice, choice.least) if way is not None]
    less = [choice for choice in others if choice.costs.peak < now.costs.peak]
    same = [choice for choice in less if choice.memory.base == now.memory.base]
    return max(same or less, key=lambda choice: choice.costs.peak, default=None)


def decoding(architecture: Architecture, memory: Memory, shape: Sequence[int]) -> int | None:
    """Bytes that the VAE takes for a sample of latents of some shape; None where its configuration is not here."""
    try:
        return architecture.load_encoders("meta", memory.encoders).decode_bytes(shape)
    except ValueError:
        return None
