"""LoRAs over a base: several at strengths in samples, and those that are a part of it, below what is trained."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mpp.sample
from mpp.lora.adapters import Adapter, adapter_state, adapters_off, inject
from mpp.lora.stack import Stack, base_fingerprint, check_loras, load_base
from mpp.models.experts import parts_of
from mpp.models.families.wan import Wan
from tests.helpers import architecture as tiny
from tests.helpers import config, logged, randomise_adapter, train
from tests.lora import foreign
from tests.lora.test_export import predict


@pytest.fixture(scope="module")
def layers(pipeline):
    """Layers of the tiny WAN by diffusers' names."""
    model = tiny(pipeline).skeleton()
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("to_q", "to_out.0", "net.2"))}


def files(folder, layers, count, draws):
    """LoRAs of some of the layers each, in different forms; their factors by file."""
    made = {}
    for number in range(count):
        names = foreign.drawn({n: layers[n] for n in draws.sample(sorted(layers), 3)}, seed=draws.randrange(1000))
        path = folder / f"lora {number}.safetensors"
        form = draws.choice(["diffusers", "diffusers with alpha", "ComfyUI", "OneTrainer", "PEFT's names"])
        save_file({n: t.contiguous() for n, t in foreign.FORMS[form](names).items()}, path)
        made[path] = names
    return made


def changed(model, made, strengths):
    """The model with each update added to its weights, in float64."""
    for (_, names), strength in zip(made.items(), strengths, strict=True):
        for name, (down, up, scale) in names.items():
            weight = model.get_submodule(name).weight
            weight.data = (weight.data.double() + strength * scale * (up.double() @ down.double())).float()
    return model


@pytest.mark.parametrize("seed", range(4))
def test_loras_at_strengths_add_up_and_are_off_together(pipeline, layers, tmp_path, seed):
    draws, arch = random.Random(seed), tiny(pipeline)
    made = files(tmp_path, layers, draws.randint(1, 3), draws)
    strengths = [draws.choice([1.0, draws.uniform(-2, 2)]) for _ in made]
    entries = [str(path) if s == 1 else f"{path}:{s}" for path, s in zip(made, strengths, strict=True)]
    model = arch.load_transformer()
    base = predict(arch, model)
    stack = Stack.read(entries, arch, dict(parts_of(arch.skeleton())))
    stack.attach(dict(parts_of(model)))
    wanted = predict(arch, changed(arch.load_transformer(), made, strengths))
    torch.testing.assert_close(predict(arch, model), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-3
    with adapters_off(model):
        assert torch.equal(predict(arch, model), base)


@pytest.mark.parametrize("seed", range(4))
def test_loras_of_the_base_are_in_its_weights_whatever_is_trained_on_top(pipeline, layers, tmp_path, seed):
    draws = random.Random(seed)
    made = files(tmp_path, layers, draws.randint(1, 3), draws)
    strengths = [draws.uniform(-2, 2) for _ in made]
    arch = tiny(pipeline)
    arch.loras = tuple(f"{path}:{s}" for path, s in zip(made, strengths, strict=True))
    check_loras(arch)
    model = load_base(arch)
    wanted = changed(tiny(pipeline).load_transformer(), made, strengths)
    state = model.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    inject(model, Adapter(rank=2), arch.lora_targets, seed=0)
    randomise_adapter(model, 0.2)
    with adapters_off(model):
        torch.testing.assert_close(predict(arch, model), predict(arch, wanted), rtol=1e-4, atol=1e-5)


def test_the_base_is_another_with_other_loras_strengths_or_order(pipeline, layers, tmp_path):
    made = [str(path) for path in files(tmp_path, layers, 2, random.Random(0))]
    seen = set()
    for loras in ([], made[:1], made[1:], made, made[::-1], [f"{made[0]}:0.5"]):
        arch = tiny(pipeline)
        arch.loras = tuple(loras)
        seen.add(base_fingerprint(arch))
    assert len(seen) == 6
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "lora 0.safetensors").read_bytes())
    arch.loras = (f"{moved}:0.5",)
    assert base_fingerprint(arch) in seen  # by what they hold, not by their names


