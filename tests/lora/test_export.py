"""`python -m mpp.export`: the entry, merged models, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mpp.export
import mpp.lora.export
from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.lora.export import Export
from mpp.lora.metadata import Metadata
from mpp.lora.writing import save_lora
from mpp.models.contract import Generation
from mpp.models.experts import parts_of
from tests.families import wan_first
from tests.families.base import architecture as of_variant
from tests.helpers import architecture as tiny
from tests.helpers import config, randomise_adapter, train

KINDS = ["lora", "rslora", "dora", "lokr", "loha"]


def trained(arch, folder, *, transformer=None, record=None, **settings):
    """A transformer with a random adapter, and its LoRA in a folder."""
    transformer = arch.load_transformer() if transformer is None else transformer
    inject(transformer, Adapter(**{"rank": 4, "alpha": 7, **settings}), arch.lora_targets, seed=0)
    randomise_adapter(transformer, 0.2)
    save_lora(folder / "lora.safetensors", transformer, adapter_state(transformer), record or {})
    return transformer


def merged_by_peft(transformer):
    """State of each transformer after PEFT's merge, by diffusers' own method."""
    for _, model in parts_of(transformer):
        model.fuse_lora()
        model.unload_lora()
    return {part: model.state_dict() for part, model in parts_of(transformer)}


@torch.no_grad()
def predict(arch, transformer, seed=0):
    random = torch.Generator().manual_seed(seed)
    noisy, text = torch.randn(2, 16, 1, 8, 8, generator=random), torch.randn(2, 64, 32, generator=random)
    return arch.velocity(transformer.eval(), noisy, torch.tensor([0.3, 0.95]), arch.conditioning(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_as_the_adapter_did_and_is_a_whole_pipeline(pipeline, tmp_path, kind):
    arch = tiny(pipeline)
    model = trained(arch, tmp_path, kind=kind)
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    assert folder == tmp_path / "lora_merged"
    merged = tiny(folder)
    merged.check()
    assert merged.skeleton().state_dict().keys() == arch.skeleton().state_dict().keys()
    torch.testing.assert_close(predict(merged, merged.load_transformer()), predict(arch, model), rtol=1e-4, atol=1e-5)
    assert (predict(arch, model) - predict(arch, arch.load_transformer())).abs().max() > 1e-2
    assert {p.name for p in folder.iterdir()} == {p.name for p in Path(pipeline).iterdir()} | {"mpp_export.json"}
    encoders = merged.load_encoders("cpu")
    generation = Generation(width=32, height=32, frames=1, steps=1, guidance_scale=1.0, seed=0)
    text = merged.collate([merged.conditioning(torch.randn(3, 32))])
    assert torch.isfinite(merged.generate(merged.load_transformer(), encoders, text, None, generation)).all()
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("variant", wan_first())
def test_every_variant_merges_as_peft_does(variant, built, tmp_path):
    source = built(variant)
    arch = of_variant(variant, source)
    expected = merged_by_peft(trained(arch, tmp_path))
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    merged = of_variant(variant, folder)
    merged.check()
    for part, model in parts_of(merged.load_transformer()):
        state = model.state_dict()
        assert state.keys() == expected[part].keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[part][name], rtol=1e-5, atol=1e-6)
    assert {p.name for p in source.iterdir()} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_bf16_rounds_once(pipeline, tmp_path, kind):
    arch = tiny(pipeline, "model.dtype=bfloat16")
    base = arch.load_transformer()
    exact = merged_by_peft(trained(arch, tmp_path, transformer=arch.load_transformer().float(), kind=kind))[""]
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    (file,) = (folder / "transformer").glob("*.safetensors")
    for name, tensor in load_file(file).items():
        assert tensor.dtype == base.state_dict()[name].dtype, name
        wanted = exact[name].to(tensor.dtype)
        assert torch.equal(tensor, wanted), name


def experts(pipeline, folder):
    """An architecture of two transformers, as the contract has them."""
    shutil.copytree(pipeline, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    low = tiny(folder)
    model = low.load_transformer()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    model.save_pretrained(folder / "transformer_2")
    return tiny(folder, "model.expert=both")


def test_each_expert_gets_its_file_and_its_folder(pipeline, tmp_path):
    two = experts(pipeline, tmp_path / "pipeline")
    expected = merged_by_peft(trained(two, tmp_path / "run", record={"steps": 1}))
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {"lora_low.safetensors", "lora_high.safetensors"}
    written = Export(lora=str(run), format="comfyui").run(two)
    assert [p.name for p in written] == ["lora_low_comfyui.safetensors", "lora_high_comfyui.safetensors"]
    written = Export(lora=str(run), format="peft", output=str(tmp_path / "out")).run(two)
    assert [p.name for p in written] == ["out_low", "out_high"]
    (one,) = Export(lora=str(run / "lora_high.safetensors"), format="kohya").run(two)
    assert one.name == "lora_high_kohya.safetensors"
    (folder,) = Export(lora=str(run), merge=True).run(two)
    for part, name in {"low": "transformer_2", "high": "transformer"}.items():
        for key, tensor in tiny(folder).load_part(name).state_dict().items():
            torch.testing.assert_close(tensor, expected[part][key], rtol=1e-5, atol=1e-6)
    (half,) = Export(lora=str(run / "lora_low.safetensors"), merge=True, output=str(tmp_path / "half")).run(two)
    base, low = two.load_transformer()["high"].state_dict(), tiny(half).load_part("transformer_2").state_dict()
    assert all(torch.equal(t, base[key]) for key, t in tiny(half).load_part("transformer").state_dict().items())
    torch.testing.assert_close(low["blocks.0.attn1.to_q.weight"], expected["low"]["blocks.0.attn1.to_q.weight"])


def test_an_expert_that_cannot_be_told_is_asked_for(pipeline, tmp_path):
    two = experts(pipeline, tmp_path / "pipeline")
    trained(two, tmp_path)
    metadata_free = load_file(tmp_path / "lora_high.safetensors")
    save_file(metadata_free, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="does not say which expert .* _low.safetensors or _high.safetensors"):
        Export(lora=str(tmp_path / "mine.safetensors"), format="comfyui").run(two)
    with pytest.raises(
        ValueError, match=r"holds .*lora_high.safetensors.*but this model config needs lora.safetensors"
    ):
        Export(lora=str(tmp_path), format="comfyui").run(tiny(pipeline))
    (tmp_path / "lora_low.safetensors").unlink()
    with pytest.raises(ValueError, match="needs lora_low.safetensors"):
        Export(lora=str(tmp_path), format="comfyui").run(two)


def test_components_come_from_the_index_and_a_missing_one_is_named(pipeline, tmp_path):
    source = tmp_path / "pipeline"
    shutil.copytree(pipeline, source)
    (source / "junk").mkdir()
    (source / "junk" / "config.json").write_text("{}")
    (source / "LICENSE.txt").write_text("terms")
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "X"], "transformer": ["diffusers", "X"],
             "tokenizer": ["transformers", "X"], "transformer_2": [None, None], "boundary_ratio": None}  # fmt: skip
    (source / "model_index.json").write_text(json.dumps(index))
    arch = tiny(source)
    trained(arch, tmp_path)
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    expected = {"LICENSE.txt", "model_index.json", "vae", "transformer", "tokenizer", "mpp_export.json"}
    assert {p.name for p in folder.iterdir()} == expected
    shutil.rmtree(source / "tokenizer")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="lacks tokenizer, which its model_index.json names"):
        Export(lora=str(tmp_path), merge=True).run(arch)
    assert not folder.exists()
    assert list(tmp_path.glob(".*")) == []


def test_a_hub_model_is_completed_from_the_hub(pipeline, tmp_path, monkeypatch):
    """A repository as huggingface_hub keeps it after a download: links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(pipeline, repository / "blobs")
    for file in (p for p in (repository / "blobs").rglob("*") if p.is_file()):
        link = snapshot / file.relative_to(repository / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    kinds = {name: ["x", "X"] for name in ("vae", "transformer", "tokenizer", "text_encoder")}
    (snapshot / "model_index.json").write_text(json.dumps(kinds))
    arch = tiny("some/model")
    trained(arch, tmp_path)
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    assert {p.name for p in folder.iterdir()} == {*kinds, "model_index.json", "mpp_export.json"}
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    shutil.rmtree(repository)
    tiny(folder).load_transformer()


def test_a_lone_transformer_is_merged_alone(pipeline, tmp_path):
    for source in (Path(pipeline) / "transformer", tmp_path / "model.safetensors"):
        if source.suffix:
            from tests.families.wan import single_file

            save_file(single_file()[1], source)
        arch = tiny(source)
        trained(arch, tmp_path)
        (folder,) = Export(lora=str(tmp_path), merge=True, output=str(tmp_path / f"m_{source.stem}")).run(arch)
        assert {p.name for p in folder.iterdir()} == {"transformer", "mpp_export.json"}
        tiny(folder).load_transformer()


def test_a_merged_model_says_what_it_was_made_of(pipeline, tmp_path, caplog):
    caplog.set_level("WARNING", logger="mpp")
    arch = tiny(pipeline)
    base = arch.identity().transformer
    trained(arch, tmp_path, record={"base": base, "steps": 5})
    (folder,) = Export(lora=str(tmp_path), merge=True).run(arch)
    record = json.loads((folder / "mpp_export.json").read_text())
    assert record["base"] == {"pretrained": str(pipeline), "weights": base}
    assert record["merged"]["transformer"]["trained"] == {"base": base, "steps": 5}
    assert record["merged"]["transformer"]["mpp"] == mpp.__version__
    assert caplog.text == ""
    trained(arch, tmp_path, record={"base": "other"})
    Export(lora=str(tmp_path), merge=True, output=str(tmp_path / "again")).run(arch)
    assert "was trained on other weights (other) than these" in caplog.text


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffusers", "peft"])
def test_what_is_there_is_replaced_only_when_told_and_only_by_the_whole(pipeline, tmp_path, format, monkeypatch):
    arch = tiny(pipeline)
    trained(arch, tmp_path)
    (target,) = Export(lora=str(tmp_path), format=format).run(arch)
    with pytest.raises(ValueError, match="is there already; choose another export.output, or set overwrite=true"):
        Export(lora=str(tmp_path), format=format).run(arch)
    before = content(target)
    trained(arch, tmp_path, alpha=3, rank=2)

    def full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mpp.lora.export, "save_file", full)
        with pytest.raises(OSError, match="no space left to write"):
            Export(lora=str(tmp_path), format=format, overwrite=True).run(arch)
    assert content(target) == before
    Export(lora=str(tmp_path), format=format, overwrite=True).run(arch)
    assert content(target) != before
    assert list(tmp_path.glob(".*")) == []


