import copy
import json
import random

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file

from mpp.lora.adapters import Adapter, adapter_state, adapters_off, has_adapter, inject, load_adapter_state
from mpp.lora.writing import save_lora
from mpp.models.experts import Experts
from mpp.models.tiny import TRANSFORMER
from tests.helpers import randomise_adapter, unchecked_error

KINDS = ["lora", "rslora", "dora", "lokr", "loha"]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    return WanTransformer3DModel(**TRANSFORMER).to(dtype)


def inputs(dtype=torch.float32):
    random = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 16, 1, 8, 8, generator=random).to(dtype),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=random).to(dtype),
        "return_dict": False,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_base_bit_for_bit_whatever_was_trained(kind):
    model = transformer()
    base = model(**inputs())[0]
    inject(model, Adapter(kind=kind, rank=4), TARGETS, seed=0)
    randomise_adapter(model)
    with torch.no_grad(), adapters_off(model):
        assert torch.equal(model(**inputs())[0], base)
    assert not torch.allclose(model(**inputs())[0], base)


@pytest.mark.parametrize("kind", KINDS)
def test_off_equals_the_public_switch_of_diffusers(kind):
    model = transformer()
    inject(model, Adapter(kind=kind, rank=4), TARGETS, seed=0)
    randomise_adapter(model)
    with torch.no_grad():
        with adapters_off(model):
            ours = model(**inputs())[0]
        model.disable_adapters()
        assert torch.equal(model(**inputs())[0], ours)


@pytest.mark.parametrize("kind", ["lora", "rslora", "lokr", "loha"])
def test_a_fresh_adapter_is_the_base_bit_for_bit(kind):
    model = transformer()
    base = model(**inputs())[0]
    inject(model, Adapter(kind=kind, rank=4), TARGETS, seed=0)
    assert torch.equal(model(**inputs())[0], base)


def first_layer(model):
    return next(m for m in model.modules() if isinstance(m, BaseTunerLayer))


@pytest.mark.parametrize(("kind", "scale"), [("lora", 6 / 2), ("rslora", 6 / 2**0.5), ("lokr", 6 / 2), ("loha", 6 / 2)])
def test_the_update_is_the_product_of_the_factors_by_alpha_over_rank_or_its_root(kind, scale):
    model = transformer()
    inject(model, Adapter(kind=kind, rank=2, alpha=6), TARGETS, seed=0)
    randomise_adapter(model)
    layer, name = first_layer(model), "blocks.0.attn1.to_q"
    factor = {key.removeprefix(f"{name}."): t for key, t in adapter_state(model).items() if key.startswith(f"{name}.")}
    if kind == "lokr":
        product = torch.kron(factor["lokr_w1"], factor["lokr_w2_a"] @ factor["lokr_w2_b"])
    elif kind == "loha":
        product = (factor["hada_w1_a"] @ factor["hada_w1_b"]) * (factor["hada_w2_a"] @ factor["hada_w2_b"])
    else:
        product = factor["lora_B.weight"] @ factor["lora_A.weight"]
    seen = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        update = layer(seen) - layer.get_base_layer()(seen)
    torch.testing.assert_close(update, scale * seen @ product.T, rtol=1e-4, atol=1e-5)
    assert update.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_adapter_in_training_alone(kind):
    model = transformer()
    inject(model, Adapter(kind=kind, rank=4, dropout=0.5), TARGETS, seed=0)
    randomise_adapter(model)
    layer, seen = first_layer(model), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        counts = []
        for mode in (True, False):
            model.train(mode)
            counts.append(len({tuple(layer(seen).flatten().tolist()) for _ in range(16)}))
    assert counts[0] == (2 if kind in ("lokr", "loha") else 16)  # all of it comes and goes, or parts of its input
    assert counts[1] == 1


