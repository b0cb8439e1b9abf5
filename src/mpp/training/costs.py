"""What a step of training takes in memory and FLOPs: counted on the real step and transformer, without weights.

Where a transformer repeats blocks, few of them run: all that is counted grows by the same amount with each block more.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mpp.lora.adapters import inject
from mpp.memory.bases import quantise
from mpp.memory.counting import Meter, bytes_of, weightless, without_numbers
from mpp.memory.link import layout_bytes
from mpp.memory.settings import Memory
from mpp.memory.streaming import Layout, frozen
from mpp.models.contract import Conditioning
from mpp.models.experts import parts_of
from mpp.models.streamed import check_turns, streamable
from mpp.training.measuring import Run, block_lists, measured
from mpp.training.rates import optimizer_of

_FEW = 3  # blocks of a list: the first, the last, and one that is neither


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
        moved: Bytes of activations that go to the CPU's memory and come back.
        streamed: Bytes of weights that one pass through all blocks brings to the device.
        waiting: Bytes of weights in the CPU's memory.
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
    moved: int = 0
    streamed: int = 0
    waiting: int = 0

    @property
    def resting(self) -> int:
        """What is there between steps."""
        return self.base + self.adapter + self.optimizer

    @property
    def peak(self) -> int:
        """The most bytes that are there at once."""
        return self.resting + self.step


@dataclass(frozen=True)
class Weights:
    """Bytes of the frozen weights.

    Attributes:
        outside: Of those that are always on the device.
        blocks: Of each transformer's blocks that can wait in the CPU's memory.
        take_turns: Of several transformers only one has its blocks on the device.
    """

    outside: int
    blocks: tuple[tuple[int, ...], ...]
    take_turns: bool = False

    @property
    def count(self) -> int:
        """Blocks of one transformer."""
        return max(map(len, self.blocks))

    def under(self, memory: Memory, costs: Costs) -> Costs:
        """A step's costs with blocks where `memory` has them, and the teacher when it has it.

        In lockstep the teacher finds all there that the student's pass has left so far: that is counted as all that it
        leaves.

        Args:
            memory: Settled.
            costs: Of a run with the same base and activations, and the teacher apart.
        """
        number = memory.resident if isinstance(memory.resident, int) else None
        streams = number is not None or self.take_turns
        layout = Layout.of(self.blocks, number)
        passing = [
            sum(size for size, stays in zip(*pair, strict=True) if not stays)
            for pair in zip(self.blocks, layout.stays, strict=True)
        ]
        lockstep = memory.teacher == "lockstep" and costs.teacher > 0
        whole = sum(map(sum, self.blocks))
        return replace(
            costs,
            base=self.outside + (layout.device_bytes if streams else whole),
            streamed=max(passing),
            waiting=whole if streams else 0,
            step=max(costs.step, costs.saved + costs.teacher) if lockstep else costs.step,
        )


class Costing:
    """Counts a run's steps.

    Args:
        run: What decides.
        whole: Run every block, instead of few.

    Raises:
        ValueError: A base whose bytes no shape tells, or as `check_turns`.
    """

    def __init__(self, run: Run, *, whole: bool = False) -> None:
        if run.memory.base == "gguf":
            raise ValueError(
                "what a GGUF file takes is not counted, as its types differ from layer to layer; memory.base=nf4 and "
                "int8 say what files of 4 and of 8 bits take"
            )
        check_turns(run.architecture, run.memory.activations)
        self.run = run
        self.skeleton = run.architecture.skeleton(published=True).requires_grad_(False)
        self.config = next(part.config for _, part in parts_of(self.skeleton))
        self.lists = block_lists(run.architecture, self.skeleton)
        full = self._adapted(copy.deepcopy(self.skeleton))
        self.static = self._resting(full)
        blocks = tuple(
            tuple(layout_bytes(list(frozen(block))) for block in group) for group in streamable(run.architecture, full)
        )
        turns = len(blocks) > 1 and run.architecture.offload
        self.weights = Weights(self.static["base"] - sum(map(sum, blocks)), blocks, turns)
        self.few = {} if whole or not self._is_uniform(full) else {
            name: len(blocks) for name, blocks in self.lists.items() if len(blocks) > _FEW + 1
        }  # fmt: skip

    def with_memory(self, memory: Memory) -> "Costing":
        """The same run with other settings of memory, on the same base."""
        other = copy.copy(self)
        other.run = replace(self.run, memory=memory)
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
        costs = Costs(
            **self.static,
            saved=counted["saved"],
            step=max(peaks.values()),
            teacher=teacher,
            plain=counted["student"],
            prior=counted["teacher"],
            moved=counted["moved"],
        )
        return self.weights.under(self.run.memory, costs)

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
        sizes = {"base": bytes_of(frozen(transformer)), "adapter": bytes_of(trained)}
        state = optimizer_bytes(self.run, [(n, p) for n, p in transformer.named_parameters() if p.requires_grad])
        return {**sizes, "gradients": sizes["adapter"], "optimizer": state}

    def _is_uniform(self, transformer: nn.Module) -> bool:
        """Whether all blocks of each list have the same weights and adapters."""
        return all(
            len({tuple((n, p.shape, p.dtype) for n, p in block.named_parameters()) for block in blocks}) == 1
            for blocks in block_lists(self.run.architecture, transformer).values()
        )

    # ---------------------------------------------------------------- a step without numbers

    def _counted(self, shape: Sequence[int], batch: int, record: Conditioning, few: dict[str, int]) -> dict[Any, int]:
        transformer = self._adapted(_shortened(self.skeleton, few))
        run = replace(self.run, memory=replace(self.run.memory, teacher="apart"))
        samples = self.run.architecture.collate([record] * batch)
        with without_numbers():
            return measured(run, weightless(transformer), Meter(), samples, shape)


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
