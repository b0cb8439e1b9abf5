"""LoRA files of other programs, written by those programs' rules, mean here what they mean there."""

import itertools
import json
import logging
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpp.lora.files import attach, merge, updates
from mpp.lora.reading import asked, find_loras
from mpp.models.contract import NativeRule
from mpp.models.experts import parts_of
from tests import comfy_reference
from tests.families import parameters
from tests.families.base import architecture
from tests.families.wan import original_keys
from tests.helpers import architecture as tiny
from tests.lora import foreign
from tests.lora.test_export import experts
from tests.lora.test_formats import by_part, export, shapes, trained


def parts(arch):
    return dict(parts_of(arch.skeleton()))


def read(arch, path):
    """The only LoRA of a lone transformer."""
    return find_loras(path, arch, parts(arch))[""]


def found(arch, path):
    """The updates as plain matrices, by diffusers' modules."""
    lora = read(arch, path)
    attach(skeleton := arch.skeleton(), lora)
    return {name: delta(u.factors) * u.scale for name, u in updates(skeleton, lora.tensors).items()}


def delta(factors):
    if "lora_A.weight" in factors:
        return factors["lora_B.weight"] @ factors["lora_A.weight"]
    if "hada_w1_a" in factors:
        return (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    whole = [factors.get(n, None) for n in ("lokr_w1", "lokr_w2")]
    whole = [factors[f"lokr_w{i}_a"] @ factors[f"lokr_w{i}_b"] if w is None else w for i, w in enumerate(whole, 1)]
    return torch.kron(*whole)


# ---------------------------------------------------------------- what the program means is what is read


CHOSEN = ("WAN 2.1 T2V", "FLUX.1 dev")
EVERYWHERE = ("kohya", "ComfyUI with alpha", "diffusers", "bare", "a folder of PEFT")


def some(**settings):
    """All variants, but for two slow."""
    slow = [p if p.values[0].name in CHOSEN else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
            for p in parameters(**settings)]  # fmt: skip
    return sorted(slow, key=lambda p: bool(p.marks))


@pytest.fixture(scope="module", params=some(of=lambda variant: variant.single_file))
def original(request, tmp_path_factory):
    """A model's original file, and the layers of it that a LoRA for ComfyUI has."""
    variant, folder = request.param, tmp_path_factory.mktemp("original")
    model, state = variant.single_file()
    file = folder / "original.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    arch = architecture(variant, file)
    (lora,) = trained(model, folder, arch.lora_targets)[1]
    (exported,) = export(arch, lora, format="comfyui")
    family = next((name for name in comfy_reference.MODELS if arch.family.startswith(name)), None)
    shapes = {
        n.removesuffix(".weight"): tuple(t.shape) for n, t in state.items() if n.endswith(".weight") and t.ndim == 2
    }
    layers = comfy_reference.deltas(shapes, load_file(exported), family)
    return arch, state, {name: tuple(layer.shape) for name, layer in layers.items()}


def forms():
    """All forms of the two families that stand for others; of the others those that differ in more than an ending."""
    for variant in some(of=lambda variant: variant.single_file):
        whole = variant.values[0].name in CHOSEN
        for form in [*foreign.FORMS, "a folder of PEFT"]:
            if whole or form in EVERYWHERE:
                fast = whole and form in ("kohya", "bare", "a folder of PEFT")
                slow = () if fast else pytest.mark.slow
                yield pytest.param(*variant.values, form, marks=slow, id=f"{variant.id}-{form.replace(' ', '_')}")


@pytest.mark.parametrize(("original", "form"), list(forms()), indirect=["original"])
def test_a_lora_of_the_original_model_does_here_what_it_does_there(original, tmp_path, form):
    arch, state, shapes = original
    names = foreign.drawn(shapes, seed=len(form))
    path = tmp_path / "foreign.safetensors"
    if form in foreign.FORMS:
        save_file({name: tensor.contiguous() for name, tensor in foreign.FORMS[form](names).items()}, path)
    else:
        path = foreign.peft_folder(tmp_path / "peft", names)
    expected = tmp_path / "expected.safetensors"
    changed = {f"{name}.weight": scale * (up @ down) for name, (down, up, scale) in names.items()}
    save_file({name: (t + changed.get(name, 0)).contiguous() for name, t in state.items()}, expected)
    base = tmp_path / "base.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, base)
    transformer = arch.load_transformer()
    attach(transformer, read(arch, path))
    merge(transformer)
    arch.pretrained = str(expected)
    try:
        wanted = arch.load_transformer().state_dict()
    finally:
        arch.pretrained = str(base)
    for name, tensor in transformer.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module", params=some())
def arch(request, built):
    return architecture(request.param, built(request.param))


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("rslora", "lokr", "loha")), "lora"]
)
def test_what_mpp_exports_is_read_back(arch, tmp_path, kind):
    transformer, files = trained(arch.load_transformer(), tmp_path, arch.lora_targets, kind=kind)
    for format in ("comfyui", "kohya", "diffusers", "peft"):
        try:
            written = export(arch, tmp_path, format=format)
        except ValueError:
            assert (kind, format) in (("lokr", "comfyui"), ("lokr", "kohya"))
            continue
        for (part, model), file, (_, own) in zip(
            parts_of(transformer), written, by_part(transformer, files), strict=True
        ):
            lora = find_loras(file, arch, parts(arch))[part]
            attach(skeleton := parts(arch)[part], lora)
            wanted = updates(model, {k.removeprefix("transformer."): t for k, t in load_file(own).items()})
            got = updates(skeleton, lora.tensors)
            assert got.keys() == wanted.keys()
            for name, update in wanted.items():  # without the ranks that a fused layer has of others
                assert kind == "lokr" or shapes(got[name].factors) == shapes(update.factors)
                torch.testing.assert_close(
                    delta(got[name].factors) * got[name].scale,
                    delta(update.factors) * update.scale,
                    rtol=1e-5,
                    atol=1e-6,
                )


