"""Files for other programs that training writes beside each LoRA."""

import random

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from mpp.lora.adapters import Adapter
from mpp.lora.export import Export
from mpp.lora.exports import Exports
from tests.families import wan_first
from tests.families.base import architecture as architecture_of
from tests.helpers import train


def held(file):
    with safe_open(file, "pt") as handle:
        return handle.metadata(), {name: tensor.tolist() for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))])
def test_each_file_is_what_mpp_export_makes_of_the_lora_beside_it(pipeline, prepared, architecture, tmp_path, seed):
    draw = random.Random(seed)
    formats = draw.sample(["comfyui", "kohya"], draw.randint(1, 2))
    rank, alpha = draw.randint(1, 6), draw.randint(1, 9)
    kind = draw.choice(["lora", "rslora", "lokr", "loha", *(["dora"] if formats == ["comfyui"] else [])])
    words = [f"lora={kind}", f"lora.rank={rank}", f"lora.alpha={alpha}", f"export.formats=[{','.join(formats)}]"]
    train(pipeline, prepared, tmp_path / "run", "trainer.max_steps=2", "callbacks.checkpoints.every_n_steps=1", *words)
    names = {"lora.safetensors", *(f"lora_{format}.safetensors" for format in formats)}
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == names
    for lora in [tmp_path / "run" / "lora.safetensors", *(tmp_path / "run" / "lora").glob("step-00000?.safetensors")]:
        for format in formats:
            found = lora.with_stem(f"{lora.stem}_{format}")
            wanted = tmp_path / f"{found.parent.name}_{found.name}"
            Export(lora=str(lora), format=format, output=str(wanted)).run(architecture)
            assert held(found) == held(wanted)


def test_what_a_format_cannot_say_is_left_out_and_said_or_refused_where_it_is_asked_for(
    pipeline, prepared, tmp_path, caplog, monkeypatch
):
    unlike = ["lora.targets=[to_q,patch_embedding]"]  # a convolution, which is no layer of LoRA files
    train(pipeline, prepared, tmp_path / "run", *unlike, "trainer.max_steps=1")
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == ["lora.safetensors"]
    assert "there will be no LoRA file for ComfyUI: 1 modules have no known name" in caplog.text
    monkeypatch.setattr("mpp.models.family.Family.load_transformer", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"export.formats: kohya: this is a DoRA.*merge=true"):
        train(pipeline, prepared, tmp_path / "other", "lora=dora", "export.formats=[kohya]")
    with pytest.raises(ValueError, match=r"export.formats should be 'comfyui' or 'kohya', got \['peft'\]"):
        train(pipeline, prepared, tmp_path / "other", "export.formats=[peft]")
    assert not (tmp_path / "other").exists()


def test_nothing_is_written_where_nothing_is_asked_for(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "export.formats=[]", "trainer.max_steps=1")
    assert [path.name for path in tmp_path.rglob("*.safetensors") if "comfyui" in path.name] == []


@pytest.mark.parametrize("variant", wan_first())
def test_every_family_says_its_default_targets_to_both_programs(variant, built):
    arch = architecture_of(variant, built(variant))
    assert Exports(["comfyui", "kohya"]).chosen(arch, Adapter(rank=2)) == (("comfyui", "kohya"), ())


@pytest.mark.slow
@pytest.mark.parametrize("variant", wan_first())
def test_every_family_says_a_loha_to_both_programs(variant, built):
    arch = architecture_of(variant, built(variant))
    assert Exports(["comfyui", "kohya"]).chosen(arch, Adapter(kind="loha", rank=2)) == (("comfyui", "kohya"), ())


@pytest.mark.parametrize("variant", wan_first())
def test_a_dora_is_said_to_comfyui_alone(variant, built):
    arch = architecture_of(variant, built(variant))
    assert Exports().chosen(arch, Adapter(kind="dora", rank=2)) == (("comfyui",), ())
    with pytest.raises(ValueError, match="kohya's tools do not read"):
        Exports(["kohya"]).chosen(arch, Adapter(kind="dora", rank=2))


@pytest.mark.parametrize("variant", wan_first())
def test_a_lokr_is_said_wherever_the_program_has_its_layers_apart(variant, built):
    arch = architecture_of(variant, built(variant))
    formats, left_out = Exports().chosen(arch, Adapter(kind="lokr", rank=2))
    fused = arch.family.startswith("hunyuan_video")
    assert formats == (() if fused else ("comfyui",))
    assert bool(left_out) == fused
