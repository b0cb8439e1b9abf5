"""What blocks cost that wait in the CPU's memory: seconds, memory, transfers, and whether anything changes."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu import model
from benchmarks.gpu.case import GIB, Case, Found, seconds_of
from benchmarks.gpu.model import PLAIN, PRIOR, Trainee
from mpp.lora.adapters import Adapter
from mpp.memory.link import GpuLink, Slot, layout_bytes, link_to, views
from mpp.memory.streaming import Layout
from mpp.models.streamed import streamable
from mpp.training.costs import Costing
from mpp.training.measuring import Run
from mpp.training.planning import ASIDE

FEW = 4  # blocks of a model whose gradients are compared
TEACHERS = ("apart", "lockstep")
NONE = "-"  # of what there is not on a CPU
_COPIES = 10


def streams(case: Case) -> Found:
    """Seconds and peaks of a step with a prior, and what of the copies is hidden behind the arithmetic."""
    found = dict(unchanged(case))
    found["good"] = found["unchanged_apart"] and found["unchanged_lockstep"]
    case, resident = _sized(case)
    trainee, data = case.trainee(resident=resident), case.batch()
    way = Way.of(trainee, resident, case.device)
    found |= {"resident": resident, "gb_per_s": way.speed / 1e9 if way.speed else NONE}
    found["forecast_gib"] = (counted(case) + way.saved) / GIB
    for teacher in TEACHERS:
        step = trainee.with_teacher(teacher).stepper(data, PRIOR)
        step()  # warm
        before = trainee.streaming.loads.total()
        seconds, peak = timed(step, case.device)
        loads = trainee.streaming.loads.total() - before
        with nothing_copied():
            alone = seconds_of(step, case.device)
        trainee.streaming.rest()  # what lies in the slots is not what they say
        about = {"s": seconds, "peak_gib": peak, "compute_s": alone, **way.told(loads, seconds, alone)}
        found |= {f"{teacher}_{name}": value for name, value in about.items()}
    return found


def fits(case: Case) -> Found:
    """Steps in the memory of a smaller card, of which CUDA itself takes some."""
    if case.device != "cpu":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.row.card - ASIDE) * GIB / whole))
    card = case.row.card
    case, resident = _sized(case)
    trainee, data = case.trainee(resident=resident), case.batch()
    found: Found = {"resident": resident, "card": card}
    for name, loss in (("plain", PLAIN), ("prior", PRIOR)):
        trainee.stepper(data, loss)()
        found[f"{name}_s"], found[f"{name}_peak_gib"] = timed(trainee.stepper(data, loss), case.device)
    found["reserved_gib"] = NONE if case.device == "cpu" else torch.cuda.max_memory_reserved() / GIB
    found["forecast_gib"] = (counted(case) + Way.of(trainee, resident, "cpu").saved) / GIB
    loss = trainee.forward(data, PRIOR)[0].item()
    return {**found, "loss": loss, "good": math.isfinite(loss)}


@dataclass(frozen=True)
class Way:
    """What goes to the device in a step, and how fast.

    Attributes:
        coming: Bytes of each block that does not stay.
        saved: What all slots take beyond all blocks, in bytes; below 0 where blocks wait.
        speed: Bytes per second of copies with nothing beside them; 0 where nothing is copied.
    """

    coming: Sequence[int]
    saved: int
    speed: float

    @classmethod
    def of(cls, trainee: Trainee, resident: int, device: str) -> "Way":
        """Of a trainee with so many resident blocks."""
        (group,) = streamable(trainee.module.architecture, trainee.module.transformer)
        weights = [[*(p for p in block.parameters() if not p.requires_grad), *block.buffers()] for block in group]
        sizes = list(map(layout_bytes, weights))
        layout = Layout.of([sizes], resident)
        coming = [size for size, stays in zip(sizes, layout.stays[0], strict=True) if not stays]
        speed = 0.0 if device == "cpu" else bytes_per_second(weights[0], device)
        return cls(coming, layout.device_bytes - sum(sizes), speed)

    def told(self, loads: int, seconds: float, alone: float) -> Found:
        """How often a block came, what that takes by itself, and which part of the shorter of both was hidden.

        Args:
            loads: Of all blocks in a step.
            seconds: Of the step.
            alone: Of its arithmetic.
        """
        each = loads / len(self.coming) if self.coming else 0.0
        copies = each * sum(self.coming) / self.speed if self.speed else 0.0
        hidden = (alone + copies - seconds) / min(alone, copies) if copies else NONE
        return {"loads": each, "transfer_s": copies if self.speed else NONE, "overlap": hidden}


def unchanged(case: Case) -> Iterator[tuple[str, bool]]:
    """Whether loss and gradients are bitwise those of resident weights, with few blocks on one frame.

    Kernels that add up in any order differ from themselves: `repeats` says whether resident weights agree with
    themselves.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
    torch.use_deterministic_algorithms(True, warn_only=True)
    few = replace(case, row=replace(case.row, shape="image"), layers=FEW)
    want = _learnt(few.trainee(), few)
    repeats = _same(_learnt(few.trainee(), few), want)
    yield "repeats", repeats
    for teacher in TEACHERS:
        found = _learnt(few.trainee(resident=2).with_teacher(teacher), few)
        yield f"unchanged_{teacher}", _same(found, want) or not repeats
    torch.use_deterministic_algorithms(False)
    gc.collect()  # models hold themselves, and would count among what is measured next


