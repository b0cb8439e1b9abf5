"""The CPU kit counts what a formula says, and does not trust what its control contradicts."""

import json
import random
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks import overhead, step
from benchmarks.counting import flops, saved_bytes
from mpp.models.tiny import TRANSFORMER
from mpp.training.step import Position
from tests.families import variants
from tests.helpers import loss_of

WAN = next(variant for variant in variants() if variant.name == "WAN 2.1 T2V")


def forward_flops(samples, tokens, text):
    """One pass of the tiny WAN, from the sizes of its matrices."""
    dim = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    patch = TRANSFORMER["in_channels"] * 4
    ends = 2 * tokens * patch * dim  # into tokens, and out of them
    time = TRANSFORMER["freq_dim"] * dim + dim * dim + dim * 6 * dim
    words = text * (TRANSFORMER["text_dim"] * dim + dim * dim)
    linear = tokens * (4 + 2) * dim * dim + text * 2 * dim * dim + 2 * tokens * dim * TRANSFORMER["ffn_dim"]
    attention = 2 * tokens * (tokens + text) * dim
    return 2 * samples * (ends + time + words + TRANSFORMER["num_layers"] * (linear + attention))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counts_of_the_tiny_wan_are_those_of_the_formula(built, checkpointing):
    found = step.counts(WAN, built(WAN), checkpointing=checkpointing)
    tokens = 2 * 2 * 3  # two latent frames of two by three
    assert found.teacher == forward_flops(2, tokens, 64)
    assert found.prior - found.plain == found.teacher
    assert found.adds_up
    assert found.latents == 4 * 2 * 16 * 2 * 4 * 6
    assert 0 < found.more_saved <= 2  # the teacher's prediction, and the mask that weighs it
    assert "NOT EQUAL" not in step.line(found)
    assert found.saved_plain > 10 * found.latents


def test_a_storage_is_counted_once_and_a_models_own_not_at_all():
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == x.nbytes
    assert saved_bytes(lambda: (layer(x), layer(x[:2])), layer) == x.nbytes
    assert saved_bytes(lambda: (x.exp(), x.exp()), layer) == 2 * x.nbytes  # each keeps its result
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x), layer) == 0


def test_both_loops_of_the_timing_do_the_same_work(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "CELLS", (1, 8, 8))
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(tmp_path / "transformer")
    data, own = overhead.example(), overhead.module_of(tmp_path, checkpointing=True)
    own.configure_model()
    assert own.step(data, Position(0, 0)).taught == 1
    bare = overhead.Bare(tmp_path / "transformer", data, checkpointing=True)
    assert flops(bare) == flops(lambda: loss_of(own, data).backward())


def test_a_control_that_is_off_makes_the_timing_inconclusive():
    draws = random.Random(0)
    for _ in range(50):
        bare = [draws.uniform(0.9, 1.1) for _ in range(11)]
        off = draws.uniform(-0.1, 0.1)
        found = overhead.Overhead(True, [2 * b for b in bare], bare, [b * (1 + off) for b in bare])
        assert found.verdict == ("measured" if abs(off) <= 0.03 else "inconclusive")
        assert found.record()["ratio"] == pytest.approx(2 / (1 + off / 2))
        assert found.verdict in str(found)


@pytest.mark.slow  # trains 2 x 4 steps of a model of 256 channels
def test_the_kit_runs_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    target = tmp_path / "rows.jsonl"
    words = ["step", "--only", "WAN 2.1 T2V,overhead", "--rounds", "2", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["row"] for row in rows] == ["counts"] * 2 + ["overhead"] * 2
    assert all(row["adds_up"] for row in rows[:2])
    assert [row["rounds"] for row in rows[2:]] == [2, 2]
    assert "control" in capsys.readouterr().out
