"""Prompts to generate from: checked early, cached beforehand."""

import pytest
import torch
from PIL import Image

from mpp.cache.format import Cache
from mpp.models.contract import Identity, ImageInputs, Prompt
from mpp.sampling.prompts import Prompts
from tests.helpers import unchecked_error

SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 2}
IDENTITY = Identity(None, "v", "t")


class Counting:
    """Encoders that count what is encoded."""

    def __init__(self, inner):
        self.inner, self.texts = inner, []

    def encode_text(self, prompts):
        self.texts += [prompt.text for prompt in prompts]
        return self.inner.encode_text(prompts)

    def encode_images(self, pixels, controls):
        return self.inner.encode_images(pixels, controls)

    def release(self):
        pass


def test_embeddings_are_encoded_once_and_read_back(architecture, tmp_path):
    cache, encoders = Cache(tmp_path), Counting(architecture.load_encoders("cpu"))
    prompts = Prompts(["a cat", "a dog"], negative_prompt="blur", guidance_scale=4.0, **SMALL)
    assert prompts.encode(architecture, encoders, cache, IDENTITY) == 2
    assert sorted(set(encoders.texts)) == ["a cat", "a dog", "blur"]
    count = len(encoders.texts)
    prompts.encode(architecture, encoders, cache, IDENTITY)
    assert len(encoders.texts) == count
    first, second = prompts.read(architecture, cache)
    (want,) = encoders.inner.encode_text([Prompt("a dog")])
    assert torch.equal(second.positive.text, architecture.collate([want]).text)
    (want,) = encoders.inner.encode_text([Prompt("blur")])
    assert torch.equal(first.negative.text, architecture.collate([want]).text)
    assert (first.generation.width, first.generation.height, first.generation.frames, first.generation.steps) == (
        64,
        48,
        5,
        2,
    )


def test_embeddings_of_another_text_encoder_are_made_again(architecture, tmp_path):
    cache, encoders = Cache(tmp_path), Counting(architecture.load_encoders("cpu"))
    prompts = Prompts(["a cat"], guidance_scale=1.0, **SMALL)
    prompts.encode(architecture, encoders, cache, IDENTITY)
    prompts.encode(architecture, encoders, cache, Identity(None, "v", "another"))
    assert encoders.texts == ["a cat", "a cat"]


def test_conditioning_of_images_is_made_for_each_size_and_image(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(type(architecture), "images", ImageInputs(1, 1))
    cache, encoders = Cache(tmp_path), Counting(architecture.load_encoders("cpu"))
    for name, colour in (("a.png", (0, 0, 0)), ("b.png", (9, 9, 9))):
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    for size, name in ((64, "a.png"), (48, "a.png"), (64, "b.png"), (64, "a.png")):
        settings = {**SMALL, "width": size, "guidance_scale": 1.0, "controls": [[str(tmp_path / name)]]}
        Prompts(["a cat"], **settings).encode(architecture, encoders, cache, IDENTITY)
    assert len(encoders.texts) == 3


def test_no_guidance_needs_no_negative_prompt_and_the_familys_guidance_is_the_default(architecture, tmp_path):
    cache, encoders = Cache(tmp_path), Counting(architecture.load_encoders("cpu"))
    for scale in (1.0, None):
        Prompts(["a cat"], guidance_scale=scale, **SMALL).encode(architecture, encoders, cache, IDENTITY)
    (plain,) = Prompts(["a cat"], guidance_scale=1.0, **SMALL).read(architecture, cache)
    (default,) = Prompts(["a cat"], **SMALL).read(architecture, cache)
    assert plain.negative is None
    assert default.generation.guidance_scale == architecture.guidance_scale > 1
    assert default.negative is not None


def test_a_prompt_that_was_not_prepared_is_named(architecture, tmp_path):
    with pytest.raises(ValueError, match=r"no embeddings of the prompt 'a cat' for samples; run .*mpp.prepare"):
        Prompts(["a cat"], **SMALL).read(architecture, Cache(tmp_path))


def test_sizes_off_the_models_grid_are_refused(architecture):
    for name, value, message in (
        ("width", 60, "multiple of 16"),
        ("height", 8, "multiple of 16"),
        ("frames", 4, "plus 1"),
    ):
        with pytest.raises(
            ValueError, match=f"sampling.{name} must be a {message}|sampling.{name} must be .*{message}"
        ):
            Prompts(["a"], **{**SMALL, name: value}).check(architecture)
    Prompts([], width=7).check(architecture)  # nothing is generated


def test_clips_of_which_every_frame_is_given_are_refused(architecture):
    architecture.given_frames = 1
    with pytest.raises(ValueError, match="sampling.frames=1: this model is given the first 1 .* set at least 5"):
        Prompts(["a"], **{**SMALL, "frames": 1}).check(architecture)


def test_conditioning_images_are_counted_and_read(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(type(architecture), "images", ImageInputs(1, 2))
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="the prompt 'a' has 0 images, this model takes 1 to 2"):
        Prompts(["a"], **SMALL).check(architecture)
    with pytest.raises(ValueError, match="b.png: not a readable image"):
        Prompts(["a"], controls=[[str(tmp_path / "b.png")]], **SMALL).check(architecture)
    Prompts(["a"], controls=[[str(tmp_path / "a.png")]], **SMALL).check(architecture)


def test_settings_that_contradict_each_other_are_refused():
    two = unchecked_error(Prompts, ["a"], controls=[["x"], ["y"]])
    assert two.startswith("ValueError: sampling.controls has 2 lists of images for 1 prompts")
    for name in ("frames", "steps"):
        assert unchecked_error(Prompts, ["a"], **{name: 0}).startswith("ValueError: sampling.frames and steps")
