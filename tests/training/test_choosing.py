"""What nobody chose of how a run fits is the fastest of all ways that do."""

import random
from dataclasses import replace
from itertools import product

import pytest

from mpp.memory.activations import ACTIVATIONS
from mpp.memory.settings import Memory
from mpp.training.choosing import MARGIN, fastest, nominal_seconds
from mpp.training.costs import Costs, Weights
from mpp.training.planning import ASIDE, Choice, transferred

GIB = 2**30


def drawn(seed):
    """A model and what its steps take, in which each kind of activations takes less memory and more time."""
    draw = random.Random(seed)
    groups = draw.choice([1, 1, 1, 2])
    sizes = tuple(draw.choice([1, 1, 2]) * draw.randrange(GIB // 8, GIB) for _ in range(draw.randint(2, 30)))
    weights = Weights(draw.randrange(3 * GIB), (sizes,) * groups, groups == 2 and draw.random() < 0.7)
    teacher, flops = draw.choice([0, draw.randrange(4 * GIB)]), draw.randrange(10**13, 10**16)
    saved = sorted((draw.randrange(40 * GIB) for _ in range(3)), reverse=True)
    work = draw.randrange(10 * GIB)
    costs = {}
    for kind, left in zip(ACTIVATIONS, saved, strict=True):
        plain = flops * (3 if kind == "keep" else 4)
        moved = saved[1] - saved[2] if kind == "offload" else 0
        prior = flops if teacher else 0
        costs[kind] = Costs(0, GIB // 4, GIB // 2, 0, left, left + work + teacher, teacher, plain, prior, moved)
    return weights, costs, draw


def every_way(weights, costs, wanted):
    """All settings that are possible, one after the other."""
    numbers = ["all", *range(2, weights.count)]
    for kind, resident, teacher in product(ACTIVATIONS, numbers, ("apart", "lockstep")):
        if wanted.activations not in ("auto", kind) or wanted.teacher not in ("auto", teacher):
            continue
        if wanted.resident not in ("auto", resident) or (kind == "keep" and resident != "all"):
            continue
        if kind == "keep" and weights.take_turns and wanted.activations == "auto":
            continue
        memory = replace(wanted, activations=kind, resident=resident, teacher=teacher)
        yield Choice(memory, weights.under(memory, costs[kind]), weights)


@pytest.mark.parametrize("seed", range(60))
def test_no_way_that_fits_is_faster_than_the_chosen_one(seed):
    weights, costs, draw = drawn(seed)
    wanted = Memory(
        activations=draw.choice(["auto", "auto", "checkpoint", "offload"]),
        resident=draw.choice(["auto", "auto", "all", draw.randint(2, weights.count)]),
        teacher=draw.choice(["auto", "auto", "apart", "lockstep"]),
    )
    if wanted.resident == weights.count:
        wanted = replace(wanted, resident="all")
    room, counts = draw.randrange(2 * GIB, 90 * GIB), []

    def counted(memory):
        counts.append(memory)
        return Choice(memory, weights.under(memory, costs[memory.activations]), weights)

    found = fastest(wanted, counted, room)
    ways = list(every_way(weights, costs, wanted))
    fitting = [way for way in ways if way.costs.peak * (1 + MARGIN) + ASIDE * GIB * 1 <= room]
    assert found.fits == bool(fitting)
    assert len(counts) <= 2
    if fitting:
        assert nominal_seconds(found.choice) == min(map(nominal_seconds, fitting))
        assert found.choice.costs.peak * (1 + MARGIN) + ASIDE * GIB <= room
    else:
        assert found.choice.costs.peak <= min(way.costs.peak for way in ways if way.memory.activations != "keep")
    assert found.choice.memory.base == wanted.base
    for name in ("activations", "resident", "teacher"):
        assert getattr(wanted, name) in ("auto", getattr(found.choice.memory, name))


def test_what_a_step_moves_is_three_passes_apart_and_two_in_lockstep_and_without_the_prior():
    costs = Costs(0, 0, 0, 0, 0, 0, 1, 1, 1, moved=5, streamed=100)
    apart, lockstep = (Memory(teacher=teacher).settled for teacher in ("apart", "lockstep"))
    assert transferred(costs, apart, prior=True) == 310
    assert transferred(costs, lockstep, prior=True) == transferred(costs, apart, prior=False) == 210


@pytest.mark.parametrize("seed", range(20))
def test_bytes_on_the_device_are_those_of_the_blocks_that_are_there(seed):
    weights, costs, draw = drawn(seed)
    number = draw.randint(2, weights.count)
    memory = Memory(activations="checkpoint", resident=number).settled
    found, sizes = weights.under(memory, costs["checkpoint"]), weights.blocks[0]
    there = found.base - weights.outside
    assert there <= sum(sorted(sizes, reverse=True)[: number - 2]) + 2 * max(sizes)
    assert found.streamed + there >= sum(sizes)
    assert found.waiting == sum(map(sum, weights.blocks))
    turns = Memory(activations="checkpoint", resident="all").settled
    whole = weights.under(turns, costs["checkpoint"]).base - weights.outside
    assert whole == (sum(sizes) if weights.take_turns else sum(map(sum, weights.blocks)))