# ---------------------------------------------------------------- one LoRA, many forms


@pytest.fixture(scope="module")
def wan(pipeline):
    """A tiny WAN, a LoRA of all its layers by diffusers' names and by the original's."""
    arch = tiny(pipeline)
    model = arch.skeleton()
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if re.search(r"attn\d\.to_|ffn\.net\.[02]", n)
              and hasattr(m, "weight")}  # fmt: skip
    ours = foreign.drawn(shapes)
    theirs = {
        name: next(iter(original_keys({f"{name}.weight": 0}))).removesuffix(".weight") for name in ours
    }  # the committed list of WAN's own names
    return arch, ours, {theirs[name]: lora for name, lora in ours.items()}


@pytest.mark.slow
def test_every_form_of_one_lora_gives_the_same_tensors(wan, tmp_path):
    arch, ours, theirs = wan
    wanted = {f"{n}.lora_{end}.weight": t for n, (down, up, _) in ours.items() for end, t in (("A", down), ("B", up))}
    scales = {name: scale for name, (_, _, scale) in ours.items()}
    for names in (ours, theirs):
        for form, write in foreign.FORMS.items():
            path = tmp_path / "lora.safetensors"
            written = write(names)
            save_file({name: tensor.contiguous() for name, tensor in written.items()}, path)
            lora = read(arch, path)
            attach(skeleton := arch.skeleton(), lora)
            folded = not any(name.endswith("alpha") for name in written)
            assert lora.tensors.keys() == wanted.keys(), form
            for name, tensor in wanted.items():
                scale = scales[name.split(".lora_")[0]] if folded and "lora_B" in name else 1
                assert torch.equal(lora.tensors[name], tensor * scale), (form, name)
            for name, update in updates(skeleton, lora.tensors).items():
                assert update.scale == pytest.approx(1 if folded else scales[name], rel=1e-6), (form, name)


