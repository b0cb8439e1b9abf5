"""Samples that fail at a drawn stage with a drawn error are named by their file, and left out where that is wanted."""

import random
import struct

import pytest
import torch
from PIL import Image

import mpp.prepare
from mpp.cache.format import Cache
from mpp.media.mask import RawMask
from mpp.models.families.toy import ToyEncoders
from tests.helpers import config

ERRORS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    KeyError("pixel_values"),
    IndexError("list index out of range"),
    ZeroDivisionError("division by zero"),
    AssertionError(),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    struct.error("unpack requires a buffer of 4 bytes"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ValueError("box offset can't be negative"),
    OSError("the network share is gone"),
    StopIteration(),
]
STAGES = ["VAE", "text", "images", "mask", "image is gone", "mask is gone", "latents", "preview", "mask file"]
BAD = (255, 0, 255)


def prepare(root, *overrides):
    paths = {"data.image_dir": "photos", "data.mask_dir": "masks", "data.cache_dir": "cache"}
    settings = ["model=toy", "data.resolution=24", "device=cpu"]
    cfg = config("prepare", [*settings, *(f"{key}={root / name}" for key, name in paths.items()), *overrides])
    return mpp.prepare.run(cfg)


def draw_set(root, draw):
    """Images of two shapes with masks and captions of their own; returns the keys, and the bad ones among them."""
    for folder in ("photos", "masks"):
        (root / folder).mkdir(parents=True)
    keys = [f"p{number}" for number in draw.sample(range(100), draw.randint(3, 6))]
    bad = draw.sample(keys, draw.randint(1, len(keys) - 1))
    for key in keys:
        size = draw.choice([(24, 24), (24, 24), (32, 16)])
        Image.new("RGB", size, BAD if key in bad else (10, 200, 30)).save(root / "photos" / f"{key}.png")
        Image.new("L", size, 253 if key in bad else 255).save(root / "masks" / f"{key}.png")
        (root / "photos" / f"{key}.txt").write_text(f"{'bad' if key in bad else 'good'} {key}")
    return keys, bad


def break_stage(stage, error, root, bad, monkeypatch):
    """Let what prepare calls, or the disk, fail for the bad samples and for no others."""

    def fails(kind, name, concerned, act=None):
        called = getattr(kind, name)

        def faulty(self, *arguments):
            if concerned(self, *arguments):
                raise error
            return called(self, *arguments)

        monkeypatch.setattr(kind, name, faulty)

    def magenta(_, pixels, *rest):
        return bool(((pixels[:, 0] > 0.9) & (pixels[:, 1] < -0.9)).any())

    cache = Cache(root / "cache")
    folders = {"latents": cache.latents_path, "preview": cache.preview_path, "mask file": cache.mask_path}
    if stage in folders:
        for key in bad:
            (folders[stage](key) / "in the way").mkdir(parents=True)
    elif "gone" in stage:  # after it was checked, when the encoders begin
        encode = ToyEncoders.encode_text

        def removing(self, prompts):
            for key in bad:
                (root / ("photos" if stage == "image is gone" else "masks") / f"{key}.png").unlink(missing_ok=True)
            return encode(self, prompts)

        monkeypatch.setattr(ToyEncoders, "encode_text", removing)
    elif stage == "VAE":
        fails(ToyEncoders, "encode_pixels", magenta)
    elif stage == "images":
        fails(ToyEncoders, "encode_images", magenta)
    elif stage == "text":
        fails(ToyEncoders, "encode_text", lambda _, prompts: any("bad" in prompt.text for prompt in prompts))
    else:
        fails(RawMask, "mask", lambda raw: raw.colours.max() == 253)


def check_named(root, bad, text):
    assert any(f"{root / folder / key}.png" in text for folder in ("photos", "masks") for key in bad), text


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 30))])
def test_a_sample_that_fails_is_named_or_left_out(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    for number, stage in enumerate(draw.sample(STAGES, 2)):
        root = tmp_path / str(number)
        keys, bad = draw_set(root, draw)
        batch = f"prepare.batch_size={draw.randint(1, 3)}"
        with monkeypatch.context() as patch:
            break_stage(stage, draw.choice(ERRORS), root, bad, patch)
            if draw.random() < 0.5:
                with pytest.raises(ValueError, match=r"\.png") as stopped:
                    prepare(root, batch)
                check_named(root, bad, str(stopped.value))
            else:
                summary = prepare(root, batch, "data.on_error=skip")
                assert len(summary.skipped) == len(bad), summary.skipped
                for key in bad:
                    check_named(root, [key], "\n".join(summary.skipped))
                assert sorted(entry.key for entry in Cache(root / "cache").entries()) == sorted(set(keys) - set(bad))
                good = len(keys) - len(bad)
                assert f"masks: {good} of {good}" in "\n".join(summary.lines())


def test_one_caption_that_fails_names_every_image_that_has_it(tmp_path, monkeypatch):
    keys, bad = draw_set(tmp_path, random.Random(5))
    for key in bad:
        (tmp_path / "photos" / f"{key}.txt").write_text("bad")
    break_stage("text", RuntimeError("no"), tmp_path, bad, monkeypatch)
    summary = prepare(tmp_path, "data.on_error=skip", "data.flip=true")
    assert len(summary.skipped) == len(bad)
    for key in bad:
        check_named(tmp_path, [key], "\n".join(summary.skipped))
    assert len(Cache(tmp_path / "cache").entries()) == 2 * (len(keys) - len(bad))


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_weights_that_cannot_be_loaded_are_no_fault_of_a_sample(tmp_path, pipeline, component):
    import shutil

    from tests import helpers

    shutil.copytree(pipeline, tmp_path / "model")
    (weights,) = (tmp_path / "model" / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", 3)
    with pytest.raises(ValueError, match=rf"^model\.{component}=\S+/model cannot be loaded \(") as error:
        helpers.prepare(tmp_path / "model", tmp_path, "data.on_error=skip")
    assert ".png" not in str(error.value)
