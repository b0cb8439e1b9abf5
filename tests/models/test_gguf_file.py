"""GGUF files: written by the package gguf, whose own unpacking is the witness of what diffusers makes of them."""

import random

import pytest
import torch
from safetensors.torch import save_file

from mpp.core.flow import Noisy
from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.lora.export import Export
from mpp.lora.stack import Stack, check_weights, load_base
from mpp.lora.writing import save_lora
from mpp.memory.bases import check_base, dequantise, is_quantised, restore
from mpp.memory.settings import Memory
from tests import helpers
from tests.models.test_fp8_file import BY_NAME, arch_of

gguf = pytest.importorskip("gguf")

TYPES = ("Q8_0", "Q5_1", "Q4_0", "BF16", "F16")
TESTED = ("WAN 2.1 T2V", "FLUX.1 dev", "FLUX.2 dev", "Qwen-Image", "Z-Image", "HunyuanVideo T2V", "LTX-2")


def write(state, file, seed=0):
    """Write a state with drawn types; what its tensors come to by the package's own unpacking, in float32."""
    draw, true = random.Random(seed), {}
    writer = gguf.GGUFWriter(str(file), "none")
    for name, tensor in state.items():
        array, type = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            type = gguf.GGMLQuantizationType[draw.choice(TYPES)]
        packed = gguf.quants.quantize(array, type)
        writer.add_tensor(name, packed, raw_dtype=type)
        true[name] = torch.from_numpy(gguf.quants.dequantize(packed, type).reshape(array.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return true


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "WAN 2.1 T2V" else pytest.mark.slow, id=n) for n in TESTED]
)
def test_a_gguf_file_comes_to_what_its_own_package_unpacks(name, tmp_path):
    true = write(BY_NAME[name].single_file()[1], tmp_path / "model.gguf")
    save_file(true, tmp_path / "plain.safetensors")
    arch = arch_of(name, tmp_path / "model.gguf")
    arch.check()
    wanted = load_base(arch_of(name, tmp_path / "plain.safetensors", "model.dtype=float32")).state_dict()
    kept = load_base(arch, "gguf")
    found = dict(kept.named_parameters())
    layers = {path: module for path, module in kept.named_modules() if is_quantised(module)}
    inside = tuple(f"{path}." for path, _ in arch.blocks(kept))
    assert all(path.startswith(inside) for path in layers)
    assert layers
    found |= {f"{path}.weight": dequantise(module) for path, module in layers.items()}
    assert found.keys() == wanted.keys()
    for path, tensor in found.items():  # diffusers unpacks some types in float16, and rounds to bfloat16 after
        torch.testing.assert_close(tensor.float(), wanted[path].float(), rtol=2**-8 + 2**-9, atol=2e-3, msg=path)


def restored(transformer):
    """The transformer with plain layers instead of packed ones."""
    assert restore(transformer, [name for name, m in list(transformer.named_modules()) if is_quantised(m)])
    return transformer


