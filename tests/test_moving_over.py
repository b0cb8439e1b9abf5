"""From our cache to musubi-tuner's files and back into a run, by the commands."""

import pytest

import mpp.prepare
from mpp.cache.format import Cache
from tests import helpers


@pytest.fixture(scope="module")
def exported(prepared, pipeline, tmp_path_factory):
    """The shared cache of eight images as musubi-tuner's files."""
    folder = tmp_path_factory.mktemp("musubi")
    summary = mpp.prepare.run(export(pipeline, prepared, f"export_dir={folder}"))
    assert summary.lines()[0] == f"{folder}: 8 samples of the architecture wan"
    return folder


def export(pipeline, cache, *overrides):
    settings = ["model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={cache}", "export=musubi"]
    return helpers.config("prepare", [*settings, *overrides])


def run(pipeline, cache, out, *overrides):
    return helpers.train(
        pipeline, cache, out, "data=musubi", "loss=threshold", "data.batch_size=2", "trainer.max_steps=3", *overrides
    )


def test_a_run_on_exported_files_learns_what_a_run_on_the_cache_learns(exported, prepared, pipeline, tmp_path):
    from mpp.batching.datamodule import LatentDataModule

    model = helpers.architecture(pipeline)
    ours = LatentDataModule(architecture=model, cache_dir=str(prepared))
    theirs = LatentDataModule(architecture=model, cache_dir=str(exported), layout="musubi")
    for data in (ours, theirs):
        data.setup()
    assert len(theirs.train_entries) == len(ours.train_entries) == 8
    masks = [[float(data.cache.mask(e).mean()) for e in data.train_entries] for data in (ours, theirs)]
    assert sorted(masks[0]) == pytest.approx(sorted(masks[1]), abs=1e-3)  # half precision
    _, module = run(pipeline, exported, tmp_path / "out")
    assert module.samples_seen > 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_what_such_a_cache_cannot_do_is_refused(exported, pipeline, tmp_path):
    with pytest.raises(ValueError, match="each sample's own caption and no other"):
        run(pipeline, exported, tmp_path / "a", "data.caption_dropout=0.1")
    with pytest.raises(ValueError, match="the sources of the cache .* cannot be compared"):
        run(pipeline, exported, tmp_path / "b", "data.strict_masks=true")
    with pytest.raises(ValueError, match="data.layout"):
        helpers.train(pipeline, exported, tmp_path / "c", "data.layout=kohya")


def test_an_export_says_what_it_lacks(prepared, pipeline, tmp_path):
    with pytest.raises(ValueError, match="export=musubi needs a folder to write to; set export_dir"):
        mpp.prepare.run(export(pipeline, prepared))
    with pytest.raises(ValueError, match="export must be musubi, got 'kohya'"):
        mpp.prepare.run(export(pipeline, prepared, "export=kohya", f"export_dir={tmp_path}"))
    with pytest.raises(ValueError, match=r"no cache at .*nowhere"):
        mpp.prepare.run(export(pipeline, tmp_path / "nowhere", f"export_dir={tmp_path / 'x'}"))
    with pytest.raises(ValueError, match="is for an export; add export=musubi"):
        helpers.prepare(pipeline, tmp_path, f"export_dir={tmp_path}")
    assert Cache(prepared).entries()
