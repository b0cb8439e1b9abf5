"""Blocks whose frozen weights wait in the CPU's memory and are on the device while they run."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpp.memory.link import Slot, layout_bytes, link_to

PASSING = 2  # slots that blocks pass through: one runs while the next one comes


@dataclass(frozen=True)
class Layout:
    """Which blocks stay on the device, and what that takes of it.

    Attributes:
        stays: By transformer, for each block whether it stays.
        homes: Bytes of the slots of those that stay. One transformer's lie where another's do.
        passing: Bytes of each of the slots that all others pass through; 0 where there are none.
    """

    stays: Sequence[Sequence[bool]]
    homes: Sequence[int]
    passing: int

    @classmethod
    def of(cls, sizes: Sequence[Sequence[int]], resident: int | None) -> "Layout":
        """Those that stay are evenly spread, so that others come while they run.

        Args:
            sizes: Bytes of each transformer's blocks, in the order in which they run.
            resident: How many are there at once, with those that pass through; None: all of one transformer.
        """
        stays = [_spread(len(group), resident) for group in sizes]
        held = [[size for size, stay in zip(*pair, strict=True) if stay] for pair in zip(sizes, stays, strict=True)]
        count = max(map(len, held), default=0)
        homes = [max(group[number] for group in held if number < len(group)) for number in range(count)]
        others = [size for pair in zip(sizes, stays, strict=True) for size, stay in zip(*pair, strict=True) if not stay]
        return cls(stays, homes, max(others, default=0))

    @property
    def device_bytes(self) -> int:
        """Of the device's memory that all slots take."""
        return sum(self.homes) + PASSING * self.passing


def _spread(count: int, resident: int | None) -> list[bool]:
    held = count if resident is None or resident >= count else resident - PASSING
    return [(number + 1) * held // count > number * held // count for number in range(count)]


@dataclass(eq=False)
class _Block:
    """A block's frozen parameters and buffers, and what they hold while it is not on the device.

    Attributes:
        module: The block.
        weights: The parameters and buffers themselves.
        kept: What they hold, in the CPU's memory.
        home: The slot that is always the same for it; None: it passes through.
        slot: Where it is now; None: in the CPU's memory alone.
        before: The block before it in the same transformer.
        after: The one after it.
    """

    module: nn.Module
    weights: list[Tensor]
    kept: list[Tensor]
    home: Slot | None = None
    slot: Slot | None = None
    before: "_Block | None" = None
    after: "_Block | None" = None

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Let the weights hold other tensors."""
        for weight, tensor in zip(self.weights, tensors, strict=True):
            weight.data = tensor

    def coming(self, *, backward: bool) -> "_Block | None":
        """The block that is to be fetched while this one runs."""
        block = self.before if backward else self.after
        while block is not None and block.home is not None and block.slot is block.home:
            block = block.before if backward else block.after
        return block if block is not None and block.slot is None else None


class Streaming:
    """Keeps some blocks' frozen weights on the device and brings those of the others when they run.

    A block that is about to run is waited for, and the next one of its transformer is fetched while it runs: in a
    backward pass, which computes blocks again, the one before it. What is trained stays on the device all the time.
    Results are bitwise what they are with all weights there.

    The backward pass must compute the blocks again: a weight that autograd had saved would be another block's by then.

    Moving a block to a device, by itself or with its model, takes there what it trains and what it shares with other
    blocks, and the rest when it runs.

    Args:
        groups: Blocks in the order in which they run; one group for each transformer.
        resident: Blocks whose weights are on the device at once, at least 2; None: all of one transformer.

    Attributes:
        loads: How often each block was fetched.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], resident: int | None) -> None:
        counts = Counter(weight for group in groups for module in group for weight in set(frozen(module)))
        weights = [[[t for t in frozen(module) if counts[t] == 1] for module in group] for group in groups]
        layout = Layout.of([[layout_bytes(block) for block in group] for group in weights], resident)
        homes = [Slot(size) for size in layout.homes]
        self._passing = [Slot(layout.passing) for _ in range(PASSING if layout.passing else 0)]  # the last used is last
        self._blocks: dict[nn.Module, _Block] = {}
        for modules, group, stays in zip(groups, weights, layout.stays, strict=True):
            before, free = None, iter(homes)
            for module, block, stay in zip(modules, group, stays, strict=True):
                made = _Block(module, block, block, next(free) if stay else None, before=before)
                if before is not None:
                    before.after = made
                self._blocks[module] = before = made
        self._there: dict[Slot, _Block] = {}
        self.loads: Counter[nn.Module] = Counter()
        self._settle_on(torch.device("cpu"))
        for module in self._blocks:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module._apply = self.mover(module)  # noqa: SLF001 (tests/models/test_private.py says when it changes)

    @torch.inference_mode(mode=False)
    def rest(self) -> None:
        """Free what is on the device; blocks come again when they run."""
        for slot in [*self._there]:
            self._leave(slot)
        for slot in {*self._passing, *(block.home for block in self._blocks.values() if block.home)}:
            self._link.free(slot)

    # ---------------------------------------------------------------- while blocks run

    @torch.inference_mode(mode=False)  # what a validation fetches, training's next step finds there
    def _enter(self, module: nn.Module, _: object) -> None:
        block = self._blocks[module]
        if block.slot is None:
            self._fetch(block)
        if block.slot in self._passing:
            self._passing.append(self._passing.pop(self._passing.index(block.slot)))
        self._link.wait(block.slot)
        coming = block.coming(backward=torch._C._current_graph_task_id() != -1)  # noqa: SLF001
        if coming is not None:
            self._fetch(coming, block)

    def _fetch(self, block: _Block, running: _Block | None = None) -> None:
        slot = block.home or next(slot for slot in self._passing if running is None or slot is not running.slot)
        self._leave(slot)
        block.hold(self._link.fetch(block.kept, slot))
        block.slot, self._there[slot] = slot, block
        self.loads[block.module] += 1

    def _leave(self, slot: Slot) -> None:
        block = self._there.pop(slot, None)
        if block is not None:
            block.slot = None
            block.hold(self._link.waiting(block.kept))
            self._link.leave(slot)

    # ---------------------------------------------------------------- devices

    def mover(self, module: nn.Module) -> Callable[..., nn.Module]:
        """What stands for a block's `_apply`, which `to` comes to."""

        def _apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            del recurse
            device = function(torch.zeros(0, device=self._device)).device
            if device != self._device:
                self.rest()
                self._settle_on(device)
            away = set(self._blocks[module].weights)
            for tensor in (t for t in (*module.parameters(), *module.buffers()) if t not in away):
                tensor.data = function(tensor.data)
                if tensor.grad is not None:
                    tensor.grad.data = function(tensor.grad.data)
            return module

        return _apply

    @torch.inference_mode(mode=False)
    def _settle_on(self, device: torch.device) -> None:
        self._device, self._link = device, link_to(device)
        for block in self._blocks.values():  # one after the other, so that no more than one is there twice
            block.kept = self._link.keep(block.kept)
            block.hold(self._link.waiting(block.kept))


def frozen(module: nn.Module) -> Iterator[Tensor]:
    """A module's weights that nobody trains, and its buffers."""
    yield from (parameter for parameter in module.parameters() if not parameter.requires_grad)
    yield from module.buffers()