@pytest.fixture
def file(tmp_path):
    """A GGUF file of WAN."""
    write(BY_NAME["WAN 2.1 T2V"].single_file()[1], tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def lora_of(arch, folder, kind="lora"):
    """A LoRA file for a model."""
    skeleton = restored(load_base(arch, "gguf"))
    inject(skeleton, Adapter(rank=2, kind=kind), arch.lora_targets, seed=0)
    return save_lora(folder / f"{kind}.safetensors", skeleton, adapter_state(skeleton), {})[0]


@pytest.mark.slow
def test_a_lora_learns_on_a_gguf_base_as_on_the_unpacked_one(file):
    masks = torch.ones(2, 1, 1, 8, 8)
    masks[..., 4:] = 0
    data = helpers.batch(masks)
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = Noisy(noise, torch.tensor([0.5, 0.9]), noise - data.latents)
    for kind in ("lora", "rslora", "dora"):
        module = helpers.module(arch_of("WAN 2.1 T2V", file), memory=Memory("gguf"), adapter=Adapter(kind=kind))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            if kind != "dora":  # whose norms are rounded to the weight's bfloat16
                assert torch.equal(helpers.student_of(module, noisy, data), helpers.teacher_of(module, noisy, data))
        helpers.randomise_adapter(module.transformer)
        packed = gradients(module, noisy, data)
        restored(module.transformer)
        plain = gradients(module, noisy, data)
        assert all(gradient.abs().sum() > 0 for gradient in packed.values())
        assert all(torch.equal(gradient, plain[name]) for name, gradient in packed.items())


def gradients(module, noisy, data):
    """Of what is trained, for one batch."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        helpers.student_of(module, noisy, data).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def test_a_gguf_base_says_so_and_nothing_else_does(file, tmp_path):
    arch = arch_of("WAN 2.1 T2V", file)
    for base in ("bf16", "fp8", "int8", "nf4"):
        with pytest.raises(ValueError, match=rf"is a GGUF file.*say so by memory.base=gguf \(got memory.base={base}\)"):
            check_weights(arch, base)
    check_weights(arch, "gguf")
    save_file(BY_NAME["WAN 2.1 T2V"].single_file()[1], tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"memory.base=gguf keeps GGUF files .* set model.pretrained to a .gguf"):
        check_weights(arch_of("WAN 2.1 T2V", tmp_path / "plain.safetensors"), "gguf")
    with pytest.raises(ValueError, match=r"model.loras cannot be merged into a GGUF file, got some.safetensors"):
        check_weights(arch_of("WAN 2.1 T2V", file, "model.loras=[some.safetensors]"), "gguf")


def test_what_a_gguf_base_cannot_do_is_refused_before_it_is_loaded(file, tmp_path):
    arch = arch_of("WAN 2.1 T2V", file)
    with pytest.raises(ValueError, match="compile=true does not go with memory.base=gguf"):
        helpers.module(arch, memory=Memory("gguf"), compile_blocks=True)
    for kind in ("lokr", "loha"):
        with pytest.raises(ValueError, match=f"memory.base=gguf does not go with lora={kind}"):
            helpers.module(arch, memory=Memory("gguf"), adapter=Adapter(kind=kind))
    lora = str(lora_of(arch, tmp_path))
    skeleton = {"": arch.skeleton()}
    Stack.read(lora, arch, skeleton).check_kinds("gguf")
    with pytest.raises(ValueError, match=r"memory.base=gguf does not go with lora=.*, a lokr, which PEFT shapes"):
        Stack.read(str(lora_of(arch, tmp_path, "lokr")), arch, skeleton).check_kinds("gguf")
    for format in (None, "original"):
        with pytest.raises(ValueError, match=r"has quantised weights \(gguf\), into which nothing is merged"):
            Export(lora=lora, merge=True, format=format).run(arch)


def test_damaged_and_foreign_gguf_files_are_refused_in_one_line(file, tmp_path):
    whole = file.read_bytes()
    draw = random.Random(5)
    for _ in range(6):
        file.write_bytes(whole[: draw.randrange(len(whole) - 64)])
        with pytest.raises(ValueError, match=r"model.pretrained=.*is not a complete .gguf file"):
            arch_of("WAN 2.1 T2V", file).check()
    writer = gguf.GGUFWriter(str(file), "none")
    writer.add_tensor(
        "blocks.0.ffn.0.weight",
        torch.zeros(4, 54, dtype=torch.uint8).numpy(),
        raw_dtype=gguf.GGMLQuantizationType.TQ1_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"weights in TQ1_0, which diffusers cannot unpack .* blocks.0.ffn.0.weight$"):
        arch_of("WAN 2.1 T2V", file).check()


def test_without_the_package_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"memory.base=gguf needs the package gguf; pip install 'mpp\[gguf\]'"):
        check_base("gguf", "memory.base")
