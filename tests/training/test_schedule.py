"""The learning rate's course, by its formula written out."""

import logging
import math
import random
from functools import partial

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from lightning import Callback
from safetensors.torch import load_file

import mpp.train
from mpp.training.schedule import schedule_for
from tests.helpers import train, train_config
from tests.test_train import Killed, kill_after

SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in range(2, 14)]


class Rates(Callback):
    """The rate of each optimizer step."""

    found: list[float]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        Rates.found.append(optimizer.param_groups[0]["lr"])


def drawn(number):
    """Settings of a run whose end is drawn in epochs, steps or both; eight samples in two shapes."""
    draw = random.Random(number)
    words = [f"data.batch_size={draw.choice([1, 2])}", f"trainer.accumulate_grad_batches={draw.choice([1, 2, 3])}"]
    words += [f"trainer.limit_train_batches={draw.choice([0.5, 3, 1.0])}"]
    epochs, steps = draw.choice([(draw.randint(1, 3), -1), (3, draw.randint(2, 5)), (-1, draw.randint(2, 7))])
    words += [f"trainer.max_epochs={epochs}", f"trainer.max_steps={steps}"]
    warmup = draw.choice([0, 1, draw.randint(2, 9), 0.0, round(draw.uniform(0.05, 0.9), 2)])
    return warmup, ["schedule=cosine", f"schedule.num_warmup_steps={warmup}", "validate_first=false", *words]


def cosine(step, warmup, length):
    """Share of the rate at an optimizer step, counted from 0."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (length - warmup))) / 2


@pytest.mark.parametrize("number", [0, 1, *SLOW])
def test_a_cosine_falls_from_the_warm_up_to_the_runs_own_end(pipeline, prepared, tmp_path, number):
    Rates.found = []
    warmup, words = drawn(number)
    trainer, module = train(
        pipeline, prepared, tmp_path, *words, f"+callbacks.rates={{_target_: {__name__}.Rates}}", "optimizer.lr=0.5"
    )
    length = len(Rates.found)
    assert module.planned_steps == length == trainer.global_step == trainer.estimated_stepping_batches
    first = round(warmup * length) if isinstance(warmup, float) else warmup
    wanted = [0.5 * cosine(step, first, length) for step in range(length)]
    assert Rates.found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [2, 4, 6, 8, 11])
def test_a_run_of_epochs_under_a_schedule_resumes_bit_for_bit(pipeline, prepared, tmp_path, monkeypatch, killed):
    words = ["schedule=cosine", "schedule.num_warmup_steps=0.2", "trainer.max_steps=-1", "trainer.max_epochs=3"]
    words += ["callbacks.checkpoints.every_n_steps=1", "validate_first=false"]
    train(pipeline, prepared, tmp_path / "straight", *words)
    with monkeypatch.context() as patch:
        kill_after(patch, killed)
        with pytest.raises(Killed):
            train(pipeline, prepared, tmp_path / "killed", *words)
    train(pipeline, prepared, tmp_path / "killed", *words, "logger=tensorboard", "ckpt_path=last")
    one, other = (load_file(tmp_path / run / "lora.safetensors") for run in ("straight", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_warm_up_that_the_run_does_not_outlast_is_said_with_where_it_ends(pipeline, prepared, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="mpp")
    train(pipeline, prepared, tmp_path, "schedule=warmup", "schedule.num_warmup_steps=10", "trainer.max_steps=2")
    assert "num_warmup_steps=10 is no shorter than the run of 2 steps: " in caplog.text
    assert "and ends at 10% of it; set 0.1" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.num_training_steps=3"], r"num_training_steps=3 is less than the run's 4 steps: .*leave it out"),
        (["schedule.num_warmup_steps=-1"], r"num_warmup_steps must be a whole number .*got -1"),
        (["schedule.num_warmup_steps=1.5"], r"num_warmup_steps must be a whole number .*got 1.5"),
        (
            ["trainer.max_steps=-1", "trainer.max_time={minutes: 1}"],
            r"this schedule falls until .*set trainer.max_steps or trainer.max_epochs with it",
        ),
        (
            ["schedule=warmup", "schedule.num_warmup_steps=0.1", "trainer.max_steps=-1", "trainer.max_time={hours: 1}"],
            r"num_warmup_steps=0.1 is a share of the run",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_before_it_is_there(
    pipeline, prepared, tmp_path, words, message
):
    with pytest.raises(ValueError, match=message):
        mpp.train.run(train_config(pipeline, prepared, tmp_path / "out", "schedule=cosine", *words))
    assert not (tmp_path / "out").exists()


def test_other_schedules_and_a_longer_end_are_left_as_they_are():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule_for(partial(torch.optim.lr_scheduler.StepLR, step_size=3), 5)(optimizer)
    longer = schedule_for(partial(get_cosine_schedule_with_warmup, num_warmup_steps=0, num_training_steps=8), 4)
    made = longer(optimizer)
    for _ in range(4):
        optimizer.step()
        made.step()
    assert made.get_last_lr() == pytest.approx([0.5])
