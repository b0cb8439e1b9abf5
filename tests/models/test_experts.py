import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import nn

from mpp.lora.adapters import Adapter, adapter_state, adapters_off, has_adapter, inject, load_adapter_state
from mpp.lora.writing import save_lora
from mpp.models.experts import Experts, parts_of
from mpp.models.streamed import compile_blocks
from mpp.models.tiny import TRANSFORMER
from tests.helpers import randomise_adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Expert(nn.Module):
    """Adds what its frozen weight, adapter and buffer say."""

    def __init__(self, value):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        return x * self.frozen + self.adapter


def three():
    return Experts({"low": Expert(1.0), "middle": Expert(2.0), "high": Expert(3.0)})


def real(seed=0):
    torch.manual_seed(seed)
    return Experts({name: WanTransformer3DModel(**TRANSFORMER) for name in ("low", "high")})


def inputs():
    random = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 16, 1, 8, 8, generator=random),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=random),
        "return_dict": False,
    }


# ---------------------------------------------------------------- routing


def test_samples_go_to_the_expert_of_their_sigma_and_idle_experts_are_left_out():
    parts = three()
    sigma = torch.tensor([0.9, 0.1, 0.5, 0.3, 1.0, 0.0])
    assert parts.route(sigma, (0.3, 0.9)) == {"low": [1, 5], "middle": [2, 3], "high": [0, 4]}
    assert parts.route(sigma[[1, 5]], (0.3, 0.9)) == {"low": [0, 1]}
    assert parts.route(torch.tensor([0.95, 0.2]), (0.3, 0.9)) == {"low": [1], "high": [0]}


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417])
def test_a_sigma_at_the_boundary_is_the_next_experts_whatever_its_precision(boundary):
    parts = Experts({"low": Expert(1.0), "high": Expert(2.0)})
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor([boundary], dtype=dtype)
        below = torch.nextafter(sigma, torch.zeros_like(sigma))
        assert parts.route(torch.cat([sigma, below]), (boundary,)) == {"low": [1], "high": [0]}


def test_predictions_come_back_in_the_order_of_the_batch_with_their_gradients():
    parts = three()
    sigma = torch.tensor([0.95, 0.1, 0.5, 0.92, 0.2])
    x = torch.arange(10.0).view(5, 2)
    got = parts.predict(sigma, (0.3, 0.9), lambda expert, rows: expert(x[rows]))
    want = x * torch.tensor([3.0, 1.0, 2.0, 3.0, 1.0])[:, None]
    assert torch.equal(got.detach(), want)
    (got * x).sum().backward()
    rows = {"high": [0, 3], "low": [1, 4], "middle": [2]}
    for name, expert in parts.items():
        assert torch.equal(expert.adapter.grad, x[rows[name]].sum(0))


# ---------------------------------------------------------------- adapters


def test_a_lone_transformer_is_one_part_without_a_name():
    lone = Expert(1.0)
    assert list(parts_of(lone)) == [("", lone)]
    parts = three()
    assert [name for name, _ in parts_of(parts)] == ["low", "middle", "high"]


def test_every_expert_gets_an_adapter_of_its_own():
    parts = real()
    assert not has_adapter(parts)
    inject(parts, Adapter(rank=2), TARGETS, seed=0)
    assert all(has_adapter(part) for part in parts.values())
    state = adapter_state(parts)
    shares = {name: {k for k in state if k.startswith(f"{name}.blocks.")} for name in ("low", "high")}
    assert set(state) == shares["low"] | shares["high"]
    assert {k.removeprefix("low.") for k in shares["low"]} == {k.removeprefix("high.") for k in shares["high"]}
    name = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(state[f"low.{name}"], state[f"high.{name}"])
    trainable = [n for n, p in parts.named_parameters() if p.requires_grad]
    assert len(trainable) == len(state)
    assert all("lora" in n for n in trainable)


def test_adapters_of_all_experts_are_switched_off_together():
    parts = real()
    base = {name: part(**inputs())[0] for name, part in parts.items()}
    inject(parts, Adapter(rank=2), TARGETS, seed=0)
    randomise_adapter(parts, 0.3)
    for name, part in parts.items():
        assert not torch.allclose(part(**inputs())[0], base[name])
        with adapters_off(parts):
            assert torch.equal(part(**inputs())[0], base[name])


def test_the_state_of_both_adapters_loads_again_and_that_of_one_does_not():
    parts, again = real(), real()
    for model, seed in ((parts, 0), (again, 1)):
        inject(model, Adapter(rank=2), TARGETS, seed=seed)
    randomise_adapter(parts)
    state = {name: tensor.clone() for name, tensor in adapter_state(parts).items()}
    load_adapter_state(again, state, "file")
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(again).items())
    half = {name: tensor for name, tensor in state.items() if name.startswith("low.")}
    with pytest.raises(ValueError, match=rf"{len(half)} of {len(state)} tensors missing \(first: high\."):
        load_adapter_state(again, half, "file")


def test_each_expert_has_its_own_lora_file_that_diffusers_loads(tmp_path):
    parts = real()
    inject(parts, Adapter(rank=4, alpha=7), TARGETS, seed=0)
    randomise_adapter(parts)
    files = save_lora(tmp_path / "lora.safetensors", parts, adapter_state(parts), {"samples_seen": 3})
    assert files == [tmp_path / "lora_low.safetensors", tmp_path / "lora_high.safetensors"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    fresh = real()
    for name, file in zip(parts, files, strict=True):
        with safe_open(file, "pt") as handle:
            assert json.loads(handle.metadata()["mpp"]) == {"samples_seen": 3, "expert": name}
        fresh[name].load_lora_adapter(tmp_path, weight_name=file.name, prefix="transformer")
        assert torch.equal(fresh[name](**inputs())[0], parts[name](**inputs())[0])
    assert not torch.allclose(fresh["low"](**inputs())[0], fresh["high"](**inputs())[0])


def test_checkpointing_and_compiling_reach_every_expert(monkeypatch):
    parts, compiled = real(), []
    parts.enable_gradient_checkpointing()
    assert all(part.gradient_checkpointing for part in parts.values())
    monkeypatch.setattr(torch, "compile", lambda forward, **settings: compiled.append((forward.__self__, settings)))
    compile_blocks(parts)
    assert [block for block, _ in compiled] == [block for part in parts.values() for block in part.blocks]
    assert all(settings == {"fullgraph": True} for _, settings in compiled)