def test_switching_restores_each_layers_own_state_also_after_an_exception():
    model = transformer()
    inject(model, Adapter(rank=4), TARGETS, seed=0)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers[0]._disable_adapters = True  # switched off on purpose before
    before = [layer._disable_adapters for layer in layers]
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        with adapters_off(model):
            pass
        assert all(layer._disable_adapters for layer in layers)
        raise RuntimeError("inside")
    assert [layer._disable_adapters for layer in layers] == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_switched_however_it_came_there(kind):
    def found(switched):
        layers = [m for m in switched.modules() if isinstance(m, BaseTunerLayer)]
        with adapters_off(switched):
            return len(layers), {layer._disable_adapters for layer in layers}

    model = transformer()
    model.attention = torch.nn.MultiheadAttention(32, 2)  # PEFT adds an adapter inside of what it wraps
    targets = ["to_q", "attention"] if kind in ("lora", "rslora") else ["to_q"]
    inject(model, Adapter(kind=kind, rank=2), targets, seed=0)
    count = 4 + 2 * (len(targets) == 2)
    assert found(model) == (count, {True})
    assert found(copy.deepcopy(model)) == (count, {True})
    assert found(torch.nn.ModuleDict({"a": model, "b": copy.deepcopy(model)})) == (2 * count, {True})
    model.delete_adapters("default")
    model.add_adapter(Adapter(kind=kind, rank=2).config(["to_k", "to_v"]), adapter_name="other")
    fresh = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and "other" in str(m.active_adapters)]
    with adapters_off(model):
        assert {layer._disable_adapters for layer in fresh} == {True}


