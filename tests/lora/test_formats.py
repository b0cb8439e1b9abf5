"""Exported LoRA files, read by programs that are not ours: diffusers' importers, PEFT, and ComfyUI's rules."""

import inspect
import json
import re

import diffusers
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.lora.export import Export
from mpp.lora.files import Update, attach, merge
from mpp.lora.formats import comfyui, kohya, to_native
from mpp.lora.reading import find_loras
from mpp.lora.writing import save_lora
from mpp.models.contract import NativeRule
from mpp.models.experts import parts_of
from mpp.models.families.flux import Flux
from mpp.models.families.hunyuan_video import HunyuanVideo
from tests import comfy_reference
from tests.families import parameters
from tests.families.base import architecture, batch
from tests.helpers import randomise_adapter

pytestmark = pytest.mark.slow

DOUBLE = r"transformer_blocks\.\d+\..*(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|net\.0\.proj|net\.2)"
# Which of diffusers' pipelines reads which of our files, and the modules that it can read at this size: its importers
# of FLUX.1 splits linear1 at the published width, which a test below has. Not in here, because diffusers does not read
# them: HunyuanVideo as comfyui (names of ComfyUI's own) and as kohya, LTX-2 as kohya; HunyuanVideo 1.5 and Kandinsky 5
# (no importer).
READERS = {
    "WAN": ("WanPipeline", {"comfyui": None, "kohya": None}),
    "FLUX.1": ("FluxPipeline", {"comfyui": None, "kohya": DOUBLE}),
    "FLUX.2": ("Flux2Pipeline", {"comfyui": None, "kohya": None}),
    "HunyuanVideo 1.5": (None, {}),
    "HunyuanVideo": ("HunyuanVideoPipeline", {}),
    "Kandinsky": (None, {}),
    "LTX": ("LTX2Pipeline", {"comfyui": None}),
    "Qwen": ("QwenImagePipeline", {"comfyui": None, "kohya": None}),
    "Z-Image": ("ZImagePipeline", {"comfyui": None, "kohya": None}),
}
KEYS = {"comfyui": comfy_reference.key_map, "kohya": comfy_reference.kohya_map}
LAYER = re.compile(r"\.(attn\d?|attention)\.(to_|add_)")
FUSED = ("FLUX", "HunyuanVideo", "Z-Image")  # families whose original has qkv as one layer


@pytest.fixture(scope="module", params=parameters())
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def arch(variant, built):
    return architecture(variant, built(variant))


@pytest.fixture(scope="module")
def seen(arch, variant):
    """What velocities are compared on: a batch, and noise at a low and a high sigma, so that all experts answer."""
    data = batch(arch, variant, arch.load_encoders("cpu"), ("a red box", "a cat on a blue chair"))
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([0.3, 0.95]), data.conditioning


@torch.no_grad()
def velocity(arch, transformer, seen):
    return arch.velocity(transformer.eval(), *seen)


def trained(transformer, path, targets, **settings):
    """A transformer with a random adapter, and its files."""
    inject(transformer, Adapter(**{"rank": 4, "alpha": 7, **settings}), targets, seed=0)
    randomise_adapter(transformer, 0.2)
    files = save_lora(path / "lora.safetensors", transformer, adapter_state(transformer), {"samples_seen": 3})
    return transformer, files


def by_part(transformer, files):
    """Each transformer with the file that belongs to it."""
    return list(zip((model for _, model in parts_of(transformer)), files, strict=True))


def export(arch, source, **settings):
    return Export(lora=str(source), **settings).run(arch)


def close(actual, expected, base):
    """Equal to float32's rounding, and not by doing nothing."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


def family_of(arch):
    """The model's name among those whose layers the reader calls otherwise."""
    return next((name for name in comfy_reference.MODELS if arch.family.startswith(name)), None)


def read_by(variant):
    """The pipeline that reads its LoRA files, and which formats of them."""
    found = [reader for name, reader in READERS.items() if variant.name.startswith(name)]
    assert found, f"say in READERS which of diffusers' pipelines reads LoRA files of {variant.name}, if any"
    return found[0]


def with_reader(format):
    """Variants whose files of this format a pipeline of diffusers reads."""
    return parameters(format, of=lambda variant: format in read_by(variant)[1])


