"""Learning rates of the matrices B, and of a run that goes on, against formulas in plain Python."""

import math
import random
from functools import partial

import pytest
import torch
from diffusers import optimization
from torch import nn

from mpp.lora.adapters import Adapter
from mpp.training.rates import check_ratio, effective_rates, optimizer_of, renew_rates
from tests.helpers import logged, module, train


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


# ---------------------------------------------------------------- the matrices B


def descended(steps, weights, rates, decay):
    """Plain gradient descent by the gradients of each step, in float64; the rate of B is another."""
    found = {name: tensor.double().clone() for name, tensor in weights.items()}
    for gradients in steps:
        for name, tensor in found.items():
            rate = rates["lora_B" in name]
            tensor.sub_(rate * (gradients[name].double() + decay * tensor))
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 3))])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_b_alone_learns_at_the_ratio_with_everything_else_alike(architecture, seed, kind):
    draw, random_ = random.Random(seed), torch.Generator().manual_seed(seed)
    rate, ratio, decay = draw.uniform(0.01, 0.1), draw.choice([0.25, 4, 16]), draw.uniform(0, 0.5)
    built = module(
        architecture,
        adapter=Adapter(kind=kind, rank=2, b_lr_ratio=ratio),
        optimizer=partial(torch.optim.SGD, lr=rate, weight_decay=decay),
    )
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    drawn = [{n: torch.randn(p.shape, generator=random_) for n, p in trained.items()} for _ in range(3)]
    optimizer = built.configure_optimizers()
    for gradients in drawn:
        for name, parameter in trained.items():
            parameter.grad = gradients[name]
        optimizer.step()
    wanted = descended(drawn, before, {False: rate, True: rate * ratio}, decay)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_ratio_there_is_one_group_as_ever(architecture):
    built = module(architecture, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    wanted = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=1e-3)
    assert built.configure_optimizers().state_dict() == wanted.state_dict()


@pytest.mark.parametrize("seed", range(10))
def test_renewed_rates_keep_the_ratio(seed):
    draw = random.Random(seed)
    kind, ratio, rate, done = draw.choice(["constant", "warmup", "cosine"]), draw.choice([0.5, 16]), 2e-3, 7
    make, schedule = partial(torch.optim.AdamW, lr=rate), schedule_of(kind, 5, 30)
    named = [(f"x.lora_{which}.default.weight", nn.Parameter(torch.ones(2))) for which in "AB"]
    old = optimizer_of(partial(torch.optim.AdamW, lr=1e-4), named, ratio)
    checkpoint = {"optimizer_states": [old.state_dict()], "lr_schedulers": []}
    first = renew_rates(checkpoint, make, schedule, done, ratio)
    new = optimizer_of(make, named, ratio)
    made = schedule(new) if schedule else None
    new.load_state_dict(checkpoint["optimizer_states"][0])
    if made:
        made.load_state_dict(checkpoint["lr_schedulers"][0])
    for step in range(done, 30):
        wanted = rate * factor(kind, step, 5, 30)
        found = [group["lr"] for group in new.param_groups]
        assert found == pytest.approx([wanted, ratio * wanted], rel=1e-9, abs=1e-15)
        assert step > done or first == pytest.approx(wanted, rel=1e-9)
        new.step()
        if made:
            made.step()


def test_an_optimizer_or_schedule_that_would_lose_the_ratio_is_refused():
    import prodigyopt
    import schedulefree

    with pytest.raises(ValueError, match=r"lora.b_lr_ratio=4 .* Prodigy finds one of its own"):
        check_ratio(prodigyopt.Prodigy, None, 4)
    check_ratio(prodigyopt.Prodigy, None, 1)
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30)
    with pytest.raises(ValueError, match="this schedule sets the rates 0.004 and 0.004 instead"):
        check_ratio(torch.optim.AdamW, cycle, 4)
    for made in (torch.optim.AdamW, schedulefree.AdamWScheduleFree):
        for kind in ("constant", "warmup", "cosine"):
            check_ratio(made, schedule_of(kind, 5, 30), 4)


@pytest.mark.slow
def test_the_log_says_both_rates(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "lora.b_lr_ratio=16", "optimizer.lr=1e-3")
    rows = [row for row in logged(tmp_path) if "train/lr" in row]
    assert rows
    assert all((row["train/lr"], row["train/lr_b"]) == pytest.approx((1e-3, 16e-3)) for row in rows)


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_the_rate_in_effect_has_the_optimizers_own_estimate_in_it(lr):
    prodigyopt, schedulefree = pytest.importorskip("prodigyopt"), pytest.importorskip("schedulefree")
    weight = nn.Parameter(torch.ones(3))
    prodigy = prodigyopt.Prodigy([weight], lr=lr)
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), 0.5)
        prodigy.step()
    (group,) = prodigy.param_groups
    assert effective_rates([prodigy]) == {"train/lr": pytest.approx(group["d"] * lr)}
    moved = float((before - weight.detach()).abs().max())  # by Adam's update, which is about 1 to 6 without weights
    assert 1 < moved / effective_rates([prodigy])["train/lr"] < 8
    free = schedulefree.AdamWScheduleFree([weight], lr=lr, warmup_steps=10)
    free.train()
    assert effective_rates([free]) == {"train/lr": lr}
    weight.grad = torch.ones(3)
    free.step()
    assert effective_rates([free])["train/lr"] == pytest.approx(lr / 10)