def test_lokr_and_loha_of_lycoris_are_read(wan, tmp_path):
    arch, _, theirs = wan
    made = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=made) * 0.3  # noqa: E731
    for number, (name, (down, up, _)) in enumerate(theirs.items()):
        rows, columns = len(up), down.shape[1]
        rank, alpha = 2 + number % 3, 1 + number % 5
        key = ("lycoris_" if number % 2 else "lora_unet_") + name.replace(".", "_")
        loha = {"hada_w1_a": draw(rows, rank), "hada_w1_b": draw(rank, columns)}
        loha |= {"hada_w2_a": draw(rows, rank), "hada_w2_b": draw(rank, columns)}
        whole = {"lokr_w1": draw(4, 4), "lokr_w2": draw(rows // 4, columns // 4)}
        half = {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(rows // 4, rank), "lokr_w2_b": draw(rank, columns // 4)}
        for factors, scale in ((loha, alpha / rank), (half, alpha / rank), (whole, 1)):
            file = {f"{key}.{factor}": tensor for factor, tensor in factors.items()}
            path = tmp_path / "lycoris.safetensors"
            save_file({**file, f"{key}.alpha": torch.tensor(float(alpha))}, path)
            (got,) = found(arch, path).values()
            torch.testing.assert_close(got, scale * delta(factors), rtol=1e-5, atol=1e-6)


def test_text_encoders_are_left_out_and_said(wan, tmp_path, caplog):
    arch, ours, theirs = wan
    texts = ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_te_x.alpha",
             "text_encoder.layers.0.q.lora_A.weight", "text_encoder_2.layers.0.q.lora_A.weight",
             "text_encoders.qwen.layers.0.lora_A.weight", "te2.layers.0.lora_up.weight"]  # fmt: skip
    path = tmp_path / "both.safetensors"
    save_file({**foreign.kohya(theirs), **{name: torch.ones(2) for name in texts}}, path)
    with caplog.at_level(logging.WARNING):
        assert found(arch, path).keys() == ours.keys()
    assert f"{len(texts)} tensors of text encoders are left out" in caplog.text
    save_file({name: torch.ones(2) for name in texts}, path)
    with pytest.raises(ValueError, match="holds text encoders alone"):
        read(arch, path)


def test_names_that_mean_several_modules_are_an_error_with_the_candidates(wan, tmp_path, monkeypatch):
    arch, ours, _ = wan
    swapped = (NativeRule(r"blocks\.0\.attn1\.to_q", "blocks.0.attn1.to_k"), *arch.native)
    monkeypatch.setattr(type(arch), "native", swapped)
    name = "blocks.0.attn1.to_k"
    save_file(foreign.FORMS["diffusers"]({name: ours[name]}), tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"x.safetensors: .*to_k may mean several modules \(diffusers: .*to_k, the orig.*to_q"
    ):
        read(arch, tmp_path / "x.safetensors")


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(("high", "low"), [
    ("wan22_char_high_noise", "wan22_char_low_noise"), ("Char-HighNoise-v2", "Char-LowNoise-v2"),
    ("char_HIGH", "char_LOW"), ("char_h", "char_l"), ("char HN 000500", "char LN 000500"),
    ("highlands_high", "highlands_low"), ("lora_high", "lora_low"),
])  # fmt: skip
def test_a_pair_of_experts_is_told_by_the_usual_names(pipeline, tmp_path, high, low):
    arch = experts(pipeline, tmp_path / "pipeline")
    own = parts(arch)
    name = "diffusion_model.blocks.0.self_attn.q"
    for file, value in ((high, 1.0), (low, 2.0)):
        tensors = {f"{name}.lora_A.weight": torch.full((2, 64), value), f"{name}.lora_B.weight": torch.ones(64, 2)}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    pair = find_loras(tmp_path, arch, own)
    alone = {
        part: find_loras(tmp_path / f"{file}.safetensors", arch, own) for part, file in (("high", high), ("low", low))
    }
    for part, value in (("high", 1.0), ("low", 2.0)):
        assert set(alone[part]) == {part}
        for lora in (pair[part], alone[part][part]):
            assert (lora.tensors["blocks.0.attn1.to_q.lora_A.weight"] == value).all()


def test_one_file_may_hold_both_experts_by_diffusers_names(pipeline, tmp_path):
    arch = experts(pipeline, tmp_path / "pipeline")
    name = "blocks.0.attn1.to_q"
    tensors = {}
    for prefix, value in (("transformer", 1.0), ("transformer_2", 2.0)):
        tensors[f"{prefix}.{name}.lora_A.weight"] = torch.full((2, 64), value)
        tensors[f"{prefix}.{name}.lora_B.weight"] = torch.ones(64, 2)
    save_file(tensors, tmp_path / "both.safetensors")
    got = find_loras(tmp_path / "both.safetensors", arch, parts(arch))
    assert {part: float(lora.tensors[f"{name}.lora_A.weight"][0, 0]) for part, lora in got.items()} == {
        "high": 1.0, "low": 2.0
    }  # fmt: skip


# ---------------------------------------------------------------- strengths


def test_a_strength_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = random.Random(0)
    (tmp_path / "odd:0.5").touch()
    assert asked("odd:0.5") == (tmp_path.__class__("odd:0.5"), 1.0)  # a file of that name
    for _ in range(200):
        name = "".join(drawn.choice("ab c:.\\/-é'[,]") for _ in range(8)) + ".safetensors"
        strength = drawn.choice([drawn.uniform(-3, 3), drawn.randint(1, 5)])
        assert asked(f"{name}:{strength}") == (tmp_path.__class__(name), float(strength))
        assert asked(name) == (tmp_path.__class__(name), 1.0)
    for text in ("x:0", "x:nan", "x:inf", "x:0.0"):
        with pytest.raises(ValueError, match=f"lora={text}: the strength must be a number other than 0"):
            asked(text)


# ---------------------------------------------------------------- files that are none


def test_each_file_that_is_no_lora_of_this_model_has_its_own_message(wan, tmp_path):
    arch, _, theirs = wan
    good = foreign.kohya(theirs)
    first = next(iter(theirs))
    key = "lora_unet_" + first.replace(".", "_")
    cases = [
        ({"decoder.up_blocks.0.weight": torch.ones(2), "encoder.x.weight": torch.ones(2)}, "is no LoRA but a VAE"),
        ({"blocks.0.ffn.0.weight": torch.ones(2), "head.head.bias": torch.ones(2)}, "is no LoRA but weights of a"),
        ({"emb_params": torch.ones(2)}, "is no LoRA: it holds emb_params"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(2, 2)}, "is no LoRA in a form that mpp reads"),
        (foreign.kohya({f"double_blocks.{n}": lora for n, lora in theirs.items()}), r"lacks \d+ of the \d+ modules"),
        ({**good, "blocks.0.weight": torch.ones(2)}, "holds 1 tensors that are no part of a LoRA"),
        ({n: t for n, t in good.items() if n != f"{key}.lora_up.weight"}, r"half a LoRA: .* and lacks lora_B.weight"),
        ({**good, f"{key}.alpha": torch.tensor(0.0)}, r"alpha must be one number above 0, got \[0.0\]"),
        ({**good, f"{key}.alpha": torch.ones(2)}, "alpha must be one number above 0"),
        ({**good, f"{key}.dora_scale": torch.ones(4, 1)}, "is a DoRA by the norms of its base"),
        ({**good, f"{key}.lora_mid.weight": torch.ones(2, 2)}, "is a convolution's"),
        ({**good, f"{key}.lora_down.weight": torch.ones(9, 64)}, "cannot be multiplied"),
        ({**good, f"{key}.hada_w1_a": torch.ones(4, 1)}, "mixes kinds of LoRA"),
        ({**good, f"{key}.lora_down.weight": torch.ones(2, 64, dtype=torch.int8)}, "is no tensor of a LoRA"),
        ({**good, **foreign.FORMS["ComfyUI"]({first: theirs[first]})}, "is said twice, by different names"),
        ({**good, f"{key}.lora_up.weight": torch.full_like(good[f"{key}.lora_up.weight"], torch.nan)}, "not finite"),
        (foreign.kohya({first: tuple(torch.cat([t, t], 1 - i) if i < 2 else t for i, t in enumerate(theirs[first]))}),
         r"its blocks.* is \(64, 64\), the LoRA's \(128, 128\)"),
    ]  # fmt: skip
    path = tmp_path / "bad.safetensors"
    for tensors, message in cases:
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=message) as error:
            found(arch, path)
        assert str(path) in str(error.value)
    save_file(good, path, metadata={"ss_base_model_version": "hunyuan-video"})
    with pytest.raises(ValueError, match="made for hunyuan-video"):
        save_file(foreign.kohya({f"x.{n}": v for n, v in theirs.items()}), path,
                  metadata={"ss_base_model_version": "hunyuan-video"})  # fmt: skip
        found(arch, path)


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.draws])])
def test_a_damaged_file_is_refused_by_name_or_means_what_comfyui_makes_of_it(wan, tmp_path, count):
    arch, ours, theirs = wan
    theirs = dict(list(theirs.items())[:4])
    shapes = {name: (len(up), down.shape[1]) for name, (down, up, _) in theirs.items()}
    back = {theirs_name: ours_name for ours_name, theirs_name in zip(ours, wan[2], strict=True)}
    path, drawn, loaded = tmp_path / "damaged.safetensors", random.Random(count), 0
    for number in range(count):
        form = drawn.choice(["kohya", "ComfyUI with alpha", "ComfyUI", "kohya without alpha"])
        tensors = {name: tensor.contiguous() for name, tensor in foreign.FORMS[form](theirs).items()}
        path.write_bytes(mutated(tensors, drawn, tmp_path))
        try:
            got = found(arch, path)
        except ValueError as error:
            assert str(path) in str(error), (number, error)
            continue
        loaded += 1
        wanted = comfy_reference.deltas(shapes, load_file(path))
        assert {back[name] for name in wanted} == got.keys(), number
        for name, matrix in wanted.items():
            torch.testing.assert_close(got[back[name]], matrix, rtol=1e-5, atol=1e-6)
    assert count // 50 <= loaded < count * 0.7, loaded


