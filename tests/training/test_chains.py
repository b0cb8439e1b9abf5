"""Runs that are stopped and resumed many times end as those that never stopped, to the bit."""

import os
import random
import shutil
import signal
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load, load_file

from mpp.core import draws
from mpp.lora.export import export_path
from mpp.lora.writing import step_of_lora
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import logged, train
from tests.memory.poison import Poison

HERE = "tests.training.test_chains.SignalAt"
OPTIMIZERS = {
    "adamw": [],
    "schedulefree": ["optimizer=schedulefree", "optimizer.lr=1e-2"],
    "prodigy": ["optimizer=prodigy", "optimizer.lr=1.0"],
}


class SignalAt(Callback):
    """A signal of the system to this process, in the midst of a step, counted from 1."""

    def __init__(self, step, number=15):
        self.step, self.number, self.sent = step, number, False

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step - 1 and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def stopped(step, *settings):
    return [f"+callbacks.stop._target_={HERE}", f"+callbacks.stop.step={step}", *settings]


def chain(pipeline, cache, out, settings, stops, of_part=lambda _: []):
    """One run, stopped at each of some steps; a part may have settings of its own."""
    for part, step in enumerate(stops):
        with pytest.raises(SystemExit) as ended:
            train(pipeline, cache, out, *settings, *of_part(part), *again(part), *stopped(step))
        assert ended.value.code == 128 + signal.SIGTERM
        assert step_of_lora(out / "lora.safetensors") == step
    return train(pipeline, cache, out, *settings, *of_part(len(stops)), *again(len(stops)))


def again(part):
    return [f"logger.csv.version=csv/part{part}", *(["ckpt_path=last"] if part else [])]


def assert_equal_runs(straight, parts):
    ends = [read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (straight, parts)]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
    assert ends[0]["optimizer_states"][0]["param_groups"] == ends[1]["optimizer_states"][0]["param_groups"]
    assert ends[0]["mpp"]["samples_seen"] == ends[1]["mpp"]["samples_seen"]
    places = [end["loops"]["fit_loop"] for end in ends]
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        assert places[0][name] == places[1][name]
    assert places[0]["state_dict"]["combined_loader"] == places[1]["state_dict"]["combined_loader"]
    averages = [end["callbacks"].get("AdapterEma", {"updates": None, "average": {}}) for end in ends]
    assert averages[0]["updates"] == averages[1]["updates"]
    assert averages[0]["average"].keys() == averages[1]["average"].keys()
    for name, tensor in averages[0]["average"].items():
        assert torch.equal(tensor, averages[1]["average"][name]), name
    for file in straight.glob("*.safetensors"):
        one, two = load_file(file), load_file(parts / file.name)
        assert all(torch.equal(one[name], two[name]) for name in one)


def values(folder, name):
    """What was logged under a name, by step; over all parts of a run."""
    rows = [row for path in sorted(folder.glob("csv/*")) for row in logged_in(path)]
    return {row["step"]: row[name] for row in rows if name in row}


def logged_in(folder):
    return logged_of(folder / "metrics.csv")


def logged_of(path):
    names, *lines = [line.split(",") for line in path.read_text().splitlines()]
    return [{n: float(v) for n, v in zip(names, line, strict=True) if v} for line in lines]


def drawn(seed):
    """Settings of a run of 12 to 30 batches in epochs of 4 to 8, and where it is stopped."""
    random_ = random.Random(seed)
    batch, window, name = random_.choice([1, 2, 3]), random_.choice([1, 1, 2, 3]), random_.choice(list(OPTIMIZERS))
    steps = random_.randint(6, 12)
    settings = [
        *OPTIMIZERS[name],
        f"data.batch_size={batch}",
        f"trainer.accumulate_grad_batches={window}",
        f"trainer.max_steps={steps}",
        f"callbacks.checkpoints.every_n_steps={random_.randint(1, steps)}",
        *random_.choice([[], ["data.val_fraction=0.25", f"trainer.val_check_interval={random_.randint(1, 7)}"]]),
        f"data.unmasked_probability={random_.choice([0, 0.5])}",
        f"loss={random_.choice(['threshold', 'continuous'])}",
    ]
    settings += [f"memory.base={random.Random(seed).choice(['bf16', 'fp8', 'int8', 'nf4'])}"]
    return settings, sorted(random_.sample(range(1, steps), random_.randint(1, 4)))


def where_blocks_wait(seed, part):
    random_ = random.Random(f"{seed} {part}")
    return [
        f"memory.resident={random_.choice([2, 3, 'all'])}",
        f"memory.teacher={random_.choice(['apart', 'lockstep'])}",
    ]


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, *range(2, 12)))])
def test_a_chain_of_resumes_at_drawn_steps_is_the_straight_run(deep, prepared, tmp_path, monkeypatch, seed):
    """In each part as many blocks as it draws wait where nothing is a number, in the straight run none."""
    monkeypatch.setattr("mpp.memory.streaming.link_to", lambda _: Poison())
    settings, stops = drawn(seed)
    train(deep, prepared, tmp_path / "straight", *settings)
    chain(deep, prepared, tmp_path / "parts", settings, stops, partial(where_blocks_wait, seed))
    assert_equal_runs(tmp_path / "straight", tmp_path / "parts")
    wanted, found = (values(tmp_path / run, "val/loss") for run in ("straight", "parts"))
    assert wanted == found, "validations that were due at a stop are made up for, with the values that they had"
    wanted, found = (values(tmp_path / run, "train/loss") for run in ("straight", "parts"))
    assert wanted == found