def test_what_was_there_comes_back_if_the_new_cannot_take_its_path(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def refuse(self, to):
        if self.name == "new":
            raise PermissionError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        mpp.files.write_folder(target, lambda folder: (folder / "new.txt").write_text("new"))
    assert (target / "old.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def content(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def test_a_merge_that_fails_leaves_nothing_and_one_that_is_there_stays(pipeline, tmp_path, monkeypatch):
    arch = tiny(pipeline)
    trained(arch, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mpp.lora.export.shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="no space left to write"):
            Export(lora=str(tmp_path), merge=True).run(arch)
    assert {p.name for p in tmp_path.iterdir()} == {"lora.safetensors"}
    (tmp_path / "lora_merged").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="lora_merged is there already; .* or remove it"):
            Export(lora=str(tmp_path), merge=True, overwrite=overwrite).run(arch)


def test_other_things_are_never_overwritten(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path)
    lora = str(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is the LoRA itself"):
        Export(lora=lora, format="diffusers", output=lora, overwrite=True).run(arch)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("x")
    with pytest.raises(ValueError, match="holds other things"):
        Export(lora=lora, format="peft", output=str(tmp_path / "mine"), overwrite=True).run(arch)


def test_settings_that_do_not_go_together_are_refused():
    for settings, message in [
        ({"lora": None, "format": "peft"}, "lora=... is missing"),
        ({"lora": "x"}, "choose one: export.format=.* or merge=true"),
        ({"lora": "x", "format": "peft", "merge": True}, "choose one"),
        ({"lora": "x", "merge": True, "dtype": "bfloat16"}, "the precision of model.dtype"),
        ({"lora": "x", "merge": True, "metadata": Metadata(title="a")}, "export.metadata is for LoRA files"),
        ({"lora": "x", "format": "kohya", "output": "x.pt"}, "must end in .safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            Export(**settings)


def test_files_that_are_no_lora_of_this_model_are_refused_by_name(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path, record={"family": "other"})
    good = load_file(tmp_path / "lora.safetensors")
    refuse = Refusals(arch, tmp_path)
    refuse(
        {"transformer.nothing.to_q.lora_A.weight": torch.ones(2, 64)},
        r"lacks 1 of the 1 modules \(first: nothing.to_q\)",
    )
    refuse({"blocks.0.weight": torch.ones(2)}, "is no LoRA: it holds blocks.0.weight")
    refuse({"transformer.blocks.0.attn1.to_q.weight": torch.ones(2)}, "is no LoRA")
    refuse({}, "is no LoRA: it holds nothing")
    refuse({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2)}, "half a LoRA")
    refuse({"transformer.blocks.lora_A.weight": torch.ones(2, 64)}, r"lacks 1 of the 1 modules \(first: blocks\)")
    wide = {k: torch.cat([v, v], dim=1) if k.endswith("lora_A.weight") else v for k, v in good.items()}
    refuse(wide, r"made for other, does not fit this .*to_[kqv] is \(64, 64\), the LoRA's \(64, 128\)", described=True)
    refuse({k: v for k, v in good.items() if "0.attn1.to_q.lora_A" not in k}, "is half a LoRA", described=True)
    whole = {k: v for k, v in good.items() if "0.attn1.to_q" not in k}
    refuse(whole, "tensors and its configuration of PEFT are about different modules", described=True)
    deep = {k: torch.cat([v, v], dim=int("lora_B" in k)) for k, v in good.items()}
    refuse(deep, "does not fit this .*size mismatch", described=True)
    broken = {k: v * float("inf") for k, v in good.items()}
    refuse(broken, r"lora_[AB].weight holds values that are not finite; the training has diverged")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a complete .safetensors file"):
        Export(lora=str(tmp_path / "bad.safetensors"), format="peft").run(arch)
    with pytest.raises(ValueError, match="is not there; give a LoRA file, or the output folder of a run"):
        Export(lora=str(tmp_path / "none.safetensors"), format="peft").run(arch)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .safetensors file, but this model config needs lora.safetensors"):
        Export(lora=str(tmp_path / "empty"), format="peft").run(arch)


class Refusals:
    """Tries tensors as a LoRA file in several formats, and expects one message and no output."""

    def __init__(self, arch, folder):
        self.arch, self.folder = arch, folder
        with safe_open(folder / "lora.safetensors", "pt") as handle:
            self.metadata = handle.metadata()

    def __call__(self, tensors, message, *, described=False):
        path = self.folder / "bad.safetensors"
        save_file(tensors, path, metadata=self.metadata if described else None)
        for format in ("diffusers", "peft", "comfyui", None):
            with pytest.raises(ValueError, match=message):
                Export(lora=str(path), format=format, merge=format is None).run(self.arch)
        assert {p.name for p in self.folder.iterdir()} <= {"lora.safetensors", "bad.safetensors", "empty"}


def test_a_dora_is_refused_where_it_would_be_wrong(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path, kind="dora")
    with pytest.raises(ValueError, match=r"export.format=kohya, lora=.*DoRA.*export.format=comfyui.*merge=true can"):
        Export(lora=str(tmp_path), format="kohya").run(arch)


def test_values_that_overflow_the_precision_are_refused(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path)
    state = {name: tensor * 1e6 for name, tensor in load_file(tmp_path / "lora.safetensors").items()}
    save_file(state, tmp_path / "big.safetensors")
    with pytest.raises(ValueError, match="too large for torch.float16; choose export.dtype=float32"):
        Export(lora=str(tmp_path / "big.safetensors"), format="comfyui", dtype="float16").run(arch)


def test_a_diffusers_file_without_metadata_has_scale_one(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path, alpha=7)
    state = load_file(tmp_path / "lora.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    (file,) = Export(lora=str(tmp_path / "plain.safetensors"), format="comfyui").run(arch)
    got = load_file(file)["diffusion_model.blocks.0.self_attn.q.lora_B.weight"]
    assert torch.equal(got, state["transformer.blocks.0.attn1.to_q.lora_B.weight"])


def test_a_trained_run_is_exported_by_its_folder(pipeline, prepared, tmp_path, capsys):
    train(pipeline, prepared, tmp_path / "run", "trainer.max_steps=1")
    cfg = config("export", ["model=tiny_wan", f"model.pretrained={pipeline}", f"lora_path={tmp_path / 'run'}",
                            "export.format=kohya"])  # fmt: skip
    (file,) = mpp.export.run(cfg)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {file}"
    assert file == tmp_path / "run" / "lora_kohya.safetensors"
    again = config("export", ["model=tiny_wan", f"lora_path={file}", "export.fromat=kohya", "export.format=1"][:2])
    again.export.format = "koya"
    with pytest.raises(
        ValueError, match="export.format should be 'diffusers', 'comfyui', 'kohya', 'peft' or 'original'"
    ):
        mpp.export.run(again)


@pytest.mark.slow
def test_the_command_takes_lora_and_answers_bad_input_in_one_line(pipeline, tmp_path):
    arch = tiny(pipeline)
    trained(arch, tmp_path)

    def command(*words):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "mpp.export", "model=tiny_wan", f"model.pretrained={pipeline}", *words]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = command("lora=lora.safetensors", "export.format=comfyui")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "wrote lora_comfyui.safetensors"
    assert (tmp_path / "lora_comfyui.safetensors").is_file()
    failed = command("lora=nowhere.safetensors", "merge=true")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: lora=nowhere.safetensors is not there")
    assert "Traceback" not in failed.stderr


def test_diffusers_fuses_both_experts_as_the_guide_says(pipeline, tmp_path):
    two = experts(pipeline, tmp_path / "pipeline")
    model = trained(two, tmp_path, kind="rslora", alpha=7)
    fresh = two.load_transformer()
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None,
        transformer=fresh["high"], transformer_2=fresh["low"],
    )  # fmt: skip
    lines = (Path(__file__).parents[2] / "docs" / "export.md").read_text().split("```python\n")
    guide = next(text.split("```")[0] for text in lines if "lora_low" in text).replace("outputs/mychar", str(tmp_path))
    exec(guide, {"pipe": pipe})
    pipe.unload_lora_weights()
    wanted = merged_by_peft(model)
    base = two.load_transformer()
    for part in ("high", "low"):
        state, before = fresh[part].state_dict(), base[part].state_dict()
        assert any(not torch.equal(state[name], before[name]) for name in before)
        for name, tensor in wanted[part].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)
