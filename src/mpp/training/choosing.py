"""What nobody chose of how a run fits: the fastest way that a card holds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mpp.memory.activations import Activations
from mpp.memory.settings import Memory
from mpp.memory.streaming import PASSING
from mpp.training.costs import Costing
from mpp.training.planning import ASIDE, Bucket, Choice, holds, least_seconds

TFLOPS = 100.0  # TFLOP/s of a GPU as good as any: only which of two ways is faster depends on it
TRANSFER = 25.0  # GB/s between the CPU's memory and such a GPU's
MARGIN = 0.1  # of the peak, by which counting may be wrong and the GPU's memory in pieces


@dataclass(frozen=True)
class Chosen:
    """The way, and whether it fits."""

    choice: Choice
    fits: bool


def is_open(memory: Memory) -> bool:
    """Whether there is something to choose."""
    return "auto" in (memory.activations, memory.resident)


def settle(wanted: Memory, counting: Costing, bucket: Bucket, batch: int, room: float | None) -> Chosen:
    """How a run goes, and what it takes: chosen where something is open and it is known for how much memory.

    Args:
        wanted: As the user has it.
        counting: Of the run.
        bucket: Its largest samples.
        batch: Samples of a batch.
        room: Bytes of the device that are free; None: it is not known.
    """

    def counted(memory: Memory) -> Choice:
        costs = counting.with_memory(memory).count(bucket.shape, batch, bucket.conditioning)
        return Choice(memory, costs, counting.weights)

    if room is not None and is_open(wanted):
        return fastest(wanted, counted, room)
    choice = counted(wanted.settled)
    return Chosen(choice, fits=room is None or holds(choice.costs, room))


def fastest(wanted: Memory, counted: Callable[[Memory], Choice], room: float) -> Chosen:
    """The way that takes the least time of those that fit; where none does, the one that takes the least memory.

    Only what is `auto` is chosen, and the base never. Ways that cannot be faster than one that fits are not counted.

    Args:
        wanted: As the user has it.
        counted: Counts a step with all blocks on the device and the teacher apart.
        room: Bytes of the device that are free.
    """
    usable = (room - ASIDE * 2**30) / (1 + MARGIN) + ASIDE * 2**30

    def ways(activations: Activations) -> list[Choice]:
        whole = counted(replace(wanted, activations=activations, resident="all", teacher="apart"))
        return list(_ways(whole, wanted, usable))

    if wanted.activations != "auto":
        found = ways(wanted.activations)
    else:
        found = ways("checkpoint")
        if not any(way.costs.streamed == 0 and holds(way.costs, usable) for way in found):
            found += ways("offload")  # and kept activations take more
        elif not (isinstance(wanted.resident, int) or found[0].weights.take_turns):
            found += ways("keep")  # and to offload them takes longer
    fitting = [way for way in found if holds(way.costs, usable)]
    if fitting:
        return Chosen(min(fitting, key=nominal_seconds), fits=True)
    return Chosen(min(found, key=lambda way: way.costs.peak), fits=False)


def _ways(whole: Choice, wanted: Memory, usable: float) -> Iterator[Choice]:
    """With what is set, all blocks there, and the most that fit."""
    apart = [wanted.teacher] if wanted.teacher != "auto" else ["apart"]
    streamed = [wanted.teacher] if wanted.teacher != "auto" else ["lockstep", "apart"]
    if wanted.resident in ("all", "auto"):
        yield from (whole.with_resident("all", teacher) for teacher in apart)
    if isinstance(wanted.resident, int):
        yield from (whole.with_resident(wanted.resident, teacher) for teacher in streamed)
    if wanted.resident == "auto" and whole.least is not None:
        for teacher in streamed:
            yield whole.most(usable, teacher) or whole.with_resident(PASSING, teacher)


def nominal_seconds(choice: Choice) -> float:
    """Seconds of a step on a nominal GPU: to compare ways, not to believe."""
    return least_seconds(choice.costs, choice.memory, TFLOPS, TRANSFER, prior=choice.costs.prior > 0)
