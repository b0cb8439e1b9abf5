"""Runs on quantised bases: LoRAs of the base, resumes, samples, files, merges."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mpp.export
import mpp.sample
from mpp.lora.adapters import adapters_off
from mpp.lora.stack import load_base
from mpp.memory.bases import QUANTISED, is_quantised, quantise
from mpp.memory.settings import Memory
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import Adapter, config, draw_photos, module, prepare, randomise_adapter, train
from tests.helpers import architecture as tiny
from tests.lora import foreign
from tests.training.test_chains import assert_equal_runs

ALPHA = "lora.alpha=4"  # no scale is folded into the files


@pytest.mark.parametrize("base", ["nf4", *(pytest.param(b, marks=pytest.mark.slow) for b in ("fp8", "int8"))])
def test_loras_of_the_base_are_merged_before_it_is_quantised(pipeline, tmp_path, base):
    draw, arch = random.Random(base), tiny(pipeline)
    skeleton = arch.skeleton()
    sizes = {name: tuple(m.weight.shape) for name, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = draw.sample([name for name, _ in arch.quantisable(skeleton)], 4)
    outside = draw.sample(sorted(set(sizes) - {name for name, _ in arch.quantisable(skeleton)}), 2)
    for number, names in enumerate((inside, [*inside[:1], *outside])):
        factors = foreign.drawn({name: sizes[name] for name in names}, seed=number)
        save_file(foreign.FORMS["diffusers with alpha"](factors), tmp_path / f"{number}.safetensors")
    save_file({f"diffusion_model.{inside[1]}.diff_b": torch.randn(sizes[inside[1]][0])}, tmp_path / "2.safetensors")
    arch.loras = [f"{tmp_path / '0.safetensors'}:0.7", f"{tmp_path / '1.safetensors'}:-1.2"]
    wanted, found = load_base(arch), load_base(arch, base)
    assert all(is_quantised(found.get_submodule(name)) for name in inside)
    quantise(wanted, [name for name, _ in arch.quantisable(wanted)], base)
    assert wanted.state_dict().keys() == found.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert not any("lora" in name for name, _ in found.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTISED)
def test_a_resumed_run_is_the_one_that_never_stopped(pipeline, prepared, tmp_path, base):
    draw = random.Random(base)
    settings = [f"memory.base={base}", ALPHA, f"lora={'loha' if base == 'int8' else draw.choice(['lora', 'dora'])}"]
    steps = draw.randint(3, 6)
    stop = draw.randint(1, steps - 1)
    train(
        pipeline, prepared, tmp_path / "whole", *settings, f"trainer.max_steps={steps}", "logger.csv.version=csv/part0"
    )
    train(
        pipeline, prepared, tmp_path / "parts", *settings, f"trainer.max_steps={stop}", "logger.csv.version=csv/part0"
    )
    more = [f"trainer.max_steps={steps}", f"resume={tmp_path / 'parts'}", "logger.csv.version=csv/part1"]
    train(pipeline, prepared, tmp_path / "parts", *more)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    for other in {"bf16", *QUANTISED} - {base}:
        with pytest.raises(ValueError, match=f"memory.base: {base} -> {other}"):
            train(pipeline, prepared, tmp_path / "parts", *more, f"memory.base={other}")


def test_file_checkpoint_and_log_say_which_base_the_adapter_learned_on(pipeline, prepared, tmp_path, caplog):
    caplog.set_level("INFO", "mpp")
    train(pipeline, prepared, tmp_path, "memory.base=int8", "trainer.max_steps=1", ALPHA)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["mpp"]["config"]["memory"]["base"] == "int8"
    with safe_open(tmp_path / "lora.safetensors", "pt") as handle:
        assert json.loads(handle.metadata()["mpp"])["config"]["memory"]["base"] == "int8"
    assert "149.2 k parameters, float32, linear layers of its blocks in int8" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTISED)
def test_what_training_generates_is_what_sampling_generates_on_that_base(pipeline, tmp_path, base):
    draw_photos(tmp_path / "photos", tmp_path / "masks")
    size = ["sampling.width=48", "sampling.height=32", "sampling.steps=2", "sampling.prompts=[a box]"]
    prepare(pipeline, tmp_path, *size)
    run, on = tmp_path / "run", [f"memory.base={base}", "data.val_fraction=0.25", "optimizer.lr=0.05", ALPHA]
    train(pipeline, tmp_path / "cache", run, *on, *size, "callbacks.samples.every_n_steps=4", "data.batch_size=1")
    cfg = [
        "model=tiny_wan", f"model.pretrained={pipeline}", f"lora={run}", f"output_dir={tmp_path / 'out'}",
        f"memory.base={base}", "device=cpu", *size,
    ]  # fmt: skip
    file = next(path for path in mpp.sample.run(config("sample", cfg)) if path.name.endswith("_lora.png"))
    (own,) = (run / "samples").glob("*4/*_lora.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (file, own))
    assert np.abs(ours - theirs).max() <= 1
    (plain,) = (run / "samples").glob("*4/*_base.png")
    assert np.abs(np.asarray(Image.open(plain)).astype(int) - theirs).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTISED)
def test_a_lora_is_merged_into_the_unquantised_base(pipeline, prepared, tmp_path, base):
    train(pipeline, prepared, tmp_path / "run", f"memory.base={base}", ALPHA, "optimizer.lr=0.05")
    words = ["model=tiny_wan", f"model.pretrained={pipeline}", f"lora={tmp_path / 'run'}", "merge=true"]
    (merged,) = mpp.export.run(config("export", words))
    state = load_file(merged / "transformer" / "diffusion_pytorch_model.safetensors")
    plain, lora = tiny(pipeline).load_transformer().state_dict(), load_file(tmp_path / "run" / "lora.safetensors")
    changed = 0
    for name, weight in plain.items():
        factors = [lora.get(f"transformer.{name.removesuffix('.weight')}.lora_{f}.weight") for f in "BA"]
        wanted = weight if None in factors else (weight.double() + factors[0].double() @ factors[1].double()).float()
        changed += None not in factors
        torch.testing.assert_close(state[name], wanted, rtol=1e-5, atol=1e-6)
    assert changed == 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("base", [b if b == "nf4" else pytest.param(b, marks=pytest.mark.draws) for b in QUANTISED])
def test_compiled_blocks_train_as_those_that_are_not(pipeline, prepared, tmp_path, base):
    ends = []
    torch.compiler.reset()  # which counts the compilations of a block, whatever model it belongs to
    for compiled in ("false", "true"):
        settings = [f"memory.base={base}", f"compile={compiled}", ALPHA, "trainer.max_steps=2"]
        _, module = train(pipeline, prepared, tmp_path / compiled, *settings)
        ends.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
    assert [n.replace("._orig_mod", "") for n in ends[1]] == list(ends[0])
    for one, two in zip(*(end.values() for end in ends), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-4)  # Adam makes whole steps of differences in rounding


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_nf4_refuses_adapters_that_are_shaped_after_its_packed_weight(pipeline, prepared, tmp_path, kind):
    with pytest.raises(ValueError, match=rf"memory\.base=nf4 does not go with lora={kind}.*fp8 or int8"):
        train(pipeline, prepared, tmp_path, "memory.base=nf4", f"lora={kind}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", QUANTISED)
def test_the_teacher_is_the_quantised_base(architecture, base):
    built = module(architecture, memory=Memory(base=base), adapter=Adapter(rank=2))
    randomise_adapter(built.transformer)
    layer = built.transformer.blocks[0].attn1.to_q
    inputs = torch.randn(2, layer.in_features)
    with adapters_off(built.transformer):
        assert torch.equal(layer(inputs), layer.get_base_layer()(inputs))
    assert not torch.equal(layer(inputs), layer.get_base_layer()(inputs))