def _learnt(trainee: Trainee, case: Case) -> list[Tensor]:
    random = torch.Generator(case.device).manual_seed(2)
    trained = [p for p in trainee.module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, model.SPREAD, generator=random)
    loss, _ = trainee.forward(case.batch(samples=2, with_prior=1), PRIOR)
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained)]


def _same(found: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, found, want))


def _sized(case: Case) -> tuple[Case, int]:
    """The case and its resident blocks; those of a tiny model in proportion."""
    resident = case.row.resident or 2
    if not case.tiny:
        return case, resident
    return replace(case, layers=FEW), max(2, resident * FEW // model.SIZES[case.row.size].layers)


def timed(step: Callable[[], None], device: str) -> tuple[float, float | str]:
    """Seconds and peak in GiB of a step."""
    if device == "cpu":
        return seconds_of(step, device), NONE
    torch.cuda.reset_peak_memory_stats()
    return seconds_of(step, device), torch.cuda.max_memory_allocated() / GIB


def bytes_per_second(weights: Sequence[Tensor], device: str) -> float:
    """Of copies of a block, with nothing beside them; 0 where nothing is copied."""
    if device == "cpu":
        return 0.0
    link, slot = link_to(torch.device(device)), Slot(layout_bytes(weights))
    assert isinstance(link, GpuLink)
    kept = link.keep(weights)
    link.fetch(kept, slot)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(link.stream)
    for _ in range(_COPIES):
        link.fetch(kept, slot)
    after.record(link.stream)
    after.synchronize()
    return slot.size * _COPIES / before.elapsed_time(after) * 1000


@contextmanager
def nothing_copied() -> Iterator[None]:
    """Inside, blocks run with the weights that lie in their slots: the arithmetic alone."""
    whole = GpuLink.fetch

    def fetch(self: GpuLink, kept: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        return whole(self, kept, slot) if slot.memory is None else views(slot.memory, kept)

    GpuLink.fetch = fetch
    try:
        yield
    finally:
        GpuLink.fetch = whole


def counted(case: Case) -> int:
    """Bytes at the peak of a step with all weights on the device, the teacher in lockstep."""
    memory = replace(case.memory(), teacher="lockstep")
    adapter = Adapter(rank=model.RANK, alpha=model.RANK)
    costing = Costing(Run(case.architecture(), adapter, memory, PRIOR, torch.optim.AdamW))
    return costing.count((16, *case.shape)).peak