def test_switching_touches_neither_requires_grad_nor_train_mode():
    model = transformer()
    inject(model, Adapter(rank=4), TARGETS, seed=0)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # frozen on purpose, as in LoRA-FA
    model.blocks[0].eval()
    flags = [(p.requires_grad) for p in model.parameters()], [m.training for m in model.modules()]
    with adapters_off(model):
        inside = [(p.requires_grad) for p in model.parameters()], [m.training for m in model.modules()]
        assert inside == flags
    assert ([(p.requires_grad) for p in model.parameters()], [m.training for m in model.modules()]) == flags


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_over_a_bf16_base_and_only_they_train(kind):
    model = transformer(torch.bfloat16)
    inject(model, Adapter(kind=kind, rank=4), TARGETS, seed=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora" in name or "lokr" in name or "hada" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trainable} == {torch.bfloat16}


def drawn(model, kind="lora", seed=5, targets=None):
    """The state of a fresh adapter; the global random state is whatever it was, and stays so."""
    torch.manual_seed(int(torch.randint(1000, ())))
    before = torch.random.get_rng_state()
    inject(model, Adapter(kind=kind, rank=4, targets=targets), TARGETS, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    return adapter_state(model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_same_whatever_the_bases_precision(kind):
    wide, narrow = drawn(transformer(), kind), drawn(transformer(torch.bfloat16), kind)
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        if "magnitude" in name:  # of DoRA: the norms of the base's own rows
            torch.testing.assert_close(tensor, narrow[name], rtol=2**-7, atol=0)
        else:
            assert torch.equal(tensor, narrow[name]), name
    # Values that came from a bf16 draw would all be representable in bf16.
    assert any(not torch.equal(v, v.bfloat16().float()) for n, v in narrow.items() if "magnitude" not in n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_draws_alone(kind):
    everywhere = drawn(transformer(), kind)
    some = drawn(transformer(), kind, targets=["to_v", "ffn.net.2"])
    assert 0 < len(some) < len(everywhere)
    assert all(torch.equal(tensor, everywhere[name]) for name, tensor in some.items())


def test_layers_experts_and_seeds_draw_differently():
    state = drawn(Experts({"high": transformer(), "low": transformer()}))
    other = drawn(transformer(), seed=6)
    alone = drawn(transformer(), seed=5)
    downs = [tensor for name, tensor in (*state.items(), *other.items(), *alone.items()) if "lora_A" in name]
    assert len({tuple(tensor.flatten().tolist()) for tensor in downs}) == len(downs)


def test_drawn_adapters_follow_the_law_that_peft_draws_by():
    model = WanTransformer3DModel(**{**TRANSFORMER, "num_layers": 6})
    state = drawn(model)
    downs = {name: tensor for name, tensor in state.items() if "lora_A" in name}
    scaled = torch.cat([(tensor * tensor.shape[1] ** 0.5).flatten() for tensor in downs.values()])
    assert scaled.abs().max() <= 1  # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan in)
    assert abs(float(scaled.mean())) < 4 / (3 * len(scaled)) ** 0.5
    assert float(scaled.var()) == pytest.approx(1 / 3, rel=0.05)
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_targets_that_match_nothing_are_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"lora.targets=.*to_query.* fit no trainable module.*to_k.*to_q"):
        inject(transformer(), Adapter(targets=["to_query"]), TARGETS, seed=0)


def test_targets_may_be_one_regex():
    model = transformer()
    inject(model, Adapter(rank=2, targets=r"blocks\.1\..*to_q"), TARGETS, seed=0)
    assert {name.split(".")[1] for name in adapter_state(model)} == {"1"}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_alphas_by_pattern_are_pefts_own(kind):
    patterns = {"rank_pattern": {r"attn1\.to_q": 2, "to_q": 3}, "alpha_pattern": {"blocks.0.*": 5}}
    model, witness = transformer(), transformer()
    inject(model, Adapter(kind=kind, rank=4, alpha=6, **patterns), TARGETS, seed=0)
    if kind in ("lokr", "loha"):
        config = {"lokr": LoKrConfig, "loha": LoHaConfig}[kind](r=4, alpha=6, target_modules=list(TARGETS), **patterns)
    else:
        flags = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
        config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), **flags, **patterns)
    inject_adapter_in_model(config, witness)
    seen = {name: m for name, m in witness.named_modules() if isinstance(m, BaseTunerLayer)}
    found = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert found.keys() == seen.keys()
    for name, layer in found.items():
        rank = 2 if name.endswith("attn1.to_q") else 3 if name.endswith("to_q") else 4
        alpha = 5 if name.startswith("blocks.0.") else 6
        assert layer.scaling["default"] == seen[name].scaling["default"]
        assert layer.scaling["default"] == pytest.approx(alpha / (rank**0.5 if kind == "rslora" else rank))
        shapes = [{n: p.shape for n, p in module.named_parameters()} for module in (layer, seen[name])]
        assert shapes[0] == shapes[1]
        assert kind == "lokr" or any(rank in shape for n, shape in shapes[0].items() if "base_layer" not in n)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"rank_pattern": {"to_qq": 2}}, r"lora.rank_pattern: to_qq fits no module .* nearest are to_q"),
        ({"alpha_pattern": {"blocks.7.*": 2}}, r"lora.alpha_pattern: blocks.7.\* fits no module"),
        ({"rank_pattern": {"to_q": 2, r"attn1\.to_q": 3}}, r"lora.rank_pattern: attn1\\.to_q .* an earlier pattern"),
    ],
)
def test_a_pattern_that_nothing_follows_is_refused_with_names_near_it(patterns, said):
    with pytest.raises(ValueError, match=said):
        inject(transformer(), Adapter(**patterns), TARGETS, seed=0)


def test_settings_out_of_range_are_refused():
    for name, value, start in [
        ("rank", 0, "lora.rank"),
        ("alpha", 0, "lora.rank"),
        ("kind", "oft", "lora.kind"),
        ("dropout", 1.0, "lora.dropout"),
        ("rank_pattern", {"to_q": 0}, "lora.rank_pattern: to_q must be at least 1"),
        ("alpha_pattern", {"to_q": 0.0}, "lora.alpha_pattern: to_q must be above 0"),
        ("rank_pattern", {"to_(q": 2}, r"lora.rank_pattern: to_(q is no regex"),
        ("b_lr_ratio", 0.0, "lora.b_lr_ratio"),
        ("b_lr_ratio", float("inf"), "lora.b_lr_ratio"),
    ]:
        assert unchecked_error(Adapter, **{name: value}).startswith(f"ValueError: {start}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loha"])  # which diffusers does not know
