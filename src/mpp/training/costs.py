"""What a step of training takes in memory and FLOPs: counted on the real step and transformer, without weights.

Where a transformer repeats blocks, few of them run: all that is counted grows by the same amount with each block more.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpp.batching.batch import Batch
from mpp.core.flow import Noisy
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter, inject
from mpp.memory.activations import Activations, Host
from mpp.memory.bases import quantise
from mpp.memory.counting import Meter, bytes_of, weightless, without_numbers
from mpp.memory.settings import Memory
from mpp.models.contract import Architecture, Conditioning
from mpp.models.experts import Experts, parts_of
from mpp.training.rates import optimizer_of
from mpp.training.step import MaskedPriorStep, Position, passes_of
from mpp.training.teacher import Teacher

_FEW = 3  # blocks of a list: the first, the last, and one that is neither
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


@dataclass(frozen=True)
class Costs:
    """What steps of one shape take, in bytes and FLOPs.

    Attributes:
        base: Bytes of the frozen transformer on the device.
        adapter: Of the adapter.
        optimizer: Of the optimizer's state.
        gradients: Of all gradients of the adapter.
        saved: What the forward pass leaves on the device for the backward pass.
        step: The most that a step takes on top of base, adapter and optimizer.
        teacher: The most that the teacher's pass takes on top of them; 0 where it does not run.
        plain: FLOPs of a step without the teacher.
        prior: FLOPs of the teacher's pass; 0 where it does not run.
    """

    base: int
    adapter: int
    optimizer: int
    gradients: int
    saved: int
    step: int
    teacher: int
    plain: int
    prior: int

    @property
    def resting(self) -> int:
        """What is there between steps."""
        return self.base + self.adapter + self.optimizer

    @property
    def peak(self) -> int:
        """The most bytes that are there at once."""
        return self.resting + self.step


class Costing:
    """Counts a run's steps.

    Args:
        run: What decides.
        whole: Run every block, instead of few.
    """

    def __init__(self, run: Run, *, whole: bool = False) -> None:
        self.run = run
        self.skeleton = run.architecture.skeleton(published=True).requires_grad_(False)
        self.config = next(part.config for _, part in parts_of(self.skeleton))
        self.lists = _lists(run.architecture, self.skeleton)
        full = self._adapted(copy.deepcopy(self.skeleton))
        self.static = self._resting(full)
        self.few = {} if whole or not self._is_uniform(full) else {
            name: len(blocks) for name, blocks in self.lists.items() if len(blocks) > _FEW + 1
        }  # fmt: skip

    def with_activations(self, activations: Activations) -> "Costing":
        """The same run with other activations."""
        other = copy.copy(self)
        other.run = replace(self.run, memory=replace(self.run.memory, activations=activations))
        return other

    def count(self, shape: Sequence[int], batch: int = 1, conditioning: Conditioning | None = None) -> Costs:
        """Costs of steps of one shape.

        Args:
            shape: Of a sample's latents, with the frames that the model is given: (channels, frames, height, width).
            batch: Samples of a batch.
            conditioning: One sample's record; None: zeros of the longest text.
        """
        record = self.run.architecture.blank(self.config, shape) if conditioning is None else conditioning
        few = dict.fromkeys(self.few, _FEW)
        base = self._counted(shape, batch, record, few)
        counted = dict(base)
        for name, number in self.few.items():
            more = self._counted(shape, batch, record, {**few, name: _FEW + 1})
            for key, value in base.items():
                counted[key] += (number - _FEW) * (more[key] - value)
        peaks = {key: value for key, value in counted.items() if isinstance(key, tuple)}
        teacher = max((value for key, value in peaks.items() if key[0] == "teacher"), default=0)
        return Costs(
            **self.static,
            saved=counted["saved"],
            step=max(peaks.values()),
            teacher=teacher,
            plain=counted["student"],
            prior=counted["teacher"],
        )

    # ---------------------------------------------------------------- the transformer without weights

    def _adapted(self, transformer: nn.Module) -> nn.Module:
        run = self.run
        if run.memory.base != "bf16":
            quantise(transformer, [name for name, _ in run.architecture.quantisable(transformer)], run.memory.base)
        inject(transformer, run.adapter, run.architecture.lora_targets, seed=0)
        if run.memory.recomputes:
            transformer.enable_gradient_checkpointing()
        return transformer.train()

    def _resting(self, transformer: nn.Module) -> dict[str, int]:
        trained = [p for p in transformer.parameters() if p.requires_grad]
        parts = [part for _, part in parts_of(transformer)]
        frozen = [bytes_of([*(p for p in part.parameters() if not p.requires_grad), *part.buffers()]) for part in parts]
        away = isinstance(transformer, Experts) and transformer.offload
        sizes = {"base": max(frozen) if away else sum(frozen), "adapter": bytes_of(trained)}
        state = optimizer_bytes(self.run, [(n, p) for n, p in transformer.named_parameters() if p.requires_grad])
        return {**sizes, "gradients": sizes["adapter"], "optimizer": state}

    def _is_uniform(self, transformer: nn.Module) -> bool:
        """Whether all blocks of each list have the same weights and adapters."""
        return all(
            len({tuple((n, p.shape, p.dtype) for n, p in block.named_parameters()) for block in blocks}) == 1
            for blocks in _lists(self.run.architecture, transformer).values()
        )

    # ---------------------------------------------------------------- a step without numbers

    def _counted(self, shape: Sequence[int], batch: int, record: Conditioning, few: dict[str, int]) -> dict[Any, int]:
        transformer = self._adapted(_shortened(self.skeleton, few))
        samples = self.run.architecture.collate([record] * batch)
        with without_numbers():
            return measured(self.run, weightless(transformer), Meter(), samples, shape)


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
        and the FLOPs of `teacher` and `student`.
    """
    handles = list(_watched(run.architecture, transformer, meter))
    meter.known([*transformer.parameters(), *transformer.buffers(), *conditioning.tensors().values()])
    with meter:
        batch = _batch(run.architecture, conditioning, shape)
        for parameter in (p for p in transformer.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter) if run.accumulates else None
        passes = passes_of(run.architecture, transformer, Teacher(), run.memory.activations, Elsewhere(meter))
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
    return {**meter.peaks, "saved": saved, **flops}


