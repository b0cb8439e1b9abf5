"""What fits, as it is said."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import mpp.plan
from mpp.config import build, compose
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.settings import Memory
from mpp.training.costs import Costing, Costs
from mpp.training.measuring import Run
from mpp.training.plan_lines import parts, table
from mpp.training.planning import CARDS, Bucket, Choice, Plan, choices, costing, fits, next_cheaper
from tests.families import base, variants
from tests.helpers import config, unchecked_error

GIB = 2**30


def costs_of(peak):
    return Costs(0, 0, 0, 0, 0, int(peak * GIB), 0, 1, 1)


def choice(base, activations, peak):
    return Choice(Memory(base=base, activations=activations), costs_of(peak))


def test_the_parts_come_to_the_peak():
    named = {name: size for name, size, _ in parts(Costs(7, 2, 4, 2, 11, 30, 9, 1, 1))}
    assert sum(named[name] for name in ("base", "adapter", "optimizer", "saved activations", "work of blocks")) == 43
    assert named["peak"] == 43


def test_a_card_holds_what_leaves_a_gibibyte_of_it():
    assert [card for card in CARDS if fits(choice("bf16", "keep", 23.0).costs, card)] == [24, 32, 48, 80]
    assert [card for card in CARDS if fits(choice("bf16", "keep", 23.1).costs, card)] == [32, 48, 80]
    assert table([choice("bf16", "keep", 23.0)])[1].split() == ["bf16", "keep", "23.0", "-", *"---", *["all"] * 4]


def test_the_next_cheaper_choice_keeps_the_base_where_it_can():
    found = [choice("bf16", "checkpoint", 50), choice("bf16", "offload", 40), choice("fp8", "checkpoint", 45)]
    assert next_cheaper(choice("bf16", "keep", 400), found) is found[0]
    assert next_cheaper(found[0], found) is found[1]
    assert next_cheaper(choice("bf16", "offload", 48), found[2:]) is found[2]
    assert next_cheaper(choice("bf16", "offload", 30), found) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "what is to be counted? set data.cache_dir=CACHE, or size=832x480"),
        ({"cache_dir": "a", "size": "8x8"}, "not both"),
        ({"size": "832"}, "size must be width and height in pixels, such as 832x480, got '832'"),
        ({"size": "8x8", "frames": 0}, "frames must be at least 1, got 0"),
        ({"size": "8x8", "tflops": -1.0}, "tflops must be above 0 and finite, got -1.0"),
    ],
)
def test_settings_that_count_nothing_are_refused(settings, said):
    assert said in unchecked_error(Plan, **settings)


def test_a_size_that_the_model_does_not_take_is_refused_with_the_nearest(architecture):
    with pytest.raises(ValueError, match=r"size=830x480: this model takes multiples of 16 pixels, such as 832x480"):
        Plan(size="830x480").bucket(architecture)


def test_the_largest_samples_of_a_cache_count_with_their_own_text(architecture, prepared):
    found = Plan(cache_dir=str(prepared)).bucket(architecture)
    assert found.name in ("64x64", "96x48")
    assert found.conditioning.text.shape[1] == 32


def test_the_least_time_is_that_of_the_slower_of_computing_and_reading():
    costs = Costs(10**12, 0, 0, 0, 0, 0, 0, 4 * 10**12, 10**12)
    assert Plan(size="8x8", tflops=2.0).seconds(costs, Memory(), prior=True) == 2.5
    assert Plan(size="8x8", tflops=2.0, bandwidth=1000.0).seconds(costs, Memory(), prior=True) == 4.0
    kept = Memory(activations="keep")
    assert Plan(size="8x8", bandwidth=1000.0, accumulate=3).seconds(costs, kept, prior=False) == 6.0
    assert Plan(size="8x8").seconds(costs, kept, prior=False) is None


@pytest.mark.slow
def test_all_ways_to_run_are_in_the_table_and_those_of_fewer_bits_take_less(architecture):
    run = Run(architecture, Adapter(rank=4), Memory(), MaskedPriorLoss(), torch.optim.AdamW)
    found = list(choices(costing(run), Bucket((16, 1, 8, 8), "64x64"), 1))
    sizes = {(c.memory.base, c.memory.activations): c.costs for c in found}
    assert len(sizes) == 12
    assert sizes["nf4", "keep"].base < sizes["int8", "keep"].base == sizes["fp8", "offload"].base
    assert sizes["fp8", "keep"].base < sizes["bf16", "keep"].base
    assert all(costs.prior > 0 for costs in sizes.values())


def test_the_command_prints_its_table_and_records_it(pipeline, capsys):
    words = ["model=tiny_wan", f"model.pretrained={pipeline}", "size=64x64", "table=false", "tflops=1"]
    rows = mpp.plan.run(config("plan", words))
    said = capsys.readouterr().out
    assert "1 sample of 64x64, memory.base=bf16 memory.activations=checkpoint" in said
    assert "at least" in said
    assert rows[0]["base"] == 605184
    assert json.dumps(rows)


@pytest.mark.slow
def test_published_models_need_no_files(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = mpp.plan.run(compose("plan", ["model=wan_14b", "size=832x480", "frames=81", "table=false"]))
    assert 40 < sum(found[0][name] for name in ("base", "adapter", "optimizer", "step")) / GIB < 70


def test_what_a_gguf_file_takes_is_not_made_up(architecture):
    run = Run(architecture, Adapter(), Memory("gguf"), MaskedPriorLoss(), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"what a GGUF file takes is not counted.*memory\.base=nf4 and int8"):
        costing(run)


def test_experts_that_take_turns_cannot_keep_activations_which_the_plan_says_as_training_does(built):
    variant = next(variant for variant in variants() if variant.name == "WAN 2.2 A14B T2V both")
    run = Run(
        base.architecture(variant, built(variant)), Adapter(rank=2), Memory(), MaskedPriorLoss(), torch.optim.AdamW
    )
    kept, known, counted = replace(run, memory=Memory(activations="keep")), costing(run), []
    with pytest.raises(ValueError, match=r"keep needs the weights of both experts.*set memory.activations=checkpoint"):
        Costing(kept)
    stand_in = lambda self, *_: counted.append(self.run.memory.activations) or costs_of(0)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Costing, "count", stand_in)
        found = list(choices(known, Bucket((16, 1, 8, 8), "64x64"), 1))
    assert {way.memory.activations for way in found} == {"checkpoint", "offload"} == set(counted)


def test_a_model_whose_shape_is_not_known_needs_its_configuration():
    arch = build(compose("plan", ["model=kandinsky5", "size=768x512"]).model)
    with pytest.raises(ValueError, match=r"shape of model.pretrained=kandinskylab/.* is not known here; give"):
        arch.skeleton(published=True)


def test_words_of_training_mean_the_same():
    cfg = config("plan", ["data.cache_dir=c", "data.batch_size=2", "gradient_checkpointing=false", "precision=32-true"])
    assert (cfg.plan.cache_dir, cfg.plan.batch_size, cfg.plan.precision) == ("c", 2, "32-true")
    assert cfg.memory.activations == "keep"
    assert sys.modules["mpp.plan"].main