@pytest.mark.parametrize(("variant", "format"), [*with_reader("comfyui"), *with_reader("kohya")], indirect=["variant"])
def test_diffusers_importer_gives_the_trained_output(variant, arch, seen, tmp_path, format):
    name, formats = read_by(variant)
    fresh = arch.load_transformer()
    base = velocity(arch, fresh, seen)
    transformer, _ = trained(arch.load_transformer(), tmp_path, formats[format] or arch.lora_targets, kind="rslora")
    pipeline = getattr(diffusers, name)
    for model, file in by_part(fresh, export(arch, tmp_path, format=format)):
        state, metadata = pipeline.lora_state_dict(file.parent, weight_name=file.name, return_lora_metadata=True)[:2]
        assert metadata is None  # else its alpha would apply once more
        known = inspect.signature(pipeline.load_lora_into_transformer).parameters
        extra = {"network_alphas": None} if "network_alphas" in known else {}
        pipeline.load_lora_into_transformer(state, transformer=model, metadata=metadata, **extra)
    close(velocity(arch, fresh, seen), velocity(arch, transformer, seen), base)


# Without a single file there is no independent way from the original's names to diffusers'.
@pytest.mark.parametrize("variant", parameters(of=lambda v: v.single_file), indirect=True)
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha", "dora"])
def test_comfyui_on_the_original_file_gives_the_merged_model(variant, tmp_path, kind):
    assert_merged_on_the_original(variant, tmp_path, kind, "comfyui")


@pytest.mark.parametrize("variant", parameters(of=lambda v: v.single_file), indirect=True)
def test_kohyas_tools_on_the_original_file_give_the_merged_model(variant, tmp_path):
    assert_merged_on_the_original(variant, tmp_path, "rslora", "kohya")


def assert_merged_on_the_original(variant, tmp_path, kind, format):
    model, state = variant.single_file()
    file = tmp_path / "original.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    arch = architecture(variant, file)
    targets = arch.lora_targets
    if kind == "lokr":
        targets = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and alone(arch, name)]
        assert len(targets) > 1
    transformer, _ = trained(model, tmp_path, targets, kind=kind)
    (written,) = export(arch, tmp_path, format=format)
    changed = comfy_reference.apply(state, load_file(written), family_of(arch), KEYS[format])
    base = {name: tensor.clone() for name, tensor in arch.load_transformer().state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
    merged = arch.load_transformer().state_dict()
    transformer.fuse_lora()
    transformer.unload_lora()
    expected = transformer.state_dict()
    assert merged.keys() == expected.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any((merged[name] - base[name]).abs().max() > 1e-3 for name in merged)


def alone(arch, module):
    """Whether a block's layer is a layer of the original too, so that its LoKr can be said."""
    blocks = re.match(r"(blocks|layers|transformer_blocks|single_transformer_blocks|\w+_transformer_blocks)\.", module)
    rules = arch.names_in("comfyui").rules
    rule = next((rule for rule in rules if re.fullmatch(rule.pattern, module)), None)
    return bool(blocks) and (rule is not None and not rule.parts if rules else bool(LAYER.search(module)))


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_comfyui_puts_every_update_into_its_own_rows(arch, tmp_path, kind):
    assert_in_their_rows(arch, tmp_path, kind, "comfyui", originals(arch))


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_kohyas_tools_put_every_update_into_its_own_rows(arch, tmp_path, kind):
    assert_in_their_rows(arch, tmp_path, kind, "kohya", arch.native)


# Of which ComfyUI takes diffusers' names, and so the file for diffusers.
@pytest.mark.parametrize("variant", parameters(of=lambda v: v.name.startswith("FLUX")), indirect=True)
@pytest.mark.parametrize(("kind", "rank", "alpha"), [("lora", 4, 2), ("lora", 3, 24), ("rslora", 4, 1), ("lokr", 4, 8)])
def test_comfyui_finds_the_trained_strength_in_the_file_for_diffusers(arch, tmp_path, kind, rank, alpha):
    transformer, (file,) = trained(
        arch.load_transformer(), tmp_path, arch.lora_targets, kind=kind, rank=rank, alpha=alpha
    )
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert next(iter(layers.values())).scaling["default"] != 1
    wanted = expected_deltas(originals(arch), transformer, layers)
    got = comfy_reference.deltas(shapes(wanted), load_file(file), family_of(arch))
    for name, delta in wanted.items():
        torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=1e-6)