class Elsewhere(Host):
    """The CPU's memory beside a GPU, where there is a CPU alone: what waits in it is not on the device."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def away(self, tensor: Tensor) -> Tensor:
        """A copy that is not counted."""
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
    for name, blocks in _lists(architecture, transformer).items():
        for number, block in enumerate(blocks):
            ends = tuple(at for at in (number, number - len(blocks)) if -3 < at < 2)
            yield block.register_forward_pre_hook(entered(name, ends or ("",)))
            yield block.register_forward_hook(left(name, ends or ("",)))


def _lists(architecture: Architecture, transformer: nn.Module) -> dict[str, list[nn.Module]]:
    """The transformer's blocks by the name of the list that they lie in."""
    found: dict[str, list[nn.Module]] = {}
    for name, block in architecture.blocks(transformer):
        found.setdefault(name.rpartition(".")[0], []).append(block)
    return found


def _shortened(skeleton: nn.Module, few: Mapping[str, int]) -> nn.Module:
    """A copy with so many blocks in some of its lists."""
    memo = {}
    for name, number in few.items():
        blocks = skeleton.get_submodule(name)
        memo[id(blocks)] = copy.deepcopy(nn.ModuleList(list(blocks)[:number]))
    return copy.deepcopy(skeleton, memo)


def optimizer_bytes(run: Run, trained: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Bytes of the optimizer's state, by a step of it on one tensor of each shape."""
    shapes = Counter((("lora_B." if "lora_B." in name else "lora_A."), p.shape, p.dtype) for name, p in trained)
    tensors = {kind: nn.Parameter(torch.zeros(kind[1], dtype=kind[2])) for kind in shapes}
    optimizer = optimizer_of(run.optimizer, [(k[0], tensor) for k, tensor in tensors.items()], run.adapter.b_lr_ratio)
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    return sum(
        number * bytes_of(value for value in tree_leaves(optimizer.state[tensors[kind]]) if isinstance(value, Tensor))
        for kind, number in shapes.items()
    )
