"""What an older version wrote is read, resumed and exported; `tests/fixtures/make.py` says how it was made."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mpp.export
import mpp.prepare
from mpp.batching.datamodule import LatentDataModule
from mpp.models.conditioning import flat_tensors
from tests.families.base import architecture as of_variant
from tests.families.qwen_image_layered import VARIANTS
from tests.helpers import architecture, config, logged, prepare, train

OLD = Path(__file__).parent / "fixtures" / "v0"
EXPECTED = json.loads((OLD / "expected.json").read_text())
EXPORTS = sorted(path for path in (OLD / "loras").glob("*/*") if path.name != "lora.safetensors")


def losses(out):
    return [row["train/loss"] for row in logged(out) if "train/loss" in row]


def copied(name, tmp_path):
    """A folder of the fixtures that may be written to."""
    return Path(shutil.copytree(OLD / name, tmp_path / name))


@pytest.mark.parametrize("name", ["cache", "layered"])
def test_an_old_cache_is_read_with_the_tensors_that_were_written(name):
    # The layered pipeline is not there: its weights are not compared, as on a machine that only trains.
    arch = architecture(OLD / "base") if name == "cache" else of_variant(VARIANTS[0], Path("nowhere"))
    data, expected = LatentDataModule(architecture=arch, cache_dir=str(OLD / name)), EXPECTED[name]
    data.setup()
    entries, seen = {entry.key: entry for entry in data.cache.entries()}, set()
    for batch in data.train_dataloader():
        (key,) = batch.keys
        tensors = {**flat_tensors(vars(batch.conditioning)), "latents": batch.latents, "mask": batch.mask}
        files = {f"latents/{key}", f"masks/{key}", f"text/{entries[key].text}", f"pictures/{key}"}
        for tensor_name, (rows, digest) in expected.items():
            file, _, field = tensor_name.partition(":")
            if file in files:
                tensor = tensors[field][0]
                assert sha256(tensor[:rows].numpy().tobytes()).hexdigest() == digest, tensor_name
                assert not tensor[rows:].any(), tensor_name  # text is padded
                seen.add(tensor_name)
        assert f"masks/{key}:mask" in expected or (batch.mask == 1).all()
    assert seen == set(expected)


def test_preparing_the_same_sources_again_finds_everything_current(tmp_path):
    for name in ("photos", "masks", "cache"):
        copied(name, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    summary = prepare(OLD / "base", tmp_path, "data.clips.frames=[9]")
    assert (summary.encoded, summary.current) == (0, 7)
    assert (summary.masks_written, summary.masks_current) == (0, 6)
    assert (summary.texts_encoded, summary.texts_current) == (0, 4)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == before


def test_an_old_checkpoint_goes_on_in_the_middle_of_its_epoch(tmp_path):
    out = copied("run", tmp_path)
    newer = ["callbacks.ema.decay=0.5"]  # which 0.1.0 did not have
    _, module = train(OLD / "base", OLD / "cache", out, *EXPECTED["run"]["overrides"], "ckpt_path=last", *newer)
    assert losses(out) == pytest.approx(EXPECTED["run"]["losses"], rel=1e-5)
    assert module.samples_seen == 14  # two epochs of seven
    assert (out / "lora_ema.safetensors").is_file()


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_an_old_lora_is_exported_as_it_was(path, tmp_path):
    target = tmp_path / path.name
    lora = [f"lora_path={path.parent / 'lora.safetensors'}", f"export.format={path.stem}", f"export.output={target}"]
    mpp.export.run(config("export", ["model=tiny_wan", f"model.pretrained={OLD / 'base'}", *lora]))
    new, old = (load_file(p / "adapter_model.safetensors" if p.is_dir() else p) for p in (target, path))
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor), name
    if path.stem == "peft":
        new, old = (json.loads((p / "adapter_config.json").read_text()) for p in (target, path))
        scale = {"r", "lora_alpha", "alpha", "use_rslora", "use_dora", "peft_type"}
        assert {k: v for k, v in new.items() if k in scale} == {k: v for k, v in old.items() if k in scale}


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_old_files_of_musubi_tuner_train_as_they_did(kind, tmp_path):
    train(OLD / "base", OLD / "musubi" / kind, tmp_path, *EXPECTED["musubi"]["overrides"])
    assert losses(tmp_path) == pytest.approx(EXPECTED["musubi"][kind], rel=1e-5)


def test_an_old_cache_is_written_as_files_of_musubi_tuner_as_it_was(tmp_path):
    chosen = [f"model.pretrained={OLD / 'base'}", f"data.cache_dir={OLD / 'cache'}", f"export_dir={tmp_path}"]
    mpp.prepare.run(config("prepare", ["model=tiny_wan", "export=musubi", *chosen]))
    old, new = ({p.relative_to(f): p for p in f.rglob("*.safetensors")} for f in (OLD / "musubi", tmp_path))
    assert new.keys() == old.keys()
    for name, path in old.items():
        mine, theirs = load_file(new[name]), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items()), name
