"""Two experts trained in one run: each learns from its own sigmas, in batches of its own."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from mpp.core.flow import SigmaLaw
from mpp.models.experts import Experts
from mpp.models.tiny import TRANSFORMER
from tests.helpers import logged, train
from tests.training.test_ddp import launch, run

BOTH = ["model.expert=both", "model.boundary=0.8", "data.batch_size=2"]


@pytest.fixture(scope="module")
def pair(pipeline, tmp_path_factory):
    """The tiny pipeline with a second transformer."""
    folder = tmp_path_factory.mktemp("pair") / "pipeline"
    shutil.copytree(pipeline, folder)
    torch.manual_seed(9)
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(folder / "transformer_2")
    return str(folder)


def loras(out):
    return {name: load_file(out / f"lora_{name}.safetensors") for name in ("low", "high")}


def test_each_step_is_one_experts_and_both_learn(pair, prepared, tmp_path, monkeypatch):
    routes = []
    original = Experts.route
    monkeypatch.setattr(Experts, "route", lambda *a: routes.append(original(*a)) or routes[-1])
    train(pair, prepared, tmp_path / "out", *BOTH, "trainer.max_steps=10", "validate_first=false")
    assert len(routes) >= 10
    assert all(len(found) == 1 for found in routes)
    assert {name for found in routes for name in found} == {"low", "high"}
    assert not (tmp_path / "out" / "lora.safetensors").exists()
    for state in loras(tmp_path / "out").values():
        assert all(name.startswith("transformer.blocks.") for name in state)
        assert all(tensor.abs().sum() > 0 for name, tensor in state.items() if "lora_B" in name)


def test_an_expert_learns_nothing_where_all_sigmas_are_the_others(pair, prepared, tmp_path):
    train(pair, prepared, tmp_path / "out", *BOTH, "model.sigma.min_sigma=0.8", "validate_first=false")
    found = loras(tmp_path / "out")
    assert all(tensor.abs().sum() == 0 for name, tensor in found["low"].items() if "lora_B" in name)
    assert any(tensor.abs().sum() > 0 for name, tensor in found["high"].items() if "lora_B" in name)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(pair, prepared, tmp_path):
    settings = [*BOTH, "validate_first=false", "callbacks.checkpoints.every_n_steps=3", "callbacks.ema.decay=0.5"]
    settings += ["lora.rank_pattern={to_q: 2}", "lora.b_lr_ratio=4"]
    train(pair, prepared, tmp_path / "whole", *settings, "trainer.max_steps=6")
    train(pair, prepared, tmp_path / "parts", *settings, "trainer.max_steps=3")
    train(pair, prepared, tmp_path / "parts", *settings, "trainer.max_steps=6", "ckpt_path=last",
          "logger.csv.version=csv/resumed")  # fmt: skip
    for name in ("lora_low", "lora_high", "lora_ema_low", "lora_ema_high"):
        whole, parts = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert logged(tmp_path / "whole")[-1]["train/loss"] > 0


def test_the_law_of_a_lone_expert_is_its_share_of_the_law_of_both():
    uniform = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = SigmaLaw("logit_normal", shift=3.0).quantile(uniform, 1)
    low = SigmaLaw("logit_normal", shift=3.0, max_sigma=0.8).quantile(uniform, 1)
    share = both[both < 0.8]
    for q in (0.1, 0.5, 0.9):
        assert float(share.quantile(q)) == pytest.approx(float(low.quantile(q)), abs=0.02)


@pytest.mark.slow
def test_several_processes_need_to_be_told_that_parameters_may_be_unused(pair, prepared, tmp_path):
    # In a process of its own: Lightning leaves the process group and its environment behind.
    ended = run([pair, str(prepared), str(tmp_path / "out"), *BOTH, "trainer.strategy=ddp", "trainer.devices=1"])
    assert ended.returncode != 0
    assert "set trainer.strategy=ddp_find_unused_parameters_true" in ended.stderr


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one_process(pair, prepared, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(prepared, cache)
    lines = (cache / "index.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["shape"] == [16, 1, 8, 8]]
    (cache / "index.jsonl").write_text("".join(line + "\n" for line in kept))
    base = [
        "model.expert=both", "model.boundary=0.8", "loss=continuous", "trainer.max_steps=1",
        "trainer.gradient_clip_val=null", "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1",
        "data.batch_size=1",
    ]  # fmt: skip
    alone = run([pair, str(cache), str(tmp_path / "alone"), *base, "trainer.accumulate_grad_batches=2"])
    assert alone.returncode == 0, alone.stderr[-2000:]
    ranks = ["trainer.strategy=ddp_find_unused_parameters_true", "trainer.devices=2"]
    both = launch([pair, str(cache), str(tmp_path / "both"), *base, *ranks], 2)
    assert both.returncode == 0, both.stderr[-2000:]
    one, two = loras(tmp_path / "alone"), loras(tmp_path / "both")
    for name in one:
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], rtol=1e-4, atol=1e-7)