def assert_in_their_rows(arch, tmp_path, kind, format, rules):
    transformer, files = trained(arch.load_transformer(), tmp_path, arch.lora_targets, kind=kind)
    exported = export(arch, tmp_path, format=format)
    for (model, _), file in zip(by_part(transformer, files), exported, strict=True):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        wanted = expected_deltas(rules, model, layers)
        got = comfy_reference.deltas(shapes(wanted), load_file(file), family_of(arch), KEYS[format])
        assert got.keys() == wanted.keys()
        for name, delta in wanted.items():
            torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=1e-6)


def originals(arch):
    """The rules of the state that ComfyUI loads: it holds HunyuanVideo 1.5 in the layers of the first."""
    return HunyuanVideo.native if arch.family.startswith("hunyuan_video15") else arch.native


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_deltas(rules, model, layers):
    """PEFT's own deltas, stacked where the family says that the original stacks them."""
    wanted = {}
    for name in layers:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            assert rules == (), name
            wanted[name] = layers[name].get_delta_weight("default").detach()
            continue
        match = re.fullmatch(rule.pattern, name)
        parts = [match.expand(part) for part in rule.parts] or [name]
        rows = [
            layers[part].get_delta_weight("default").detach()
            if part in layers
            else torch.zeros_like(model.get_submodule(part).weight)
            for part in parts
        ]
        wanted[match.expand(rule.name)] = torch.cat(rows)
    return wanted


@pytest.mark.parametrize("variant", parameters(of=lambda v: v.name.startswith(FUSED)), indirect=True)
def test_some_parts_of_a_fused_layer_are_enough(variant, arch, tmp_path):
    fused = [rule for rule in originals(arch) if rule.parts]
    model = next(m for _, m in parts_of(arch.load_transformer()))
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    rule, name = next(
        (rule, n) for rule in fused for n in names if re.fullmatch(rule.pattern, n) and "block" in n + "blocks"
    )
    match = re.fullmatch(rule.pattern, name)
    parts = [match.expand(part) for part in rule.parts]
    transformer, files = trained(arch.load_transformer(), tmp_path, [parts[-1]])
    (first, *_) = export(arch, files[0], format="comfyui", output=str(tmp_path / "part.safetensors"))
    model = next(m for _, m in parts_of(transformer))
    layer = model.get_submodule(parts[-1])
    whole = sum(model.get_submodule(part).out_features for part in parts), layer.in_features
    (delta,) = comfy_reference.deltas({match.expand(rule.name): whole}, load_file(first), family_of(arch)).values()
    before = sum(model.get_submodule(part).out_features for part in parts[:-1])
    assert delta[:before].abs().sum() == 0
    torch.testing.assert_close(delta[before:], layer.get_delta_weight("default").detach(), rtol=1e-4, atol=1e-6)


def test_peft_and_diffusers_load_their_formats_with_the_same_output_bit_for_bit(arch, seen, tmp_path):
    transformer, _ = trained(arch.load_transformer(), tmp_path, arch.lora_targets)
    expected = velocity(arch, transformer, seen)
    fresh = arch.load_transformer()
    for model, folder in by_part(fresh, export(arch, tmp_path, format="peft")):
        PeftModel.from_pretrained(model, folder)  # changes the model in place
    assert torch.equal(velocity(arch, fresh, seen), expected)
    fresh = arch.load_transformer()
    for model, file in by_part(fresh, export(arch, tmp_path, format="diffusers")):
        model.load_lora_adapter(file.parent, weight_name=file.name, prefix="transformer")
    assert torch.equal(velocity(arch, fresh, seen), expected)


