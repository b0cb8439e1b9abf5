"""How often blocks come, what they take of the device's memory, and which numbers of blocks are refused."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory import streaming
from mpp.memory.counting import Meter, bytes_of
from mpp.memory.link import layout_bytes
from mpp.memory.settings import Memory
from mpp.memory.streaming import Layout, Streaming
from mpp.models.streamed import check_resident
from mpp.training.costs import Costing
from mpp.training.measuring import Run
from mpp.training.module import MaskedPriorModule
from mpp.training.step import Position
from mpp.training.teacher import Teacher
from tests import helpers
from tests.families import base, variants
from tests.memory.deeper import deeper
from tests.memory.poison import Poison, Visible
from tests.memory.streamed import PRIOR, RESIDENT, adapted, step_of, streaming_of

NAMED = {variant.name: variant for variant in variants()}


# ---------------------------------------------------------------- how often blocks come


def visits(count, passes):
    """Which block runs, and whether backward, in a step with so many forward passes before the backward pass."""
    return [(n, False) for _ in range(passes) for n in range(count)] + [(n, True) for n in reversed(range(count))]


class Desk:
    """A plain account of it: who stays stays; of the two others that are there, the one used longest ago goes."""

    def __init__(self, stays):
        self.stays, self.loads = stays, Counter()
        self.stayed, self.two = set(), []  # of the two, the one used last is last

    def there(self, number):
        return number in self.stayed or number in self.two

    def load(self, number, running=None):
        self.loads[number] += 1
        if self.stays[number]:
            self.stayed.add(number)
            return
        if len(self.two) == 2:
            self.two.remove(next(n for n in self.two if n != running))
        self.two.insert(0, number)

    def visit(self, number, backward):
        if not self.there(number):
            self.load(number)
        if number in self.two:
            self.two.append(self.two.pop(self.two.index(number)))
        step = -1 if backward else 1
        coming = number + step
        while coming in self.stayed:
            coming += step
        if 0 <= coming < len(self.stays) and not self.there(coming):
            self.load(coming, number)


class Block(nn.Module):
    """Something frozen and something trained."""

    def __init__(self, number):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((3 + number,), 1.0 + number), requires_grad=False)
        self.trained = nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.full((2,), 0.5))

    def forward(self, x):
        return x * self.trained * self.frozen.mean() * self.table.sum()


def run(blocks, passes):
    """Forward passes, the last of which has a backward pass that computes blocks again."""
    with torch.no_grad():
        for _ in range(passes - 1):
            x = torch.ones(2)
            for block in blocks:
                x = block(x)
    x = torch.ones(2, requires_grad=True)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    x.sum().backward()
    return x.detach()


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))])
def test_blocks_come_as_often_as_two_that_pass_and_those_that_stay_say(seed, monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    draw = random.Random(seed)
    count = draw.randint(2, 12)
    resident, steps = draw.randint(2, count), [draw.choice((1, 2)) for _ in range(4)]
    plain, blocks = ([Block(number) for number in range(count)] for _ in range(2))
    moved = Streaming([blocks], resident)
    desk = Desk([block.home is not None for block in moved._blocks.values()])
    for passes in steps:
        assert torch.equal(run(blocks, passes), run(plain, passes))
        for number, backward in visits(count, passes):
            desk.visit(number, backward)
        assert [moved.loads[block] for block in blocks] == [desk.loads[number] for number in range(count)]
    assert [block.trained.grad for block in blocks] == [block.trained.grad for block in plain]
    for number in range(count):
        assert not desk.stays[number] or moved.loads[blocks[number]] == 1
    assert sum(desk.stays) == (count if resident == count else resident - 2)


@pytest.mark.parametrize(
    ("teacher", "least", "ends"),
    [("apart", 3, 2), ("lockstep", 2, 1), pytest.param(None, 2, 1, marks=pytest.mark.slow)],
)
def test_in_a_step_each_comes_as_often_as_passes_go_by_but_for_those_at_the_turns(
    teacher, least, ends, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    arch = deeper(NAMED["WAN 2.1 T2V"], built(NAMED["WAN 2.1 T2V"]), tmp_path / "deep", 3, (6, 6))
    module, memory = adapted(arch, Memory("bf16", "checkpoint", 2)), Memory("bf16", "checkpoint", 2, teacher or "apart")
    loss, data = PRIOR if teacher else MaskedPriorLoss(), helpers.batch(helpers.four_masks()[:2])
    step, loads = step_of(module, loss, memory), streaming_of(module).loads
    for number in range(3):
        before = Counter(loads)
        loss.terms(step(data, Position(0, number)).sums).total.backward()
    found = [loads[block] - before[block] for _, block in arch.blocks(module.transformer)]
    assert found == [ends, ends, least, least, ends, ends]
    before = Counter(loads)
    for _ in step.measure(data, 0, [0.5]):
        pass
    forward = 2 if teacher != "lockstep" else 1
    assert sum(loads[block] - before[block] for block in loads) == forward * 6 - 2


# ---------------------------------------------------------------- what they take


@pytest.mark.parametrize("seed", range(40))
def test_those_that_stay_are_evenly_spread_and_all_slots_are_counted(seed):
    draw = random.Random(seed)
    groups = [[draw.randint(1, 99) for _ in range(draw.randint(1, 30))] for _ in range(draw.choice((1, 1, 2)))]
    resident = draw.choice([None, draw.randint(2, 32)])
    layout = Layout.of(groups, resident)
    others, homes = [], []
    for sizes, stays in zip(groups, layout.stays, strict=True):
        whole = resident is None or resident >= len(sizes)
        assert sum(stays) == (len(sizes) if whole else resident - 2)
        at = [-1, *(number for number, stay in enumerate(stays) if stay), len(stays)]
        gaps = [after - before for before, after in pairwise(at)]
        inner = gaps[1:-1]
        assert max(inner, default=0) - min(inner, default=0) <= 1
        assert max(gaps) <= len(sizes) / (sum(stays) or 1) + 1
        homes.append([size for size, stay in zip(sizes, stays, strict=True) if stay])
        others += [size for size, stay in zip(sizes, stays, strict=True) if not stay]
    longest = max(len(held) for held in homes)
    wanted = sum(max(held[number] for held in homes if number < len(held)) for number in range(longest))
    assert layout.device_bytes == wanted + 2 * max(others, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["lockstep", "apart"])
def test_what_is_on_the_device_is_never_more_than_was_counted(teacher, built, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Visible())
    draw = random.Random(teacher)
    variant = NAMED["WAN 2.1 T2V"]
    arch = deeper(variant, built(variant), tmp_path / "deep", draw.randint(0, 99), (6, 6))
    resident, shape = draw.randint(2, 5), (16, 2, 8, 12)
    module = adapted(arch, Memory("bf16", "checkpoint", resident, teacher))
    moved = streaming_of(module)
    masks = torch.ones(2, 1, *shape[1:])
    masks[..., 6:] = 0
    data, meter, most = helpers.batch(masks), Meter(), []
    meter.known([*module.parameters(), *module.transformer.buffers(), data.conditioning.text])
    slots = {*moved._passing, *(block.home for block in moved._blocks.values() if block.home)}
    in_all = lambda *_: most.append(bytes_of(slot.memory for slot in slots if slot.memory is not None))  # noqa: E731
    for block in moved._blocks:
        block.register_forward_hook(in_all)
    with meter:
        module.loss.terms(module.step(data, Position(0, 0)).sums).total.backward()
    sizes = [layout_bytes(block.kept) for block in moved._blocks.values()]
    counted = Layout.of([sizes], resident).device_bytes
    assert max(most) == counted < sum(sizes)
    run = Run(
        arch,
        Adapter(rank=4, alpha=4),
        Memory("bf16", "checkpoint", "all", teacher),
        PRIOR,
        torch.optim.AdamW,
        "32-true",
    )
    costs = Costing(run).count(shape, 2, type(data.conditioning)(data.conditioning.text[0]))
    assert bytes_of([data.latents]) + max(meter.peaks.values()) == pytest.approx(costs.step + counted, rel=0.05)


def test_resting_gives_all_memory_back_and_moving_takes_what_is_trained(monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    blocks = nn.ModuleList(Block(number) for number in range(5))
    moved, wanted = Streaming([list(blocks)], 3), run([Block(number) for number in range(5)], 1)
    run(blocks, 1)
    gradients = [block.trained.grad.clone() for block in blocks]
    slots = {*moved._passing, *(block.home for block in moved._blocks.values() if block.home)}
    assert all(slot.memory is not None for slot in slots)
    moved.rest()
    assert all(slot.memory is None for slot in slots)
    assert all(torch.isnan(block.frozen).all() for block in blocks)
    assert torch.equal(run(blocks, 1), wanted)
    assert [block.trained.grad for block in blocks] == [2 * gradient for gradient in gradients]
    blocks.double()
    assert {tensor.dtype for block in blocks for tensor in (block.trained, block.trained.grad)} == {torch.float64}
    assert {tensor.dtype for block in blocks for tensor in (block.frozen, block.table)} == {torch.float32}


def test_a_weight_that_several_blocks_share_stays_with_what_is_trained(monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    blocks = nn.ModuleList(Block(0) for _ in range(4))
    for block in blocks[1:]:
        block.frozen, block.table = blocks[0].frozen, blocks[0].table
        block.own = nn.Parameter(torch.ones(2), requires_grad=False)
    Streaming([list(blocks)], 2)
    assert torch.equal(run(blocks, 2), torch.ones(2))
    blocks.double()
    assert {tensor.dtype for b in blocks for tensor in (b.trained, b.frozen, b.table)} == {torch.float64}
    assert {block.own.dtype for block in blocks[1:]} == {torch.float32}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("resident", [1, 0, -3, "some", 2.0, True])
def test_a_number_of_blocks_that_is_none_is_refused(resident):
    said = helpers.unchecked_error(Memory, resident=resident)
    assert said == (
        "ValueError: memory.resident must be all, auto or a number of blocks, at least 2 (one that runs and one that "
        f"comes), got {resident!r}"
    )


def test_what_does_not_go_together_is_refused_and_says_what_does(architecture, built):
    said = helpers.unchecked_error(Memory, activations="keep", resident=4)
    assert said.startswith("ValueError: memory.resident=4 needs memory.activations=checkpoint or offload")
    made = {"adapter": Adapter(), "loss": PRIOR, "optimizer": torch.optim.AdamW}
    both = base.architecture(NAMED["WAN 2.2 A14B T2V both"], built(NAMED["WAN 2.2 A14B T2V both"]))
    with pytest.raises(ValueError, match=r"activations=keep .* set memory\.activations=checkpoint, or model\.offload"):
        MaskedPriorModule(architecture=both, teacher=Teacher(), memory=Memory(activations="keep"), **made)
    lockstep = Memory(teacher="lockstep")
    with pytest.raises(ValueError, match=r"teacher\.eval_mode=true .* set memory\.teacher=apart"):
        MaskedPriorModule(architecture=architecture, teacher=Teacher(eval_mode=True), memory=lockstep, **made)
    quiet = MaskedPriorModule(architecture=architecture, teacher=Teacher(eval_mode=True), memory=Memory(), **made)
    assert quiet.memory.settled.teacher == "apart"
    assert RESIDENT.settled == RESIDENT


def test_more_blocks_than_there_are_are_refused_before_weights_load(pipeline, prepared, tmp_path, monkeypatch):
    architecture = helpers.architecture(pipeline)
    check_resident(architecture, 2)
    check_resident(architecture, "all")
    monkeypatch.setattr(type(architecture), "load_transformer", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=r"memory\.resident=3: .* has 2 blocks .* set a number from 2 to 2, or all"):
        helpers.train(pipeline, prepared, tmp_path / "run", "memory.resident=3")
