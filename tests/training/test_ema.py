"""The average of the adapter, against one in plain Python over the adapter of each step."""

import logging
import random

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import mpp.sample
from mpp.lora.adapters import adapter_state
from mpp.lora.files import read_own
from mpp.lora.writing import step_of_lora
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import config, train, unchecked_error

SPY = "+callbacks.spy._target_=tests.training.test_ema.Spy"
SEEN = []


class Spy(Callback):
    """Keeps the adapter of the start and of each step, in float64."""

    def on_train_start(self, trainer, module):
        SEEN[:] = [self.copy(module)]

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == len(SEEN):
            SEEN.append(self.copy(module))

    @staticmethod
    def copy(module):
        return {f"transformer.{n}": t.detach().double().clone() for n, t in adapter_state(module.transformer).items()}


def averages(states, decay, *, warmup):
    """Of each step: the last average and the new adapter, weighted."""
    found = [states[0]]
    for number, state in enumerate(states[1:]):
        keep = min(decay, (1 + number) / (10 + number)) if warmup else decay
        found.append({name: keep * found[-1][name] + (1 - keep) * tensor for name, tensor in state.items()})
    return found


def assert_close(path, wanted):
    held = load_file(path)
    assert held.keys() == wanted.keys()
    for name, tensor in held.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_the_average_is_over_the_adapters_of_all_steps(pipeline, prepared, tmp_path, seed):
    draw = random.Random(seed)
    decay, warmup, window = draw.choice([0.0, 0.5, 0.9, 0.99]), draw.choice([True, False]), draw.choice([1, 2, 3])
    steps, every = draw.randint(3, 6), draw.randint(1, 3)
    settings = [f"callbacks.ema.decay={decay}", f"callbacks.ema.warmup={warmup}", SPY, f"trainer.max_steps={steps}"]
    settings += [f"trainer.accumulate_grad_batches={window}", f"callbacks.checkpoints.every_n_steps={every}"]
    settings += ["lora.alpha=4"]  # at the scale 1 files hold the adapter as it is
    kind = draw.choice(["lora", "dora", "loha"])
    train(pipeline, prepared, tmp_path, *settings, f"lora={kind}", "data.batch_size=1")
    wanted = averages(SEEN, decay, warmup=warmup)
    assert len(wanted) == steps + 1
    assert_close(tmp_path / "lora_ema.safetensors", wanted[-1])
    for step in (*range(every, steps, every), steps):
        assert_close(tmp_path / "lora" / f"step-{step:06d}_ema.safetensors", wanted[step])
        assert_close(tmp_path / "lora" / f"step-{step:06d}.safetensors", SEEN[step])
    record = read_own(tmp_path / "lora_ema.safetensors").record
    assert record["ema"] == {"decay": decay, "warmup": warmup, "updates": steps}
    assert record["steps"] == steps
    assert (tmp_path / "lora_ema_comfyui.safetensors").is_file()


def files(out):
    return {path.relative_to(out).as_posix(): load_file(path) for path in out.rglob("lora*/*.safetensors")} | {
        path.name: load_file(path) for path in out.glob("*.safetensors")
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_averages_that_a_kill_left_out_are_made_up_for(pipeline, prepared, tmp_path, seed):
    """Files of a run's last save are taken away or cut short, with and without steps to come."""
    draw = random.Random(seed)
    settings = ["callbacks.ema.decay=0.7", "callbacks.checkpoints.every_n_steps=2"]
    train(pipeline, prepared, tmp_path / "straight", *settings, "trainer.max_steps=4")
    train(pipeline, prepared, tmp_path / "killed", *settings, f"trainer.max_steps={(end := draw.choice([2, 4]))}")
    last = [*(tmp_path / "killed").glob("*.safetensors"), *(tmp_path / "killed" / "lora").glob(f"*{end}*.safetensors")]
    assert len(last) == 8
    for path in draw.sample(last, draw.randint(1, 8)):
        path.unlink() if draw.random() < 0.5 else path.write_bytes(path.read_bytes()[:-7])
    train(pipeline, prepared, tmp_path / "killed", "ckpt_path=last", *settings, "trainer.max_steps=4")
    wanted, found = files(tmp_path / "straight"), files(tmp_path / "killed")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[path][name], tensor) for path, held in found.items() for name, tensor in held.items())


@pytest.mark.slow
def test_an_average_that_is_turned_on_later_begins_there_and_another_decay_holds_from_there_on(
    pipeline, prepared, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    train(pipeline, prepared, tmp_path, "trainer.max_steps=2", "logger.csv.version=csv/0")
    assert not (tmp_path / "lora_ema.safetensors").exists()
    more = ["ckpt_path=last", SPY, "callbacks.checkpoints.every_n_steps=1"]
    train(
        pipeline,
        prepared,
        tmp_path,
        *more,
        "callbacks.ema.decay=0.6",
        "trainer.max_steps=3",
        "logger.csv.version=csv/1",
    )
    assert "changed from here on: callbacks.ema.decay: None -> 0.6" in caplog.text
    assert "the average begins here, at step 2, from the adapter as it is" in caplog.text
    assert "average of the LoRA for ComfyUI: " in caplog.text
    # the adapter of the start is that of step 2
    first = load_file(tmp_path / "lora" / "step-000002.safetensors")
    third = load_file(tmp_path / "lora" / "step-000003.safetensors")
    average = {name: 0.6 * tensor.double() + 0.4 * third[name].double() for name, tensor in first.items()}
    assert_close(tmp_path / "lora_ema.safetensors", average)
    train(
        pipeline,
        prepared,
        tmp_path,
        *more,
        "callbacks.ema.decay=0.2",
        "trainer.max_steps=4",
        "logger.csv.version=csv/2",
    )
    fourth = load_file(tmp_path / "lora" / "step-000004.safetensors")
    average = {name: 0.2 * tensor + 0.8 * fourth[name].double() for name, tensor in average.items()}
    assert_close(tmp_path / "lora_ema.safetensors", average)
    train(
        pipeline,
        prepared,
        tmp_path,
        *more,
        "callbacks.ema.decay=null",
        "trainer.max_steps=5",
        "logger.csv.version=csv/3",
    )
    assert step_of_lora(tmp_path / "lora_ema.safetensors") == 4
    assert "AdapterEma" not in read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]


def test_a_schedule_free_optimizer_has_its_own_average(pipeline, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.models.family.Family.load_transformer", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"callbacks.ema.decay=0.9: a schedule-free optimizer averages by itself"):
        train(pipeline, prepared, tmp_path, "optimizer=schedulefree", "callbacks.ema.decay=0.9")


def test_a_decay_out_of_range_is_refused():
    from mpp.training.ema import AdapterEma

    for decay in (-0.1, 1.0, float("nan")):
        assert unchecked_error(AdapterEma, decay).startswith("ValueError: callbacks.ema.decay must be at least 0")


@pytest.mark.slow
def test_samples_are_generated_from_the_average(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "callbacks.ema.decay=0.5")
    words = ["sampling.prompts=[a]", "sampling.width=32", "sampling.height=32", "sampling.steps=1", "device=cpu"]
    start = ["model=tiny_wan", f"model.pretrained={pipeline}", f"output_dir={tmp_path / 'generated'}", *words]
    assert mpp.sample.run(config("sample", [*start, f"lora={tmp_path / 'lora_ema.safetensors'}"]))
