"""Preparing layers and control images: what changed is made again, and nothing else."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import mpp.prepare
from mpp.batching.datamodule import LatentDataModule
from mpp.cache.format import Cache
from mpp.media.images import read_image
from mpp.models.families.qwen_image import QwenImageConditioning
from tests.families import variants
from tests.families.base import architecture, draw_set
from tests.helpers import config, prepare
from tests.media import profiles


class Prepared:
    """A variant's pipeline, a set of two images, and its cache."""

    def __init__(self, name, built, tmp_path):
        self.variant = next(v for v in variants() if v.name == name)
        self.root, self.folder = tmp_path, built(self.variant)
        self.files = draw_set(self.variant, architecture(self.variant, self.folder), tmp_path)

    def run(self, *overrides):
        model = [*self.variant.overrides, f"model.pretrained={self.folder}", "model.dtype=float32"]
        where = [*self.files, f"data.cache_dir={self.root / 'cache'}", "device=cpu"]
        return mpp.prepare.run(config("prepare", [*model, *where, *overrides]))

    def entry(self, key):
        cache = Cache(self.root / "cache")
        return cache, next(entry for entry in cache.entries() if entry.key == key)


@pytest.fixture
def layered(built, tmp_path):
    return Prepared("Qwen-Image-Layered", built, tmp_path)


@pytest.fixture
def edit(built, tmp_path):
    return Prepared("Qwen-Image-Edit", built, tmp_path)


def test_layers_and_their_masks_are_frames_and_a_second_run_does_nothing(layered):
    first = layered.run()
    assert (first.encoded, first.masks_written) == (2, 2)
    cache, entry = layered.entry("p0")
    assert cache.latents(entry).shape[1] == cache.mask(entry).shape[1] == 3
    mask = cache.mask(entry)[0]
    assert torch.equal(mask[1], 1 - mask[2])  # each layer has its own
    assert mask[0].min() == 1  # the whole learns where any layer does
    assert [cache.preview_path("p0", suffix).is_file() for suffix in ("", ".layer0", ".layer1")] == [True] * 3
    again = layered.run()
    assert (again.encoded, again.masks_written, again.texts_encoded) == (0, 0, 0)


@pytest.mark.slow
def test_a_changed_layer_is_encoded_again_and_a_changed_layer_mask_is_not(layered):
    layered.run()
    Image.new("L", (64, 64), 128).save(layered.root / "masks" / "p0.layer1.png")
    summary = layered.run()
    assert (summary.encoded, summary.masks_written) == (0, 1)
    Image.new("RGBA", (64, 64), (9, 9, 9, 200)).save(layered.root / "photos" / "p1.layer0.png")
    summary = layered.run()
    assert (summary.encoded, summary.masks_written) == (1, 0)


@pytest.mark.slow
def test_an_added_layer_takes_the_images_mask_along(layered):
    for path in (layered.root / "masks").iterdir():
        path.unlink()
    Image.new("L", (64, 64), 255).save(layered.root / "masks" / "p0.png")
    layered.run()
    shutil.copy(layered.root / "photos" / "p0.layer0.png", layered.root / "photos" / "p0.layer2.png")
    summary = layered.run()
    assert (summary.encoded, summary.masks_written) == (1, 1)
    cache, entry = layered.entry("p0")
    assert cache.mask(entry).shape[1] == cache.latents(entry).shape[1] == 4


def test_layers_beside_images_of_a_plain_model_are_left_out_with_their_masks(layered, pipeline):
    (layered.root / "cache").mkdir(exist_ok=True)
    summary = prepare(pipeline, layered.root, "data.mask_sources=[folder]")
    assert summary.encoded == 2
    assert summary.masks == {"none": 2}
    layers = [f"p{n}.layer{m}.png" for n in (0, 1) for m in (0, 1)]
    passed = [name for name, reason in summary.left_over.passed if "layers, which this model does not learn" in reason]
    assert sorted(passed) == sorted([*layers, *(f"masks/{name}" for name in layers)])


@pytest.mark.slow
def test_a_changed_control_image_is_encoded_again_with_its_text(edit):
    first = edit.run()
    assert (first.encoded, first.texts_encoded) == (2, 2)
    Image.new("RGB", (80, 64), (200, 10, 10)).save(edit.root / "controls" / "p0_0.png")
    again = edit.run()
    assert (again.encoded, again.texts_encoded, again.masks_written) == (1, 1, 0)
    _, entry = edit.entry("p0")
    assert len(entry.seen) == 1
    assert entry.images


@pytest.mark.slow
def test_control_images_are_seen_in_the_colours_of_a_viewer_and_encoded_anew_for_that(edit):
    edit.run()
    control, profile = edit.root / "controls" / "p0_0.png", profiles.rgb_profile(profiles.P3, "srgb")
    with Image.open(control) as image:
        image.convert("RGB").save(control, icc_profile=profile)
    again = edit.run()
    assert (again.encoded, again.texts_encoded) == (1, 1)
    cache, entry = edit.entry("p0")
    found = cache.conditioning(entry, QwenImageConditioning).tensors()
    assert entry.seen[0].endswith(" sRGB")
    assert edit.run().encoded == 0
    shown = read_image(control, srgb=True).rgb
    assert shown.tobytes() != read_image(control).rgb.tobytes()
    shown.save(control)
    edit.run()
    cache, entry = edit.entry("p0")
    wanted = cache.conditioning(entry, QwenImageConditioning).tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.slow
def test_files_of_one_size_and_time_that_trade_names_are_noticed(pipeline, tmp_path):
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    paths = [tmp_path / "photos" / name for name in ("a.bmp", "b.bmp")]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        os.utime(path, (1, 1))
    prepare(pipeline, tmp_path)
    paths[0].rename(tmp_path / "photos" / "c.bmp")
    paths[1].rename(paths[0])
    (tmp_path / "photos" / "c.bmp").rename(paths[1])
    assert prepare(pipeline, tmp_path).encoded == 2


@pytest.mark.slow
def test_another_setting_of_the_encoders_needs_another_cache(edit):
    edit.run()
    with pytest.raises(ValueError, match=r"another settings .*'control_pixels': 6144.*'control_pixels': 4096"):
        edit.run("model.control_pixels=4096")


def test_a_failing_prompt_leaves_a_finished_cache(pipeline, tmp_path, monkeypatch):
    from mpp.sampling.prompts import Prompts
    from tests.helpers import draw_photos

    draw_photos(tmp_path / "photos", tmp_path / "masks", count=2)
    monkeypatch.setattr(Prompts, "encode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        prepare(pipeline, tmp_path, "sampling.prompts=[a]")
    assert len(Cache(tmp_path / "cache").entries()) == 2


@pytest.mark.parametrize("drop", [False, True])
def test_frames_that_the_model_is_given_are_left_out_of_latents_and_mask(layered, drop):
    layered.run()
    arch = architecture(layered.variant, layered.folder, f"model.drop_base_frame={drop}")
    data = LatentDataModule(architecture=arch, cache_dir=str(layered.root / "cache"), batch_size=2)
    data.setup()
    first = int(drop)
    cache = Cache(layered.root / "cache")
    (batch,) = data.train_dataloader()
    for row, key in enumerate(batch.keys):
        entry = layered.entry(key)[1]
        assert torch.equal(batch.latents[row], cache.latents(entry)[:, first:])
        assert torch.equal(batch.mask[row], cache.mask(entry)[:, first:])
    assert batch.latents.shape[2] == 3 - first
    # the whole image is there in any case, as what the layers are taken from
    assert torch.equal(batch.conditioning.condition[row], cache.latents(entry)[:, :1])
