"""Teacher and student block by block: in which order, and what is left when something goes wrong."""

import random
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from mpp.lora.adapters import Adapter, adapter_layers
from mpp.memory import streaming
from mpp.memory.counting import Meter, weightless, without_numbers
from mpp.training.costs import Costing
from mpp.training.lockstep import Lockstep
from mpp.training.measuring import Run, measured
from mpp.training.step import Position
from tests.families import variants
from tests.memory.deeper import deeper
from tests.memory.poison import Poison
from tests.memory.streamed import PRIOR, RESIDENT, adapted, data_of, learned, partly, same, step_of

WAN = next(variant for variant in variants() if variant.name == "WAN 2.1 T2V")
LOCKSTEP = replace(RESIDENT, teacher="lockstep")


@pytest.fixture(scope="module")
def deep(built, tmp_path_factory):
    """A WAN of four blocks, and a batch."""
    arch = deeper(WAN, built(WAN), tmp_path_factory.mktemp("lockstep") / "deep", 7, (4, 4))
    return arch, data_of(arch, WAN, 5, ("a red box", "a box by the sea", "a cat"))


def events_of(built, run):
    """What ends in which order: (block's number, who)."""
    events, hooks = [], []
    for number, (_, block) in enumerate(built.architecture.blocks(built.transformer)):

        def ran(*_, number=number, forward):
            if forward == (torch._C._current_graph_task_id() == -1):
                events.append(
                    (number, ("student" if torch.is_grad_enabled() else "teacher") if forward else "backward")
                )

        hooks.append(block.register_forward_hook(partial(ran, forward=True)))
        hooks.append(block.register_forward_pre_hook(partial(ran, forward=False)))  # whose end nothing waits for
    run()
    for hook in hooks:
        hook.remove()
    return events


# ---------------------------------------------------------------- the order


def test_the_teacher_runs_each_block_just_before_the_student_and_ends_before_the_loss(deep, monkeypatch):
    arch, data = deep
    built, draw = adapted(arch), random.Random(3)
    before, told = threading.active_count(), []
    weigh = type(PRIOR).sums
    monkeypatch.setattr(type(PRIOR), "sums", lambda *args: told.append(threading.active_count()) or weigh(*args))
    for rows in (range(3), draw.sample(range(3), 2), [draw.randrange(3)]):
        batch = partly(data, rows)
        events = events_of(built, lambda batch=batch: learned(built, batch, PRIOR, LOCKSTEP))
        both = [(number, who) for number in range(4) for who in ("teacher", "student")]
        assert events == both + [(number, "backward") for number in reversed(range(4))]
    events = events_of(built, lambda: learned(built, partly(data, []), PRIOR, LOCKSTEP))
    assert [who for _, who in events] == ["student"] * 4 + ["backward"] * 4
    assert told == [before] * 4


def test_apart_the_whole_teacher_runs_first(deep):
    arch, data = deep
    built = adapted(arch)
    events = events_of(built, lambda: learned(built, data, PRIOR, RESIDENT))
    assert [who for _, who in events] == ["teacher"] * 4 + ["student"] * 4 + ["backward"] * 4


@pytest.mark.slow
def test_samples_that_go_through_one_after_another_meet_block_by_block_too(built, tmp_path):
    variant = next(variant for variant in variants() if variant.name.startswith("Kandinsky"))
    arch = deeper(variant, built(variant), tmp_path / "deep", 1)
    data = data_of(arch, variant, 2, ("a box", "a red box by the sea"))  # of several lengths, so apart
    ours, count = adapted(arch), len(list(arch.blocks(arch.skeleton())))
    for rows in ([0, 1], [0], [1]):
        events = events_of(ours, lambda rows=rows: learned(ours, partly(data, rows), PRIOR, LOCKSTEP))
        forward = [(number, who) for number, who in events if who != "backward"]
        assert [number for number, who in forward if who == "student"] == 2 * list(range(count))
        taught = [at for at, (_, who) in enumerate(forward) if who == "teacher"]
        assert len(taught) == count * len(rows)
        assert all(forward[at + 1] == (forward[at][0], "student") for at in taught)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("seed", range(3))
def test_adapters_outside_of_blocks_are_off_for_the_teacher_alone(deep, seed):
    arch, data = deep
    draw = random.Random(seed)
    outside = draw.sample(["text_embedder.linear_1", "time_proj", "time_embedder.linear_2", "proj_out"], 2)
    adapter = Adapter(rank=2, alpha=2, targets=["to_q", *outside])
    built, batch = adapted(arch, adapter=adapter), partly(data, draw.sample(range(3), draw.randint(1, 3)))
    wanted, found = (learned(built, batch, PRIOR, memory, low=seed > 0) for memory in (RESIDENT, LOCKSTEP))
    assert all(any(name in key and value.any() for key, value in wanted.items()) for name in outside)
    same(found, wanted)


