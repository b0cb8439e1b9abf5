"""Masks that change after they were prepared are noticed at the start of training."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.batching.datamodule import LatentDataModule
from mpp.batching.freshness import Changed, SourceChanges, source_changes
from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import Cache, Notes, made_from, write_tensors
from mpp.cache.index import Entry, Index
from mpp.cache.provenance import MaskProvenance, Source
from mpp.models.frame_axis import Layers
from mpp.sources.source import FolderSource
from tests import helpers
from tests.media import videos


@pytest.fixture
def root(tmp_path, pipeline):
    """Four images, p3 without a mask, prepared."""
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", 4)
    helpers.prepare(pipeline, tmp_path)
    return tmp_path


def all_changes(root):
    cache = Cache(root / "cache")
    return source_changes(cache, cache.entries(), cache.identity().latents.frames)


def changes(root):
    return all_changes(root).masks


def invert(path):
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def test_nothing_changed_is_nothing_said(root):
    assert all_changes(root) == SourceChanges()
    assert not all_changes(root)


def test_new_edited_and_deleted_masks_are_named(root):
    shutil.copy(root / "masks" / "p1.png", root / "masks" / "p3.png")
    invert(root / "masks" / "p0.png")
    (root / "masks" / "p2.png").unlink()
    found = changes(root)
    assert found == Changed(new=("p3",), edited=("p0",), deleted=("p2",))
    assert str(found) == "1 new (p3), 1 edited (p0), 1 deleted (p2)"


def test_a_touched_mask_is_no_edited_one(root):
    os.utime(root / "masks" / "p0.png", ns=(1, 1))
    assert not changes(root)


def test_a_mask_in_another_path_or_read_otherwise_is_an_edited_one(root, pipeline):
    shutil.copy(root / "masks" / "p2.png", root / "photos" / "p0-masklabel.png")
    (root / "masks" / "p0.png").unlink()
    assert changes(root) == Changed(edited=("p0",))  # it has a mask, and another one
    helpers.prepare(pipeline, root)
    assert not changes(root)
    shutil.copy(root / "masks" / "p2.png", root / "masks" / "p0.png")
    assert changes(root) == Changed(edited=("p0",))  # the mask folder comes first


def test_masks_that_only_moved_are_current_for_preparing_and_for_training(root, pipeline):
    shutil.move(root / "masks", root / "moved")
    assert helpers.prepare(pipeline, root, f"data.mask_dir={root / 'moved'}").masks_written == 0
    assert changes(root) == Changed()
    invert(root / "moved" / "p0.png")
    assert changes(root)


def test_preparing_again_settles_it(root, pipeline):
    invert(root / "masks" / "p0.png")
    shutil.copy(root / "masks" / "p1.png", root / "masks" / "p3.png")
    summary = helpers.prepare(pipeline, root)
    assert (summary.encoded, summary.masks_written) == (0, 2)
    assert not changes(root)


def test_masks_of_clips_are_compared_once_for_all_clips_of_a_video(tmp_path, pipeline):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for name in "ab":
        lossless = {"codec": "libx264rgb", "pix_fmt": "rgb24"}
        videos.write_video(tmp_path / "photos" / f"{name}.mkv", videos.number_frames(20), rate=16, **lossless)
        videos.write_frames(tmp_path / "masks" / name, videos.square_masks(20))
    helpers.prepare(pipeline, tmp_path, "data.clips.frames=[5]", "data.clips.extract=all")
    assert not changes(tmp_path)
    invert(tmp_path / "masks" / "b" / "frame7.png")
    assert changes(tmp_path) == Changed(edited=("b",))
    shutil.rmtree(tmp_path / "masks" / "a")
    assert changes(tmp_path) == Changed(edited=("b",), deleted=("a",))


def test_alpha_masks_change_with_their_image(tmp_path, pipeline):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    image = Image.new("RGBA", (64, 64), (200, 10, 10, 255))
    image.paste((200, 10, 10, 0), (0, 0, 32, 64))
    image.save(tmp_path / "photos" / "a.png")
    helpers.prepare(pipeline, tmp_path)
    assert not changes(tmp_path)
    image.paste((200, 10, 10, 0), (0, 0, 48, 64))
    image.save(tmp_path / "photos" / "a.png")
    assert changes(tmp_path) == Changed(edited=("a",))


def test_a_cache_away_from_its_sources_says_that_it_cannot_be_compared(root):
    shutil.move(root / "photos", root / "elsewhere")
    shutil.move(root / "masks", root / "elsewheremasks")
    found = all_changes(root)
    assert not found
    assert "photos" in found.unchecked


def test_training_says_what_changed_and_strict_masks_refuse(root, pipeline, architecture, caplog):
    caplog.set_level("INFO", logger="mpp")
    invert(root / "masks" / "p0.png")
    strict = LatentDataModule(architecture=architecture, cache_dir=str(root / "cache"), strict_masks=True)
    with pytest.raises(ValueError, match=r"masks changed since the cache .* was prepared: 1 edited \(p0\); run"):
        strict.setup()
    helpers.train(pipeline, root / "cache", root / "out", "trainer.max_steps=1")
    assert "masks changed since the cache was prepared: 1 edited (p0); this run uses the old ones" in caplog.text
    invert(root / "masks" / "p0.png")
    shutil.move(root / "photos", root / "elsewhere")
    with pytest.raises(ValueError, match="the sources of the cache .* cannot be compared with it: "):
        LatentDataModule(architecture=architecture, cache_dir=str(root / "cache"), strict_masks=True).setup()


def test_relative_folders_are_compared_from_anywhere(tmp_path, pipeline, monkeypatch):
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", 2)
    monkeypatch.chdir(tmp_path)
    helpers.prepare(pipeline, Path())
    assert changes(tmp_path) == Changed()
    monkeypatch.chdir("/")
    assert changes(tmp_path) == Changed()


def test_storage_that_cannot_be_reached_is_said_and_is_no_error(root):
    cache = Cache(root / "cache")
    made = made_from(cache.mask_path("p0"), MaskProvenance)
    there = Source({**made.sources[0].fingerprint, "source": "s3://bucket/p0.png"}, "other content")
    write_tensors(cache.mask_path("p0"), {"mask": torch.ones(1, 1, 8, 8)}, replace(made, sources=(there,)).header())
    cache.write_notes(Notes())  # so that files are looked for where they were
    found = all_changes(root)
    assert not found
    assert "the cache does not say what it was made from" in found.unchecked


def test_masks_of_layers_that_come_later_are_edits(tmp_path):
    """An image's mask held for all layers; now some of the layers have their own."""
    for name in ("photos/p", "photos/p.layer0", "photos/p.layer1", "masks/p"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L" if "masks" in name else "RGB", (64, 64), 255).save(tmp_path / f"{name}.png")
    cache = Cache(tmp_path / "cache")
    folders = {"image_dir": str(tmp_path / "photos"), "mask_dir": str(tmp_path / "masks")}
    source = FolderSource(**folders, cache_dir=str(cache.folder))
    cache.write_notes(Notes(source.sources_record()))
    sources = Fingerprints().sources([tmp_path / "masks" / "p.png"])
    made = MaskProvenance(sources, (64, 64, 64, 64, False), None, "folder", (3, 8, 8), invert=False)
    write_tensors(cache.mask_path("p"), {"mask": torch.ones(1, 3, 8, 8)}, made.header())
    entries = Index.of([Entry("p", "train", (16, 3, 8, 8), "t", "", "folder")])
    assert source_changes(cache, entries, Layers()).masks == Changed()
    for number in (0, 1):
        shutil.copy(tmp_path / "masks" / "p.png", tmp_path / "masks" / f"p.layer{number}.png")
        assert source_changes(cache, entries, Layers()).masks == Changed(edited=("p",))


def test_captions_and_media_are_named_as_masks_are(root, pipeline):
    draw = np.random.default_rng(0)
    (root / "photos" / "p0.txt").write_text("other words")
    (root / "photos" / "p1.txt").unlink()
    Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "photos" / "p2.png")
    Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "photos" / "new.png")
    (root / "photos" / "p3.png").unlink()
    found = all_changes(root)
    assert found.lines() == [
        "captions changed since the cache was prepared: 1 edited (p0), 1 deleted (p1)",
        "media changed since the cache was prepared: 1 new (new), 1 edited (p2), 1 deleted (p3)",
    ]
    helpers.prepare(pipeline, root)
    assert not all_changes(root)
    (root / "photos" / "p1.txt").write_text("at last")
    assert all_changes(root).captions == Changed(new=("p1",))


