"""Whether a run fits: said before, and when it did not."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mpp.config import build
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.settings import Memory
from mpp.training import forecast
from mpp.training.costs import Costs, Weights
from mpp.training.forecast import Forecast, largest, run_of, way_out
from mpp.training.planning import Choice, costing
from mpp.training.step import MaskedPriorStep
from tests.helpers import train, train_config

GIB = 2**30


def costs(base, step):
    return Costs(base * GIB, GIB, 2 * GIB, GIB, GIB, step * GIB, 0, 1, 0)


def forecast_of(base, step, *, fits=True, **more):
    choice = Choice(Memory().settled, replace(costs(base, step), **more))
    return Forecast(choice, "832x480, 81 frames", 24 * GIB, fits=fits)


@pytest.mark.parametrize(("base", "step", "warned"), [(10, 4, False), (10, 200, True)])
def test_what_fits_is_said_and_what_may_not_is_warned_of(base, step, warned, caplog):
    caplog.set_level("INFO")
    found = forecast_of(base, step, fits=not warned)
    found.check()
    found.say()
    assert caplog.messages[0] == (
        f"memory: {base + 3 + step:.1f} GiB of 24.0 GiB at most (weights {base:.1f} GiB, adapter and optimizer "
        f"3.0 GiB, step {step:.1f} GiB; samples of 832x480, 81 frames)"
    )
    assert ("may not fit" in caplog.text) == warned


def test_only_weights_that_are_larger_than_the_card_are_refused():
    with pytest.raises(ValueError, match=r"weights \(22.0 GiB\), .* larger than .* the card \(24.0 GiB\); set"):
        forecast_of(22, 0).check()


def test_what_waits_must_be_free_of_the_cpus_memory_in_every_process(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=31 * GIB))
    replace(forecast_of(1, 1, waiting=15 * GIB), processes=2).check()
    with pytest.raises(ValueError, match=r"wait in the CPU's memory, 32.0 GiB for 2 processes, of which 31.0 GiB are"):
        replace(forecast_of(1, 1, waiting=16 * GIB), processes=2).check()


def test_the_way_out_keeps_the_base_where_less_takes_less():
    now, same = Choice(Memory().settled, costs(9, 9)), Choice(Memory(activations="offload").settled, costs(9, 5))
    other = Choice(Memory(base="fp8").settled, costs(5, 9))
    assert way_out(now, same, "outputs/a").startswith("next: go on from the last save with resume=outputs/a memory.act")
    assert "a run of its own with memory.base=fp8 memory.activations=checkpoint" in way_out(now, other, "outputs/a")
    assert way_out(now, None, "a").startswith("nothing here takes less")


def trainer_on(device):
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, precision="32-true", accumulate_grad_batches=1, num_devices=1)


@pytest.fixture
def tiny(pipeline, prepared, tmp_path, monkeypatch):
    """A run's module and data, and a card of 3 GiB with 2 free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * GIB, 3 * GIB))
    cfg = train_config(pipeline, prepared, tmp_path)
    architecture = build(cfg.model)
    data = build(cfg.data, architecture=architecture)
    data.setup()
    parts = {"architecture": architecture, "adapter": Adapter(rank=4), "loss": MaskedPriorLoss(1.0, 0.1)}
    return SimpleNamespace(**parts, memory=Memory(), make_optimizer=torch.optim.AdamW), data


def test_a_run_on_a_card_is_forecast_with_its_largest_samples(tiny):
    module, data = tiny
    found = Forecast.of(trainer_on("cuda"), module, data)
    entry = max(data.train_entries, key=lambda entry: math.prod(entry.shape))
    record = data.cache.conditioning(entry, data.architecture.conditioning)
    run = run_of(trainer_on("cuda"), module)
    kept = costing(replace(run, memory=Memory(activations="keep"))).count(entry.shape, data.batch_size, record)
    assert (found.costs, found.room, found.fits) == (kept, 2 * GIB, True)
    assert found.lines()[0] == "memory: auto chose memory.activations=keep memory.resident=all"
    assert largest(data, (2, *entry.shape)).shape == entry.shape
    assert Forecast.of(trainer_on("cpu"), module, data) is None


def test_a_card_that_is_named_is_chosen_for_on_any_machine(tiny, monkeypatch):
    module, data = tiny
    weights, counted = Weights(0, ((1, 1),)), SimpleNamespace(count=lambda *_: costs(0, 0))
    monkeypatch.setattr(forecast, "costing", lambda _: SimpleNamespace(with_memory=lambda _: counted, weights=weights))
    for device, card, room in (("cpu", 4, 4), ("cuda", 4, 2), ("cuda", 1.5, 1.5)):
        module.memory = Memory(card=card)
        assert Forecast.of(trainer_on(device), module, data).room == room * GIB
    module.memory = Memory(card=4, activations="keep", resident="all")
    assert Forecast.of(trainer_on("cpu"), module, data) is None
    assert not Forecast.of(trainer_on("cuda"), module, data).chosen


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_out_of_memory_says_what_takes_less_and_goes_on_as_if_nothing_had_been(
    pipeline, prepared, tmp_path, monkeypatch, seed
):
    settings = ["trainer.max_steps=6", "callbacks.checkpoints.every_n_steps=2"]
    train(pipeline, prepared, tmp_path / "whole", *settings)
    moment, steps, step = random.Random(seed).randrange(3, 6), [], MaskedPriorStep.__call__

    def stand_in(self, batch, position):
        steps.append(batch)
        if len(steps) == moment:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return step(self, batch, position)

    monkeypatch.setattr(MaskedPriorStep, "__call__", stand_in)
    with pytest.raises(ValueError, match=rf"^out of memory in step {moment}, on 2 x \d+x\d+ \(CUDA out of") as said:
        train(pipeline, prepared, tmp_path / "broken", *settings)
    monkeypatch.setattr(MaskedPriorStep, "__call__", step)
    lines = str(said.value).splitlines()
    assert [line.split()[:2] for line in lines[-13:-1]] == [
        [base, activations]
        for base in ("bf16", "fp8", "int8", "nf4")
        for activations in ("keep", "checkpoint", "offload")
    ]
    assert lines[-1].startswith(f"next: go on from the last save with resume={tmp_path / 'broken'} memory.activations=")
    train(
        pipeline,
        prepared,
        tmp_path / "broken",
        *settings,
        f"resume={tmp_path / 'broken'}",
        "memory.activations=offload",
    )
    ends = [load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("error", [AssertionError(), KeyError("x"), ValueError("not\ncounted")])
def test_a_run_that_cannot_be_counted_is_trained(error, monkeypatch, caplog):
    def fail(_):
        raise error

    monkeypatch.setattr(forecast, "costing", fail)
    monkeypatch.setattr(forecast, "largest", lambda _: None)
    monkeypatch.setattr(forecast, "run_of", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * GIB, 3 * GIB))
    trainer = trainer_on("cuda")
    module = SimpleNamespace(memory=Memory())
    assert Forecast.of(trainer, module, None) is None
    assert "what the run takes of the card could not be counted" in caplog.text