def mutated(tensors, drawn, folder):  # noqa: PLR0912 (a change each)
    """A file with one or two things changed: keys, shapes, kinds of numbers, metadata, bytes of the header, its end."""
    metadata = {}
    for _ in range(drawn.choice([1, 1, 2])):
        name = drawn.choice(sorted(tensors))
        change = drawn.randrange(9)
        if change == 0:
            tensors.pop(name)
        elif change == 1:
            at = drawn.randrange(len(name))
            tensors[name[:at] + drawn.choice("_.x0q") + name[at + drawn.randrange(2) :]] = tensors.pop(name)
        elif change == 2:
            tensors[name] = tensors[name][:-1] if tensors[name].ndim else tensors[name].repeat(2)
        elif change == 3:
            tensors[name] = tensors[name].T.contiguous() if tensors[name].ndim == 2 else -tensors[name]
        elif change == 4:
            tensors[name] = tensors[name].to(drawn.choice([torch.int32, torch.bool, torch.float16, torch.bfloat16]))
        elif change == 5:
            tensors[name] = tensors[name] * drawn.choice([torch.nan, torch.inf])
        elif change == 6:
            other = drawn.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        elif change == 7:
            key = drawn.choice(["lora_adapter_metadata", "mpp"])
            metadata[key] = drawn.choice(
                ["{", "[]", "null", "{}", '{"transformer.r": "x"}', "\\", json.dumps({"a": 1})]
            )
        else:
            tensors[f"{name}.{drawn.choice(['default', 'weight', 'alpha', 'diff'])}"] = tensors[name].clone()
        if not tensors:
            break
    save_file(tensors, folder / "made.safetensors", metadata=metadata or None)
    content = bytearray((folder / "made.safetensors").read_bytes())
    for _ in range(drawn.choice([0, 0, 0, 1, 3])):
        content[drawn.randrange(min(len(content), 2000))] = drawn.randrange(32, 127)
    if drawn.random() < 0.1:
        del content[drawn.randrange(len(content)) :]
    return bytes(content)


