"""Single files in fp8: whatever says the scales, a weight is its numbers times its scale, to the bit.

The files are written here from ComfyUI's description (its QUANTIZATION.md, comfy/utils.py `convert_old_quants`).
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpp.core.flow import Noisy
from mpp.lora.adapters import Adapter, adapter_state
from mpp.lora.export import Export, by_program
from mpp.lora.files import merge
from mpp.lora.stack import check_weights, load_base
from mpp.lora.writing import save_lora
from mpp.memory.bases import dequantise, is_quantised, restore
from mpp.memory.scaled import ScaledLinear
from mpp.memory.settings import Memory
from mpp.models.fp8_file import strip_prefix
from tests import helpers
from tests.families import variants
from tests.families.base import architecture

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NAMES = {kind: str(kind).removeprefix("torch.") for kind in FP8}
STYLES = ("older", "marked", "header", "raw")
BY_NAME = {variant.name: variant for variant in variants() if variant.single_file}
TESTED = ("FLUX.1 dev", "WAN 2.1 T2V", "FLUX.2 dev", "Qwen-Image", "Z-Image", "HunyuanVideo T2V", "LTX-2")


def text(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def drawn(state, style: str, seed: int):
    """A state with drawn tensors in fp8, in one style of keys.

    Returns:
        What a file holds, its metadata, and by names what each weight comes to: numbers times scale, in float32.
    """
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    prefix = draw.choice(["", "model.diffusion_model.", "diffusion_model."])
    tensors, layers, true = {}, {}, {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if style == "raw":
            kind = draw.choice(FP8)
            tensors[prefix + name] = tensor.to(kind)
            true[name] = tensor.to(kind).float()
            continue
        fused = re.search("qkv|linear1", layer) is not None
        if layer == name or tensor.ndim < 2 or (draw.random() < 0.3 and not fused):
            tensors[prefix + name] = true[name] = tensor.contiguous()
            continue
        kind, rows = draw.choice(FP8), len(tensor)
        shape = draw.choice([(rows,), (rows, 1)] if fused else [(), (1,), (rows,), (rows, 1)])
        scale = (torch.rand(shape, generator=torch_draw) + 0.1).to(draw.choice([torch.float32, torch.bfloat16]))
        numbers = tensor.to(kind)
        by_row = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
        true[name] = numbers.float() * by_row
        inside = draw.random() < 0.3 and style != "older"
        tensors[prefix + name] = numbers.view(torch.uint8) if inside else numbers
        tensors[f"{prefix}{layer}.{'scale_weight' if style == 'older' else 'weight_scale'}"] = scale
        if draw.random() < 0.5:
            tensors[f"{prefix}{layer}.{'scale_input' if style == 'older' else 'input_scale'}"] = torch.rand(())
        layers[layer] = {"format": NAMES[kind], "full_precision_matrix_mult": True}
    if style == "older":
        tensors[f"{prefix}scaled_fp8"] = torch.empty(draw.choice([0, 2]), dtype=torch.float8_e4m3fn)
        plain = next(name for name, t in tensors.items() if name.endswith(".weight") and t.dtype == torch.float32)
        tensors[plain.replace(".weight", ".scale_weight")] = torch.ones(1)  # as some programs write it
    if style == "marked":
        tensors |= {f"{prefix}{layer}.comfy_quant": text(said) for layer, said in layers.items()}
    said = json.dumps({"format_version": "1.0", "layers": {prefix + k: v for k, v in layers.items()}})
    return tensors, {"_quantization_metadata": said} if style == "header" else None, true


def arch_of(name: str, file: Path, *overrides: str):
    return architecture(BY_NAME[name], file, "model.dtype=bfloat16", *overrides)


def cases():
    """All families in all styles; `make test` has fused layers that are split and swapped, with scales by rows."""
    for seed, (name, style) in enumerate((name, style) for name in TESTED for style in STYLES):
        fast = (name, style) == ("FLUX.1 dev", "marked")
        yield pytest.param(name, style, seed, marks=() if fast else pytest.mark.slow, id=f"{name}-{style}")


@pytest.mark.parametrize(("name", "style", "seed"), list(cases()))
def test_a_weight_is_its_numbers_times_its_scale_to_the_bit(name, style, seed, tmp_path):
    tensors, metadata, true = drawn(BY_NAME[name].single_file()[1], style, seed)
    save_file(tensors, tmp_path / "fp8.safetensors", metadata=metadata)
    save_file({key: t.contiguous() for key, t in true.items()}, tmp_path / "plain.safetensors")
    wanted = load_base(arch_of(name, tmp_path / "plain.safetensors")).state_dict()
    kept = load_base(arch_of(name, tmp_path / "fp8.safetensors"), "fp8")
    found = dict(kept.named_parameters())
    layers = {path: module for path, module in kept.named_modules() if is_quantised(module)}
    assert layers
    found |= {f"{path}.weight": dequantise(module) for path, module in layers.items()}
    assert {path for path in wanted if not torch.equal(wanted[path], found[path])} == set()
    plain = load_base(arch_of(name, tmp_path / "fp8.safetensors")).state_dict()
    assert {path for path in wanted if not torch.equal(wanted[path], plain[path])} == set()


@pytest.fixture
def scaled(tmp_path):
    """A file of WAN in the older style and what it holds."""
    _, state = BY_NAME["WAN 2.1 T2V"].single_file()
    tensors, metadata, _ = drawn(state, "older", 7)
    save_file(tensors, tmp_path / "fp8.safetensors", metadata=metadata)
    return tmp_path / "fp8.safetensors", {strip_prefix(key): tensor for key, tensor in tensors.items()}


def rewritten(file, tensors, metadata=None):
    save_file(tensors, file, metadata=metadata)
    return arch_of("WAN 2.1 T2V", file)


def quantised_name(tensors) -> str:
    return next(key for key, tensor in tensors.items() if tensor.dtype in FP8 and key.endswith(".weight"))


def test_the_gradient_of_a_layers_input_is_that_of_the_dequantised_weight(scaled):
    draw = torch.Generator().manual_seed(0)
    transformer = load_base(arch_of("WAN 2.1 T2V", scaled[0]), "fp8")
    for layer in (module for module in transformer.modules() if isinstance(module, ScaledLinear)):
        given = torch.randn(3, layer.in_features, generator=draw).bfloat16().requires_grad_()
        weight = dequantise(layer)
        output = layer(given)
        assert torch.equal(output, torch.nn.functional.linear(given, weight, layer.bias))
        back = torch.randn(output.shape, generator=draw).bfloat16()
        output.backward(back)
        assert torch.equal(given.grad, back @ weight)


def test_layers_that_an_fp8_file_has_in_full_precision_stay_so(scaled):
    file, tensors = scaled
    kept = load_base(arch_of("WAN 2.1 T2V", file), "fp8")
    blocks = {name for name, t in tensors.items() if name.startswith("blocks.") and t.ndim == 2 and t.dtype in FP8}
    assert sum(is_quantised(module) for module in kept.modules()) == len(blocks)
    assert 0 < len(blocks) < sum(isinstance(m, torch.nn.Linear) for m in kept.blocks.modules())


@pytest.mark.parametrize(
    ("base", "style", "line"),
    [
        ("fp8", "older", "holds float8_e4m3fn and float8_e5m2 (with scales); the blocks keep it, all else is bfloat16"),
        ("bf16", "older", "(with scales); dequantised to bfloat16; memory.base=fp8 keeps it"),
        ("fp8", "raw", "(no scales: raw float8_e4m3fn and float8_e5m2, taken as it is); the blocks keep it"),
    ],
)
def test_what_becomes_of_fp8_is_said(tmp_path, caplog, base, style, line):
    tensors, metadata, _ = drawn(BY_NAME["WAN 2.1 T2V"].single_file()[1], style, 7)
    save_file(tensors, tmp_path / "fp8.safetensors", metadata=metadata)
    with caplog.at_level("INFO", "mpp"):
        load_base(arch_of("WAN 2.1 T2V", tmp_path / "fp8.safetensors"), base)
    assert line in caplog.text


def test_scales_for_some_of_the_weights_alone_are_refused_with_names(scaled):
    file, tensors = scaled
    name = quantised_name(tensors)
    del tensors[name.replace(".weight", ".scale_weight")]
    with pytest.raises(ValueError, match=f"has no scales for some of its fp8 weights.*damaged: {re.escape(name)}$"):
        rewritten(file, tensors).check()


def test_a_marked_file_without_any_scales_is_refused(scaled):
    file, tensors = scaled
    with pytest.raises(ValueError, match="has no scales for some of its fp8 weights"):
        rewritten(file, {key: t for key, t in tensors.items() if "scale_weight" not in key}).check()


@pytest.mark.parametrize("shape", [(2,), (1, 7), (128, 2), (3, 1, 1)])
def test_scales_of_another_shape_are_refused(scaled, shape):
    file, tensors = scaled
    name = quantised_name(tensors)
    tensors[name.replace(".weight", ".scale_weight")] = torch.ones(shape)
    message = rf"neither one number nor one for each output row: {re.escape(name)} \(F32 \[{shape[0]}"
    with pytest.raises(ValueError, match=message):
        rewritten(file, tensors).check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda t, n: {n.replace(".weight", ".comfy_quant"): text({"format": "nvfp4"})}, "in nvfp4, which is not read"),
        (lambda t, n: {n.replace(".weight", ".comfy_quant"): text({})}, "does not say in what format .*'format'"),
        (lambda t, n: {n.replace(".weight", ".comfy_quant"): text([])[:1]}, "does not say in what format"),
        (lambda t, n: {n: torch.zeros(t[n].shape, dtype=torch.int8)}, "in I8, of a quantisation not known here"),
        (lambda t, n: {n: torch.zeros(t[n].shape, dtype=torch.uint8)}, "in U8, of a quantisation not known here"),
        (lambda t, n: {n: torch.zeros(t[n].shape)}, "has scales for weights that are not in fp8"),
        (lambda t, n: {n.replace(".weight", ".weight_scale"): torch.ones(())}, "has two scales for"),
        (lambda t, n: {"no_layer.scale_weight": torch.ones(())}, "has scales of weights that it does not have"),
        (lambda t, n: {"no_layer.comfy_quant": text({"format": NAMES[FP8[0]]})}, "the format of weights that it does"),
        (
            lambda t, n: {
                n: t[n].float().to(FP8[0]),
                n.replace(".weight", ".comfy_quant"): text({"format": NAMES[FP8[1]]}),
            },
            "says another format of weights than it has them in",
        ),
    ],
)
def test_quantisations_that_are_unknown_or_contradict_themselves_are_refused_with_names(scaled, changed, message):
    file, tensors = scaled
    name = quantised_name(tensors)
    new = changed(tensors, name)
    with pytest.raises(ValueError, match=message) as error:
        rewritten(file, {**tensors, **new}).check()
    assert next(iter(new)).rpartition(".")[0] in str(error.value)


def test_a_weight_of_another_shape_than_the_layer_is_refused(scaled):
    file, tensors = scaled
    name = next(n for n, t in tensors.items() if n.startswith("blocks.1.ffn") and t.dtype in FP8)
    rows, columns = tensors[name].shape
    tensors |= {name: torch.ones(rows, columns + 8).to(FP8[0]), name.replace("weight", "scale_weight"): torch.ones(())}
    message = rf"has blocks.1.ffn\S+ in the shape \[{rows}, {columns + 8}\], the model in \[{rows}, {columns}\]"
    with pytest.raises(ValueError, match=message):
        load_base(rewritten(file, tensors), "fp8")


def test_fp8_files_are_not_quantised_a_second_time(scaled):
    for base in ("int8", "nf4"):
        with pytest.raises(ValueError, match=f"memory.base={base} would round the fp8 weights .* a second time"):
            check_weights(arch_of("WAN 2.1 T2V", scaled[0]), base)
    with pytest.raises(ValueError, match=r"memory.base=gguf keeps GGUF files .* set model.pretrained to a .gguf"):
        check_weights(arch_of("WAN 2.1 T2V", scaled[0]), "gguf")


def test_student_equals_teacher_to_the_bit_at_the_start(scaled):
    module = helpers.module(arch_of("WAN 2.1 T2V", scaled[0]), memory=Memory("fp8"))
    assert any(is_quantised(layer) for layer in module.transformer.modules())
    masks = torch.ones(2, 1, 1, 8, 8)
    masks[..., 4:] = 0
    data = helpers.batch(masks)
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = Noisy(noise, torch.tensor([0.5, 0.9]), noise - data.latents)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        student, teacher = helpers.student_of(module, noisy, data), helpers.teacher_of(module, noisy, data)
    assert torch.equal(student, teacher)


@pytest.fixture
def lora(scaled, tmp_path):
    """The file of a drawn LoRA of four layers of a block."""
    targets = r"blocks\.0\.(attn1\.to_[qkv]|ffn\.net\.2)"
    module = helpers.module(arch_of("WAN 2.1 T2V", scaled[0]), adapter=Adapter(rank=2, targets=targets))
    helpers.randomise_adapter(module.transformer, 0.3)
    (path,) = save_lora(tmp_path / "l.safetensors", module.transformer, adapter_state(module.transformer), {})
    return path


@pytest.mark.slow
def test_loras_of_the_base_are_merged_into_the_layers_that_they_change_and_no_others(scaled, lora, caplog):
    file, path = scaled[0], lora
    before = load_base(arch_of("WAN 2.1 T2V", file), "fp8")
    with caplog.at_level("INFO", "mpp"):
        after = load_base(arch_of("WAN 2.1 T2V", file, f"model.loras=[{path}]"), "fp8")
    factors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    changed = {key.removesuffix(".lora_A.weight") for key in factors if "lora_A" in key}
    quantised = [name for name in changed if is_quantised(before.get_submodule(name))]
    assert f"model.loras: {len(quantised)} layers in fp8 were dequantised, changed, and quantised again" in caplog.text
    for name, layer in before.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        old, new = dequantise(layer), dequantise(after.get_submodule(name))
        if name not in changed:
            assert torch.equal(old, new)
            continue
        wanted = old.float() + factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        largest = wanted.abs().amax(dim=1, keepdim=True)
        assert not torch.equal(old, new)
        assert (
            (new.float() - wanted).abs() <= wanted.abs() / 12 + largest / 2**15
        ).all()  # e4m3 has 3 bits, twice bf16
        assert is_quantised(after.get_submodule(name)) == (name in quantised)


@pytest.mark.slow
def test_a_model_merged_from_fp8_is_the_dequantised_one_with_the_lora(scaled, lora, tmp_path):
    file, path = scaled[0], lora
    (folder,) = Export(lora=str(path), merge=True, output=str(tmp_path / "merged")).run(arch_of("WAN 2.1 T2V", file))
    wanted = load_base(arch_of("WAN 2.1 T2V", file, f"model.loras=[{path}]")).state_dict()
    found = load_base(arch_of("WAN 2.1 T2V", folder)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(
        ValueError, match="has quantised weights \\(fp8\\), into which nothing is merged; give the bf16"
    ):
        Export(lora=str(path), merge=True, format="original").run(arch_of("WAN 2.1 T2V", file))


def test_no_lora_is_merged_into_quantised_weights(scaled):
    module = helpers.module(arch_of("WAN 2.1 T2V", scaled[0]), memory=Memory("fp8"))
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        merge(module.transformer)


@pytest.mark.slow
def test_what_a_dora_says_to_other_programs_counts_by_the_dequantised_weights(tmp_path):
    tensors, metadata, _ = drawn(BY_NAME["FLUX.1 dev"].single_file()[1], "header", 3)  # whose layers are fused again
    save_file(tensors, tmp_path / "fp8.safetensors", metadata=metadata)
    arch = arch_of("FLUX.1 dev", tmp_path / "fp8.safetensors")
    module = helpers.module(arch, memory=Memory("fp8"), adapter=Adapter(rank=2, kind="dora"))
    helpers.randomise_adapter(module.transformer, 0.3)
    said = by_program("comfyui", module.transformer, adapter_state(module.transformer), arch)
    restore(module.transformer, [name for name, _ in list(module.transformer.named_modules()) if "base_layer" in name])
    plain = by_program("comfyui", module.transformer, adapter_state(module.transformer), arch)
    assert said.keys() == plain.keys()
    assert all(torch.equal(said[name], plain[name]) for name in said)
