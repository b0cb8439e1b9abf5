"""Learning rates of a run that goes on, against formulas in plain Python."""

import math
import random
from functools import partial

import pytest
import torch
from diffusers import optimization
from torch import nn

from mpp.training.rates import renew_rates


def factor(kind, step, warmup, length):
    """What each schedule multiplies the rate by before the step of that number, counted from 0."""
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    return 1.0 if kind == "warmup" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (length - warmup)))


def schedule_of(kind, warmup, length):
    if kind == "constant":
        return None
    if kind == "warmup":
        return partial(optimization.get_constant_schedule_with_warmup, num_warmup_steps=warmup)
    return partial(optimization.get_cosine_schedule_with_warmup, num_warmup_steps=warmup, num_training_steps=length)


def start(make_optimizer, make_schedule):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter])
    return parameter, optimizer, make_schedule(optimizer) if make_schedule else None


def steps(count, parameter, optimizer, schedule):
    """Take steps and return the rate of each."""
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(3)
        optimizer.step()
        if schedule:
            schedule.step()
    return rates


@pytest.mark.parametrize("seed", range(40))
def test_renewed_rates_are_those_of_a_run_that_began_so(seed):
    draw = random.Random(seed)
    was, now = draw.choices(["constant", "warmup", "cosine"], k=2)
    lengths = draw.randint(5, 60), draw.randint(60, 120)
    warmups = draw.randint(1, 4), draw.randint(1, 80)
    rates = draw.uniform(1e-5, 1e-2), draw.uniform(1e-5, 1e-2)
    done = draw.randint(1, lengths[0])
    old = start(partial(torch.optim.AdamW, lr=rates[0]), schedule_of(was, warmups[0], lengths[0]))
    steps(done, *old)
    checkpoint = {
        "optimizer_states": [old[1].state_dict()],
        "lr_schedulers": [old[2].state_dict()] if old[2] else [],
    }
    make_optimizer, make_schedule = partial(torch.optim.AdamW, lr=rates[1]), schedule_of(now, warmups[1], lengths[1])
    first = renew_rates(checkpoint, make_optimizer, make_schedule, done)
    parameter, optimizer, schedule = start(make_optimizer, make_schedule)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    if schedule:
        schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    assert (now == "constant") == (checkpoint["lr_schedulers"] == [])
    found = steps(lengths[1] - done, parameter, optimizer, schedule)
    wanted = [rates[1] * factor(now, n, warmups[1], lengths[1]) for n in range(done, lengths[1])]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert first == pytest.approx(wanted[0] if wanted else 0, rel=1e-9, abs=1e-15)


def test_schedules_that_move_other_settings_go_on_too():
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30)
    straight = start(partial(torch.optim.AdamW, lr=1e-3), one_cycle)
    wanted = steps(30 - 1, *straight)
    old = start(partial(torch.optim.AdamW, lr=1e-3), None)
    steps(12, *old)
    checkpoint = {"optimizer_states": [old[1].state_dict()], "lr_schedulers": []}
    renew_rates(checkpoint, partial(torch.optim.AdamW, lr=1e-3), one_cycle, 12)
    new = start(partial(torch.optim.AdamW, lr=1e-3), one_cycle)
    new[1].load_state_dict(checkpoint["optimizer_states"][0])
    new[2].load_state_dict(checkpoint["lr_schedulers"][0])
    assert steps(17, *new) == pytest.approx(wanted[12:], rel=1e-9)