def test_whole_differences_of_weights_belong_to_a_base_alone(pipeline, tmp_path):
    arch, path = tiny(pipeline), tmp_path / "turbo.safetensors"
    model = arch.load_transformer()
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.randn(2, 64),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.randn(64, 2),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(64),
        "diffusion_model.blocks.0.self_attn.norm_k.diff": torch.randn(64),
        "diffusion_model.blocks.1.ffn.0.diff_b": torch.randn(len(model.blocks[1].ffn.net[0].proj.bias)),
    }
    save_file(tensors, path)
    arch.loras = (f"{path}:0.5",)
    check_loras(arch)
    got, base = load_base(arch), tiny(pipeline).load_transformer()
    pairs = {
        "self_attn.q.diff_b": lambda m: m.blocks[0].attn1.to_q.bias,
        "ffn.0.diff_b": lambda m: m.blocks[1].ffn.net[0].proj.bias,
        "norm_k.diff": lambda m: m.blocks[0].attn1.norm_k.weight,
    }
    for name, of in pairs.items():
        difference = next(t for key, t in tensors.items() if key.endswith(name))
        torch.testing.assert_close(of(got), of(base) + 0.5 * difference)
    with pytest.raises(ValueError, match=r"turbo.*differences of 3 whole weights.*model.loras=\[FILE\]"):
        Stack.read(str(path), arch, dict(parts_of(arch.skeleton()))).attach(dict(parts_of(arch.skeleton())))


@pytest.mark.slow
def test_teacher_and_student_have_the_bases_loras_and_the_file_has_not(pipeline, prepared, layers, tmp_path, capsys):
    made = files(tmp_path, layers, 2, random.Random(1))
    loras = f"model.loras=[{', '.join(f'{path}:{n}' for path, n in zip(made, (1.0, -0.7), strict=True))}]"
    short = ("optimizer.lr=0.01", "trainer.max_steps=3", "data.batch_size=1")
    _, module = train(pipeline, prepared, tmp_path / "run", loras, *short)
    first = next(row for row in logged(tmp_path / "run") if "train/prior_loss" in row)
    assert first["train/prior_loss"] == 0  # at the first step the student is the teacher
    assert first["train/loss"] > 0
    written = load_file(tmp_path / "run" / "lora.safetensors")
    assert {n.removeprefix("transformer.") for n in written} == set(adapter_state(module.transformer))
    alone = train(pipeline, prepared, tmp_path / "alone", *short)[1]
    assert module.record()["base"] != alone.record()["base"]
    on = (
        "optimizer.lr=0.01",
        "trainer.max_steps=4",
        "data.batch_size=1",
        f"resume={tmp_path / 'run'}",
        "logger.csv.version=2",
    )
    with pytest.raises(ValueError, match="another base model"):
        train(pipeline, prepared, tmp_path / "run", *on, "model.loras=[]")
    train(pipeline, prepared, tmp_path / "run", *on, loras)
    capsys.readouterr()


def test_a_lora_of_the_base_that_does_not_fit_ends_the_start_before_anything_loads(
    pipeline, prepared, tmp_path, monkeypatch
):
    save_file({"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(Wan, "load_transformer", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"x.safetensors does not fit this WanTransformer3DModel: it lacks 1 of the 1"):
        train(pipeline, prepared, tmp_path / "run", f"model.loras={tmp_path / 'x.safetensors'}")


@pytest.mark.slow
def test_the_command_samples_several_loras_at_strengths(pipeline, layers, tmp_path):
    made = files(tmp_path, layers, 2, random.Random(2))
    words = ["model=tiny_wan", f"model.pretrained={pipeline}", "device=cpu", "sampling.prompts=[a]"]
    words += ["sampling.width=64", "sampling.height=48", "sampling.steps=1"]
    first, second = made
    sheets = []
    for lora in (
        f"lora=[{first}:9, {second}:-7]",
        f"lora=[{second}:-7,{first}:9]",
        f"lora={first}:9",
        f"lora={first}",
    ):
        written = mpp.sample.run(config("sample", [*words, lora, f"output_dir={tmp_path / str(len(sheets))}"]))
        (file,) = [path for path in written if path.stem.endswith("_lora")]
        sheets.append(np.asarray(Image.open(file).convert("RGB")).astype(int))
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    for sheet in sheets[2:]:
        assert np.abs(sheet - sheets[0]).max() > 1
    assert np.abs(sheets[2] - sheets[3]).max() > 1