MORE = {
    "loha": ["lora=loha"],
    "average": ["callbacks.ema.decay=0.9", "callbacks.ema.warmup=true"],
    "average of accumulated steps": ["callbacks.ema.decay=0.5", "trainer.accumulate_grad_batches=2"],
    "ranks by pattern": ["lora.rank_pattern={attn1.to_q: 2}", "lora.alpha_pattern={blocks.0.*: 3}"],
    "b learns faster": ["lora.b_lr_ratio=16", "schedule=cosine", "schedule.num_warmup_steps=2"],
    "b learns faster, schedule-free": ["lora.b_lr_ratio=4", *OPTIMIZERS["schedulefree"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_chain_of_resumes_under_other_adapters_is_the_straight_run(pipeline, prepared, tmp_path, name):
    settings = [*MORE[name], "trainer.max_steps=7", "callbacks.checkpoints.every_n_steps=3"]
    train(pipeline, prepared, tmp_path / "straight", *settings)
    chain(pipeline, prepared, tmp_path / "parts", settings, [2, 3, 5])
    assert_equal_runs(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("validates", [False, True])
def test_five_resumes_in_a_row_at_epochs_ends_go_through_one_epoch_each(
    pipeline, prepared, tmp_path, monkeypatch, validates
):
    """Eight samples in two shapes: four batches of two are an epoch."""
    seen, good = [], draws.noise

    def noise(shape, seed, epoch, key):
        seen.append((epoch, key)) if isinstance(epoch, int) else None
        return good(shape, seed, epoch, key)

    monkeypatch.setattr(draws, "noise", noise)
    settings = ["trainer.max_steps=24"]
    settings += ["data.val_fraction=0.1", "trainer.val_check_interval=4"] if validates else []
    train(pipeline, prepared, tmp_path / "straight", *settings)
    straight, seen[:] = list(seen), []
    chain(pipeline, prepared, tmp_path / "parts", settings, [4, 8, 12, 16, 20])
    assert seen == straight, "every sample has the noise of its own epoch, in the same order"
    assert {epoch for epoch, _ in seen} == set(range(6))
    assert_equal_runs(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_of_whole_epochs_can_be_lengthened_by_epochs(pipeline, prepared, tmp_path, epochs):
    by_epochs = ["trainer.max_steps=-1"]
    train(pipeline, prepared, tmp_path / "straight", *by_epochs, "trainer.max_epochs=3")
    train(pipeline, prepared, tmp_path / "parts", *by_epochs, f"trainer.max_epochs={epochs}")
    for longer in range(epochs, 4):  # first without anything to add
        train(pipeline, prepared, tmp_path / "parts", *by_epochs, f"trainer.max_epochs={longer}", *again(longer))
    assert_equal_runs(tmp_path / "straight", tmp_path / "parts")
    assert logged(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_a_kill_left_out_after_the_checkpoint_is_made_up_for(pipeline, prepared, tmp_path, seed):
    """The files of a run's saves are taken away or put back to those of the save before, in drawn combinations."""
    random_ = random.Random(seed)
    settings = ["callbacks.checkpoints.every_n_steps=2", *OPTIMIZERS[random_.choice(list(OPTIMIZERS))]]
    train(pipeline, prepared, tmp_path, *settings)
    loras = [tmp_path / "lora.safetensors", tmp_path / "lora" / "step-000004.safetensors"]
    files = [*loras, *(export_path(file, "comfyui") for file in loras)]
    wanted = {file: file.read_bytes() for file in files}
    older = (tmp_path / "lora" / "step-000002.safetensors").read_bytes()
    for file in random_.sample(files, random_.randint(1, 4)):
        damage = random_.choice([None, older, b"", wanted[file][:-7]])
        file.unlink() if damage is None else file.write_bytes(damage)
    more = random_.choice([0, 2])
    train(pipeline, prepared, tmp_path, *settings, f"trainer.max_steps={4 + more}", *again(1))
    for end in (0, 2):  # for diffusers, for ComfyUI
        newest = tmp_path / "lora" / f"step-{4 + more:06d}{'_comfyui' if end else ''}.safetensors"
        assert step_of_lora(files[end]) == step_of_lora(newest) == 4 + more
        assert step_of_lora(files[end + 1]) == 4
        for one, two in (
            (load(wanted[files[end + 1]]), load_file(files[end + 1])),
            (load_file(files[end]), load_file(newest)),
        ):
            assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_last_validation_that_a_kill_left_out_is_made_up_for(pipeline, prepared, tmp_path, seed):
    """The log of a whole run is taken away, as if it had been killed between its last save and its last validation."""
    random_ = random.Random(seed)
    interval, batch = random_.randint(1, 4), random_.choice([1, 2])
    every = random_.choice([[], ["trainer.check_val_every_n_epoch=1"]])
    steps = interval * random_.randint(1, 2) + random_.choice([0, 0, 1])
    settings = [f"trainer.val_check_interval={interval}", f"trainer.max_steps={steps}", *every, "data.val_fraction=0.3"]
    settings += [f"data.batch_size={batch}", *OPTIMIZERS[random_.choice(list(OPTIMIZERS))]]
    train(pipeline, prepared, tmp_path, *settings, *again(0), "validate_first=false")
    wanted = {step: value for step, value in values(tmp_path, "val/loss").items() if step == steps - 1}
    shutil.rmtree(tmp_path / "csv")
    train(pipeline, prepared, tmp_path, *settings, *again(1))
    found = values(tmp_path, "val/loss") if (tmp_path / "csv").exists() else {}
    assert found == wanted