def test_a_layer_that_is_off_on_purpose_stays_so(deep):
    arch, data = deep
    built, draw = adapted(arch), random.Random(11)
    layers = list(adapter_layers(built.transformer))
    off = set(draw.sample(layers, 5))
    for layer in off:
        layer._disable_adapters = True
    wanted, found = (learned(built, data, PRIOR, memory) for memory in (RESIDENT, LOCKSTEP))
    same(found, wanted)
    assert {layer for layer in layers if layer.disable_adapters} == off
    assert all(p.grad is None for layer in off for p in layer.parameters() if p.requires_grad)


# ---------------------------------------------------------------- what goes wrong


class Broken(BaseException):
    """Nobody expects it."""


def left(built):
    """Threads, hooks, and flags of adapters."""
    hooks = [hook for block in built.transformer.modules() for hook in block._forward_pre_hooks.values()]
    met = [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Lockstep)]
    return threading.active_count(), len(met), [layer.disable_adapters for layer in adapter_layers(built.transformer)]


def raising(error):
    """What raises it."""

    def fail():
        raise error

    return fail


def ctrl_c():
    """As a terminal has it: the main thread is woken, wherever it waits."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.02)


def late_ctrl_c():
    """The main thread sees it when it goes on by itself."""
    signal.raise_signal(signal.SIGINT)


WAYS = [raising(RuntimeError("block")), raising(KeyboardInterrupt()), raising(Broken()), ctrl_c, late_ctrl_c]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_whatever_is_raised_wherever_nothing_is_left_and_the_next_step_is_right(deep, seed, monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    arch, data = deep
    draw = random.Random(seed)
    built = adapted(arch, replace(LOCKSTEP, resident=draw.choice((2, 3))))
    next(adapter_layers(built.transformer))._disable_adapters = True
    start, wanted = left(built), learned(built, data, PRIOR, LOCKSTEP)
    for fail in WAYS:
        whose, (_, block) = draw.random() < 0.5, draw.choice(list(arch.blocks(built.transformer)))
        inner = draw.choice(list(block.modules()) if draw.random() < 0.5 else [block])
        batch = partly(data, draw.sample(range(3), draw.randint(1, 3)))
        seen = []

        def hook(*_, whose=whose, fail=fail, seen=seen):
            if torch.is_grad_enabled() == whose and torch._C._current_graph_task_id() == -1:
                seen.append(whose)
                fail()

        handle = (inner.register_forward_pre_hook if draw.random() < 0.5 else inner.register_forward_hook)(hook)
        with pytest.raises((RuntimeError, KeyboardInterrupt, Broken)):
            step_of(built, PRIOR, LOCKSTEP)(batch, Position(0, 0))
            if not seen:
                raise Broken  # a module that no pass comes to
        handle.remove()
        assert left(built) == start
        same(learned(built, data, PRIOR, LOCKSTEP), wanted)


# ---------------------------------------------------------------- with what else runs a step


@pytest.mark.slow
@pytest.mark.draws  # compiles for a minute
@pytest.mark.filterwarnings("ignore")  # the compiler raises warnings of its own while tracing
def test_compiled_blocks_go_in_lockstep(deep, monkeypatch):
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())
    arch, data = deep
    torch.compiler.reset()
    built = adapted(arch, replace(LOCKSTEP, resident=2), compile_blocks=True)
    wanted, found = (learned(built, data, PRIOR, memory) for memory in (RESIDENT, LOCKSTEP))
    same(found, wanted)  # and no number among them is none, as it would be without the weights
    events = events_of(built, lambda: learned(built, data, PRIOR, LOCKSTEP))
    assert [who for _, who in events[:8]] == ["teacher", "student"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.draws), "bf16-mixed"])
def test_without_numbers_a_step_takes_the_same_flops_and_no_more_than_is_planned(deep, precision):
    arch, _ = deep
    apart, lockstep = (
        Run(arch, Adapter(rank=4, alpha=4), replace(RESIDENT, teacher=teacher), PRIOR, torch.optim.AdamW, precision)
        for teacher in ("apart", "lockstep")
    )
    shape, planned, found = (16, 2, 8, 12), Costing(lockstep).count((16, 2, 8, 12), 2), []
    for run in (apart, lockstep):
        transformer = Costing(run, whole=True)._adapted(arch.skeleton().requires_grad_(False))
        samples = arch.collate([arch.blank(transformer.config, shape)] * 2)
        with without_numbers():
            found.append(measured(run, weightless(transformer), Meter(), samples, shape))
    assert all(one["teacher"] == planned.prior > 0 and one["student"] == planned.plain for one in found)
    during = [
        max(bytes for name, bytes in one.items() if isinstance(name, tuple) and name[0] == "teacher") for one in found
    ]
    assert during[0] < during[1] <= planned.saved + planned.teacher  # what the student has left so far is there too
    assert max(bytes for name, bytes in found[1].items() if isinstance(name, tuple)) <= planned.step