@pytest.mark.parametrize("kind", ["rslora", "dora", "lokr", "loha"])
def test_peft_and_diffusers_load_every_kind(architecture, tmp_path, kind):
    transformer, _ = trained(architecture.load_transformer(), tmp_path, architecture.lora_targets, kind=kind)
    (folder,) = export(architecture, tmp_path, format="peft")
    PeftModel.from_pretrained(by_peft := architecture.load_transformer(), folder)
    (file,) = export(architecture, tmp_path, format="diffusers")
    by_diffusers = architecture.load_transformer()
    if kind == "loha":  # which diffusers does not know: its file is for mpp itself
        attach(by_diffusers, find_loras(file, architecture, {"": architecture.skeleton()})[""])
    else:
        by_diffusers.load_lora_adapter(file.parent, weight_name=file.name, prefix="transformer", adapter_name="default")
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    x = torch.randn(3, 64)
    for model in (by_peft, by_diffusers):
        for name, layer in layers.items():
            given = x.repeat(1, layer.get_base_layer().in_features // 64)
            assert torch.equal(model.get_submodule(name).eval()(given), layer.eval()(given))


def uneven():
    """Parts of a fused layer that differ in rank and scale, one of them absent."""
    random = torch.Generator().manual_seed(0)
    sizes = {"b.0.q": 6, "b.0.k": 4, "b.0.v": 5, "b.0.o": 3}
    ranks = {"b.0.q": (2, 0.7), "b.0.v": (3, 1.9), "b.0.o": (4, 0.3)}
    found = {
        name: Update(
            {
                "lora_A.weight": torch.randn(rank, 7, generator=random),
                "lora_B.weight": torch.randn(sizes[name], rank, generator=random),
            },
            scale,
        )
        for name, (rank, scale) in ranks.items()
    }
    rules = (
        NativeRule(r"b\.(\d)\.[qkv]", r"m.\1.qkv", (r"b.\1.q", r"b.\1.k", r"b.\1.v")),
        NativeRule(r"b\.(\d)\.o", r"m.\1.out_proj"),
    )
    return found, rules, sizes


@pytest.mark.parametrize("write", [comfyui, kohya])
def test_parts_of_uneven_ranks_and_scales_are_fused_exactly(write):
    found, rules, sizes = uneven()
    layers = {"m.0.qkv": (15, 7), "m.0.out_proj": (3, 7)}
    got = comfy_reference.deltas(layers, write(to_native(found, rules, sizes)))
    delta = {n: u.scale * u.factors["lora_B.weight"] @ u.factors["lora_A.weight"] for n, u in found.items()}
    torch.testing.assert_close(got["m.0.qkv"], torch.cat([delta["b.0.q"], torch.zeros(4, 7), delta["b.0.v"]]))
    torch.testing.assert_close(got["m.0.out_proj"], delta["b.0.o"])


@pytest.mark.parametrize(
    ("family", "pipeline", "write"),
    [(Flux, "FluxPipeline", kohya), (HunyuanVideo, "HunyuanVideoPipeline", comfyui)],
)
@pytest.mark.parametrize("absent", [(), ("attn.to_k",), ("attn.to_q", "proj_mlp")])
def test_diffusers_splits_linear1_of_the_published_width_as_it_was_fused(family, pipeline, write, absent):
    random = torch.Generator().manual_seed(0)
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    block = "single_transformer_blocks.3."
    found = {
        block + name: Update(
            {
                "lora_A.weight": torch.randn(4, 7, generator=random),
                "lora_B.weight": torch.randn(size, 4, generator=random),
            },
            1.3,
        )
        for name, size in sizes.items()
        if name not in absent
    }
    # HunyuanVideo's reader looks for a layer of the double blocks to tell whose names these are
    other = {"transformer_blocks.0.attn.to_q": found[block + "attn.to_v"]}
    full = {block + name: size for name, size in sizes.items()}
    full |= {f"transformer_blocks.0.attn.to_{part}": 3072 for part in "qkv"}
    native = to_native({**found, **other}, family.native, full)
    file = write(native, *(["diffusion_model."] if write is comfyui else []))  # whose reader fails on an alpha
    state = getattr(diffusers, pipeline).lora_state_dict(file)
    for name, size in full.items():
        update = {**found, **other}.get(name)
        wanted = torch.zeros(size, 7)
        if update is not None:
            wanted = update.scale * update.factors["lora_B.weight"] @ update.factors["lora_A.weight"]
        got = state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", [comfyui, kohya])
@pytest.mark.parametrize("decomposed", [(), ("lokr_w1",), ("lokr_w2",), ("lokr_w1", "lokr_w2")])
def test_lokr_has_its_scale_whichever_factor_is_decomposed(write, decomposed):
    random = torch.Generator().manual_seed(0)
    factors, whole = {}, []
    for name in ("lokr_w1", "lokr_w2"):
        a, b = torch.randn(4, 2, generator=random), torch.randn(2, 3, generator=random)
        factors |= {f"{name}_a": a, f"{name}_b": b} if name in decomposed else {name: a @ b}
        whole.append(a @ b)
    native = to_native({"x.o": Update(factors, 1.75)}, (), {})
    got = comfy_reference.deltas({"x.o": (16, 9)}, write(native))
    torch.testing.assert_close(got["x.o"], 1.75 * torch.kron(*whole))


@pytest.mark.parametrize("write", [comfyui, kohya])
@pytest.mark.parametrize("seed", range(5))
def test_lohas_of_some_parts_of_a_fused_layer_are_one_of_the_whole(write, seed):
    random = torch.Generator().manual_seed(seed)
    _, rules, sizes = uneven()
    found, wanted = {}, {name: torch.zeros(size, 7) for name, size in sizes.items()}
    for name, rank in {"b.0.q": 2, "b.0.v": 3, "b.0.o": 4}.items():
        w1_a, w2_a = (torch.randn(sizes[name], rank, generator=random) for _ in range(2))
        w1_b, w2_b = (torch.randn(rank, 7, generator=random) for _ in range(2))
        scale = float(torch.rand((), generator=random)) + 0.5
        wanted[name] = scale * (w1_a @ w1_b) * (w2_a @ w2_b)
        factors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
        found[name] = Update(factors, scale)
    got = comfy_reference.deltas({"m.0.qkv": (15, 7), "m.0.out_proj": (3, 7)}, write(to_native(found, rules, sizes)))
    torch.testing.assert_close(got["m.0.qkv"], torch.cat([wanted[f"b.0.{part}"] for part in "qkv"]))
    torch.testing.assert_close(got["m.0.out_proj"], wanted["b.0.o"])


@pytest.mark.parametrize("seed", range(5))
def test_a_dora_of_some_parts_of_a_fused_layer_leaves_the_other_rows(seed):
    random = torch.Generator().manual_seed(seed)
    found, rules, sizes = uneven()
    weights = {name: torch.randn(size, 7, generator=random) for name, size in sizes.items()}
    wanted = {name: torch.zeros(size, 7) for name, size in sizes.items()}
    for name, update in found.items():
        magnitude = torch.rand(sizes[name], 1, generator=random) + 0.5
        adapted = weights[name] + update.scale * update.factors["lora_B.weight"] @ update.factors["lora_A.weight"]
        wanted[name] = magnitude * adapted / adapted.norm(dim=1, keepdim=True) - weights[name]
        scale = magnitude * weights[name].norm(dim=1, keepdim=True) / adapted.norm(dim=1, keepdim=True)
        found[name] = Update({**update.factors, "dora_scale": scale}, update.scale)
    file = comfyui(to_native(found, rules, sizes, lambda name: weights[name].norm(dim=1)))
    fused = {"m.0.qkv": [f"b.0.{part}" for part in "qkv"], "m.0.out_proj": ["b.0.o"]}
    state = {f"{name}.weight": torch.cat([weights[part] for part in parts]) for name, parts in fused.items()}
    layers = {name: tuple(state[f"{name}.weight"].shape) for name in fused}
    got = comfy_reference.deltas(layers, file, state=state)
    for name, parts in fused.items():
        torch.testing.assert_close(got[name], torch.cat([wanted[part] for part in parts]), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_said_exactly_is_refused_with_what_works():
    found, rules, sizes = uneven()
    lokr = {"b.0.q": Update({"lokr_w1": torch.ones(2, 1), "lokr_w2": torch.ones(3, 7)}, 1.0)}
    with pytest.raises(ValueError, match=r"b.0.q, b.0.k, b.0.v as one layer \(m.0.qkv\).*merge=true"):
        to_native(lokr, rules, sizes)
    dora = {
        name: Update({**update.factors, "dora_scale": torch.ones(sizes[name], 1)}, 1.0)
        for name, update in found.items()
    }
    with pytest.raises(ValueError, match=r"kohya's tools do not read; export.format=comfyui.*merge=true"):
        kohya(to_native({"b.0.o": dora["b.0.o"]}, rules, sizes))
    bias = {"b.0.o": Update({**found["b.0.o"].factors, "lora_B.bias": torch.ones(3)}, 1.0)}
    with pytest.raises(ValueError, match=r"b.0.o has .*lora_B.bias"):
        to_native(bias, rules, sizes)
    with pytest.raises(ValueError, match=r"2 modules have no known name .*\(first: c.0\)"):
        to_native({"c.0": found["b.0.o"], "c.1": found["b.0.o"]}, rules, sizes)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr", "loha"])
def test_ranks_and_alphas_per_module_are_honoured(architecture, tmp_path, kind):
    """The witness is what PEFT adds."""
    model, _ = trained(
        architecture.load_transformer(),
        tmp_path,
        ["to_q", "to_v"],
        kind=kind,
        alpha=6,
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={r"blocks\.1\.attn2\.to_v": 3},
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len({layer.scaling["default"] for layer in layers.values()}) == 3
    merged = architecture.load_transformer()
    attach(merged, find_loras(tmp_path, architecture, {"": architecture.skeleton()})[""])
    merge(merged)
    base = architecture.load_transformer()
    wanted, state = {}, {}
    for name, layer in layers.items():
        (rule,) = (rule for rule in architecture.native if re.fullmatch(rule.pattern, name))
        native = re.fullmatch(rule.pattern, name).expand(rule.name)
        wanted[native] = (merged.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        if kind != "dora":
            torch.testing.assert_close(wanted[native], layer.get_delta_weight("default"), rtol=1e-4, atol=1e-6)
        state[f"{native}.weight"] = base.get_submodule(name).weight.detach()
    for format in ("comfyui", *(("kohya",) if kind != "dora" else ())):
        (file,) = export(architecture, tmp_path, format=format)
        got = comfy_reference.deltas(shapes(wanted), load_file(file), state=state)
        for name, delta in wanted.items():
            torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=1e-5)


def test_files_say_how_they_were_made_and_hold_nothing_that_readers_would_apply_twice(architecture, tmp_path):
    _, (source,) = trained(architecture.load_transformer(), tmp_path, architecture.lora_targets)
    for format in ("comfyui", "kohya", "diffusers"):
        (file,) = export(architecture, source, format=format)
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
        made = json.loads(metadata["mpp_export"])
        assert made["format"] == format
        assert made["lora"]["file"] == "lora.safetensors"
        assert json.loads(metadata["mpp"]) == {"samples_seen": 3}
        assert ("lora_adapter_metadata" in metadata) == (format == "diffusers")
    names = set(load_file(tmp_path / "lora_comfyui.safetensors"))
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in names
    held = load_file(tmp_path / "lora_comfyui.safetensors")
    modules = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    assert modules == {name.removesuffix(".alpha") for name in names if name.endswith(".alpha")}
    assert all(held[f"{m}.alpha"] == held[f"{m}.lora_A.weight"].shape[0] for m in modules)
    names = set(load_file(tmp_path / "lora_kohya.safetensors"))
    assert {f"lora_unet_blocks_0_ffn_0.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_rounds_each_tensor_once_and_keeps_alpha(architecture, tmp_path, dtype):
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    _, (source,) = trained(architecture.load_transformer(), tmp_path, architecture.lora_targets, kind="rslora")
    for format in ("comfyui", "kohya", "diffusers"):
        (full,) = export(architecture, source, format=format)
        (low,) = export(
            architecture, source, format=format, dtype=dtype, output=str(tmp_path / f"{format}.safetensors")
        )
        full, low = load_file(full), load_file(low)
        assert full.keys() == low.keys()
        for name, tensor in full.items():
            wanted = tensor if name.endswith("alpha") else tensor.to(kinds[dtype])
            assert torch.equal(low[name], wanted)
            assert low[name].dtype == wanted.dtype
