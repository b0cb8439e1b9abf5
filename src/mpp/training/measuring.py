"""One real step of training under a meter, with or without numbers: what it takes while which block runs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpp.batching.batch import Batch
from mpp.core.flow import Noisy
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.activations import Host
from mpp.memory.counting import Meter
from mpp.memory.settings import Memory
from mpp.models.contract import Architecture, Conditioning
from mpp.models.experts import parts_of
from mpp.training.passes import passes_of
from mpp.training.step import MaskedPriorStep, Position
from mpp.training.teacher import Teacher

_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of autocast; all others have none


@dataclass(frozen=True)
class Run:
    """What decides on the costs of a run's steps, besides their shape.

    Attributes:
        architecture: The DiT family.
        adapter: What is trained.
        memory: How it fits.
        loss: Masked prior loss; the teacher runs where it has a prior.
        optimizer: Called with the trainable parameters.
        precision: As the Trainer's.
        accumulates: Gradients of several batches are added up, so that they are there all the time.
    """

    architecture: Architecture
    adapter: Adapter
    memory: Memory
    loss: MaskedPriorLoss
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    precision: str = "bf16-mixed"
    accumulates: bool = False

    def __post_init__(self) -> None:
        """What nobody chose is as where nothing is counted."""
        object.__setattr__(self, "memory", self.memory.settled)


def measured(
    run: Run, transformer: nn.Module, meter: Meter, conditioning: Conditioning, shape: Sequence[int]
) -> dict[Any, int]:
    """Bytes besides the weights, and FLOPs, of one step.

    Args:
        run: What decides.
        transformer: With its adapter.
        meter: What counts.
        conditioning: Batched.
        shape: Of a sample's latents, with the frames that the model is given.

    Returns:
        By (pass, list of blocks, which of them) the most bytes that were there, and by name what the forward pass left
        and moved to the CPU, and the FLOPs of `teacher` and `student`.
    """
    handles = list(_watched(run.architecture, transformer, meter))
    meter.known([*transformer.parameters(), *transformer.buffers(), *conditioning.tensors().values()])
    with meter:
        batch = _batch(run.architecture, conditioning, shape)
        for parameter in (p for p in transformer.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter) if run.accumulates else None
        elsewhere = Elsewhere(meter)
        passes = passes_of(run.architecture, transformer, Teacher(), run.memory, elsewhere)
        before = meter.live
        with _autocast(run.precision):
            output = _Step(run.architecture, run.loss, passes)(batch, Position(0, 0))
            total = run.loss.terms(output.sums).total
        saved = meter.live - before
        total.backward()
    for handle in handles:
        handle.remove()
    flops = Counter({"teacher": 0, "student": 0})
    for (name, *_), number in meter.flops.items():
        flops["teacher" if name == "teacher" else "student"] += number
    return {**meter.peaks, "saved": saved, "moved": elsewhere.moved, **flops}


class Elsewhere(Host):
    """The CPU's memory beside a GPU, where there is a CPU alone: what waits in it is not on the device."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.moved = meter, 0

    def away(self, tensor: Tensor) -> Tensor:
        """A copy that is not counted."""
        self.moved += tensor.nbytes
        return self.meter.unseen(tensor.detach().clone)

    def back(self, copy: Tensor, device: torch.device) -> Tensor:
        """A copy of it that is."""
        del device
        return copy.clone()


class _Step(MaskedPriorStep):
    """A step on noise that nobody draws, at a sigma of the last expert's."""

    def corrupt(self, batch: Batch, position: Position, sigma: float | None = None) -> Noisy:
        del position, sigma
        with _disable_current_modes():
            levels = torch.ones(len(batch))
        return Noisy(torch.zeros_like(batch.latents), levels, torch.zeros_like(batch.latents))


def _batch(architecture: Architecture, conditioning: Conditioning, shape: Sequence[int]) -> Batch:
    count = len(next(iter(conditioning.tensors().values())))
    channels, frames, *sides = shape
    frames -= architecture.given_frames
    with _disable_current_modes():
        mask = torch.ones(count, 1, frames, *sides)
        mask[..., : sides[-1] // 2] = 0
    latents = torch.zeros(count, channels, frames, *sides)
    return Batch(tuple(map(str, range(count))), latents, mask, conditioning)


def _autocast(precision: str) -> AbstractContextManager[object]:
    dtype = _PRECISIONS.get(precision)
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _watched(architecture: Architecture, transformer: nn.Module, meter: Meter) -> Iterator[RemovableHandle]:
    """Tell the meter which block runs, from the start and from the end of its list."""

    def entered(name: str, where: tuple[int, ...]) -> Callable[..., None]:
        def enter(*_: object) -> None:
            backward = torch._C._current_graph_task_id() != -1  # noqa: SLF001
            kind = "backward" if backward else "student" if torch.is_grad_enabled() else "teacher"
            meter.part(*((kind, name, at) for at in where))

        return enter

    def left(name: str, where: tuple[int, ...]) -> Callable[..., None]:
        def leave(_: nn.Module, __: object, output: Any) -> None:  # noqa: ANN401
            if torch._C._current_graph_task_id() == -1:  # noqa: SLF001
                for made in [made for made in tree_leaves(output) if isinstance(made, Tensor) and made.requires_grad]:
                    made.register_hook(lambda _: meter.part(*(("backward", name, at) for at in where)))

        return leave

    for _, part in parts_of(transformer):
        yield part.register_forward_pre_hook(entered("", (0,)))
    for name, blocks in block_lists(architecture, transformer).items():
        for number, block in enumerate(blocks):
            ends = tuple(at for at in (number, number - len(blocks)) if -3 < at < 2)
            yield block.register_forward_pre_hook(entered(name, ends or ("",)))
            yield block.register_forward_hook(left(name, ends or ("",)))


def block_lists(architecture: Architecture, transformer: nn.Module) -> dict[str, list[nn.Module]]:
    """The transformer's blocks by the name of the list that they lie in."""
    found: dict[str, list[nn.Module]] = {}
    for name, block in architecture.blocks(transformer):
        found.setdefault(name.rpartition(".")[0], []).append(block)
    return found
