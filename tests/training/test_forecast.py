"""Whether a run fits: said before, and when it did not."""

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mpp.memory.settings import Memory
from mpp.training import forecast
from mpp.training.costs import Costs
from mpp.training.forecast import Forecast, largest, way_out
from mpp.training.planning import Choice
from mpp.training.step import MaskedPriorStep
from tests.helpers import train, train_config

GIB = 2**30


def costs(base, step):
    return Costs(base * GIB, GIB, 2 * GIB, GIB, GIB, step * GIB, 0, 1, 0)


@pytest.mark.parametrize(("base", "step", "warned"), [(10, 4, False), (10, 11, True), (10, 200, True), (21, 1, True)])
def test_what_fits_is_said_and_what_may_not_is_warned_of(base, step, warned, caplog):
    caplog.set_level("INFO")
    found = Forecast(costs(base, step), "832x480, 81 frames", 24 * GIB)
    found.check()
    found.say()
    assert caplog.messages[0] == (
        f"memory: {base + 3 + step:.1f} GiB of 24.0 GiB at most (weights {base:.1f} GiB, adapter and optimizer "
        f"3.0 GiB, step {step:.1f} GiB; samples of 832x480, 81 frames)"
    )
    assert ("may not fit" in caplog.text) == warned


def test_only_weights_that_are_larger_than_the_card_are_refused():
    with pytest.raises(ValueError, match=r"weights \(22.0 GiB\), .* alone are larger than the card \(24.0 GiB\); set"):
        Forecast(costs(22, 0), "64x64", 24 * GIB).check()


def test_the_way_out_keeps_the_base_where_less_takes_less():
    now, same = Choice(Memory().settled, costs(9, 9)), Choice(Memory(activations="offload").settled, costs(9, 5))
    other = Choice(Memory(base="fp8").settled, costs(5, 9))
    assert way_out(now, same, "outputs/a").startswith("next: go on from the last save with resume=outputs/a memory.act")
    assert "a run of its own with memory.base=fp8 memory.activations=checkpoint" in way_out(now, other, "outputs/a")
    assert way_out(now, None, "a").startswith("nothing here takes less")


def test_a_run_on_a_card_is_forecast_with_its_largest_samples(pipeline, prepared, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(forecast, "costing", lambda run: SimpleNamespace(count=lambda *given: seen.append(given) or 7))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=9))
    from mpp.config import build

    cfg = train_config(pipeline, prepared, tmp_path)
    data = build(cfg.data, architecture=build(cfg.model))
    data.setup()
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda")), precision="32-true", accumulate_grad_batches=1
    )
    parts = ("architecture", "adapter", "memory", "loss", "make_optimizer")
    module = SimpleNamespace(**dict.fromkeys(parts) | {"memory": Memory()})
    found = Forecast.of(trainer, module, data)
    assert (found.costs, found.capacity) == (7, 9)
    (shape, batch, record), *_ = seen
    assert (batch, shape[2] * shape[3]) == (2, max(e.shape[2] * e.shape[3] for e in data.train_entries))
    assert largest(data, (2, *shape)).shape == shape
    trainer.strategy.root_device = torch.device("cpu")
    assert Forecast.of(trainer, module, data) is None
    assert record.text.shape[1] == 32


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
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    assert Forecast.of(trainer, None, None) is None
    assert "what the run takes of the card could not be counted" in caplog.text