def test_strict_sources_refuse_what_strict_masks_let_pass(root, architecture):
    (root / "photos" / "p0.txt").write_text("other words")
    settings = {"architecture": architecture, "cache_dir": str(root / "cache")}
    LatentDataModule(**settings, strict_masks=True).setup()
    wrong = r"captions changed since the cache .* was prepared: 1 edited \(p0\); run .*set data.strict_sources=false"
    with pytest.raises(ValueError, match=wrong):
        LatentDataModule(**settings, strict_sources=True).setup()


def test_what_preparing_left_out_is_not_new_until_its_files_change(root, pipeline):
    (root / "photos" / "bad.png").write_bytes(b"none")
    os.utime(root / "photos" / "bad.png", ns=(1, 1))
    helpers.prepare(pipeline, root, "data.on_error=skip")
    assert not all_changes(root)
    shutil.copy(root / "photos" / "p0.png", root / "photos" / "bad.png")
    assert all_changes(root).media == Changed(new=("bad",))


def test_files_of_one_size_and_time_are_not_read_even_where_they_moved(root, pipeline):
    (root / "home").mkdir()
    for name in ("photos", "masks", "cache"):
        (root / name).rename(root / "home" / name)
    helpers.prepare(pipeline, root / "home")
    file = root / "home" / "photos" / "p0.png"
    times, content = file.stat(), file.read_bytes()
    with file.open("r+b") as handle:  # the same size and identity
        handle.write(bytes(len(content)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not all_changes(root / "home")
    os.utime(file, ns=(1, 1))
    assert all_changes(root / "home").media == Changed(edited=("p0",))


def test_a_strict_look_is_at_all_samples_of_a_set_of_any_size(root, monkeypatch):
    monkeypatch.setattr("mpp.batching.freshness._LISTED", 2)  # a larger set would take minutes to write
    shutil.copy(root / "masks" / "p1.png", root / "masks" / "p3.png")
    cache = Cache(root / "cache")
    loose, strict = (
        source_changes(cache, cache.entries(), cache.identity().latents.frames, thorough=thorough)
        for thorough in (False, True)
    )
    assert "sets of more than 2 samples" in loose.unchecked
    assert (strict.masks, strict.unchecked) == (Changed(new=("p3",)), None)