# ---------------------------------------------------------------- into the original's own file


def merges():
    """Kinds and precisions, two of each for the families that others stand for."""
    for variant in some(of=lambda variant: variant.single_file):
        whole = variant.values[0].name in CHOSEN
        for kind, dtype in itertools.product(
            ("lora", "rslora", "dora", "lokr", "loha"), (torch.float32, torch.bfloat16)
        ):
            if whole or (kind, dtype) in (("dora", torch.float32), ("lokr", torch.bfloat16)):
                slow = () if whole and (kind, dtype) == ("dora", torch.float32) else pytest.mark.slow
                yield pytest.param(*variant.values, kind, dtype, marks=slow, id=f"{variant.id}-{kind}-{dtype}")


@pytest.mark.parametrize(("original", "kind", "dtype"), list(merges()), indirect=["original"])
def test_merging_into_the_original_file_changes_what_the_lora_changes(original, tmp_path, kind, dtype):
    arch, state, _ = original
    base = tmp_path / "base.safetensors"
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, base, metadata={"of": "them"})
    before, arch.pretrained = arch.pretrained, str(base)
    try:
        transformer, _ = trained(arch.load_transformer(), tmp_path, arch.lora_targets, kind=kind)
        (written,) = export(arch, tmp_path, merge=True, format="original")
        assert written == tmp_path / "lora_merged.safetensors"
        with pytest.raises(ValueError, match="is there already"):
            export(arch, tmp_path, merge=True, format="original")
        merge(transformer)
        wanted = transformer.state_dict()
        old, new = load_file(base), load_file(written)
        assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
        changed = [name for name in new if not torch.equal(new[name], old[name])]
        assert changed
        assert all(name.endswith(".weight") and new[name].ndim == 2 for name in changed)
        arch.pretrained = str(written)
        for name, tensor in arch.load_transformer().state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)
    finally:
        arch.pretrained = before


def test_merging_into_the_original_asks_for_its_file(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch.load_transformer(), tmp_path, arch.lora_targets)
    with pytest.raises(ValueError, match="set model.pretrained to it, a .safetensors file, got"):
        export(arch, tmp_path, merge=True, format="original")
    two = experts(pipeline, tmp_path / "two")
    trained(two.load_transformer(), tmp_path, two.lora_targets)
    with pytest.raises(ValueError, match="one expert at a time"):
        export(two, tmp_path, merge=True, format="original")