def test_diffusers_loads_the_file_into_a_fresh_base_with_the_same_output(kind, tmp_path):
    model = transformer()
    inject(model, Adapter(kind=kind, rank=4, alpha=7), TARGETS, seed=0)
    randomise_adapter(model)
    trained = model(**inputs())[0]
    path = tmp_path / "lora.safetensors"
    save_lora(path, model, adapter_state(model), {"samples_seen": 3})
    fresh = transformer()
    fresh.load_lora_adapter(tmp_path, weight_name=path.name, prefix="transformer")
    assert torch.equal(fresh(**inputs())[0], trained)


def test_lora_file_holds_the_adapter_alone_with_alpha_and_provenance(tmp_path):
    model = transformer()
    inject(model, Adapter(rank=4, alpha=7), TARGETS, seed=0)
    path = tmp_path / "lora.safetensors"
    save_lora(path, model, adapter_state(model), {"samples_seen": 3})
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    described = json.loads(metadata["lora_adapter_metadata"])
    assert described["transformer.lora_alpha"] == 7
    assert described["transformer.r"] == 4
    assert json.loads(metadata["mpp"]) == {"samples_seen": 3}
    names = load_file(path)
    assert len(names) == 2 * 20  # A and B of ten layers in each of two blocks
    assert all(name.startswith("transformer.blocks.") and ".lora_" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_file_has_its_scale_in_its_factors_where_that_is_exact(kind, seed, tmp_path):
    draws = random.Random(seed)
    rank, exact = draws.choice([1, 4]), draws.random() < 0.7
    alpha = rank * 2.0 ** draws.randint(-3, 3) * (1 if exact else draws.choice([3, 0.7]))
    model = transformer()
    inject(model, Adapter(kind=kind, rank=rank, alpha=alpha), TARGETS, seed=0)
    randomise_adapter(model, 0.2)
    save_lora(path := tmp_path / "lora.safetensors", model, adapter_state(model), {})
    with safe_open(path, "pt") as handle:
        described = json.loads(handle.metadata()["lora_adapter_metadata"])
    said = described.get("transformer.lora_alpha", described.get("transformer.alpha"))
    assert (said, described.get("transformer.use_rslora", False)) == (
        (rank, False) if exact else (alpha, kind == "rslora")
    )
    names = [
        name
        for name, own in adapter_state(model).items()
        if not torch.equal(load_file(path)[f"transformer.{name}"], own)
    ]
    held = ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")
    assert all(name.endswith(held) for name in names)
    assert bool(names) == (exact and alpha / (rank**0.5 if kind == "rslora" else rank) != 1)


def test_state_of_another_adapter_is_refused():
    model = transformer()
    inject(model, Adapter(rank=4), TARGETS, seed=0)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    load_adapter_state(model, state, "file")
    wrong = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match=r"file does not hold this run's adapter: 1 of 40 tensors missing"):
        load_adapter_state(model, wrong, "file")
    other = transformer()
    inject(other, Adapter(rank=8), TARGETS, seed=0)
    with pytest.raises(ValueError, match="40 of another shape"):
        load_adapter_state(other, state, "file")
    with pytest.raises(ValueError, match=r"0 of 40 tensors missing, 1 unknown \(first: blocks.7.to_q.lora_A.weight\)"):
        load_adapter_state(model, {**state, "blocks.7.to_q.lora_A.weight": torch.zeros(4, 64)}, "file")


def test_has_adapter_tells():
    model = transformer()
    assert not has_adapter(model)
    inject(model, Adapter(rank=2), TARGETS, seed=0)
    assert has_adapter(model)
