import hashlib
import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mpp.core import flow
from mpp.lora.adapters import Adapter, adapters_off, inject
from mpp.models.contract import Architecture, Prompt
from mpp.models.families.toy import Toy, ToyConditioning, word_vector
from mpp.training.teacher import Teacher
from tests import helpers

BASE = Path(__file__).parents[3] / "benchmarks" / "phantom_limb" / "base"


@pytest.fixture
def toy():
    """The toy with the shipped base."""
    return helpers.build(helpers.config("train", ["model=toy", f"model.pretrained={BASE}", "data.cache_dir=x"]).model)


def inputs(toy, captions=("zarp on dotted mint background", "red circle"), size=24):
    conditioning = toy.collate(toy.load_encoders("cpu").encode_text([Prompt(c) for c in captions]))
    latents = torch.randn(len(captions), *toy.latents.shape(1, size, size))
    return latents, torch.rand(len(captions)), conditioning


def test_it_is_an_architecture_and_its_base_is_small(toy):
    assert isinstance(toy, Architecture)
    toy.check()
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 6_000_000
    assert {p.dtype for p in toy.load_transformer().parameters()} == {torch.float32}


def test_the_codec_puts_each_block_of_pixels_into_the_channels_of_its_cell_and_back(toy):
    encoders = toy.load_encoders("cpu")
    pixels = torch.rand(2, 3, 1, 8, 12) * 2 - 1
    latents = encoders.encode_pixels(pixels)
    assert latents.shape == (2, 12, 1, 4, 6)
    for y in range(4):
        for x in range(6):
            block = pixels[:, :, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            assert torch.equal(latents[:, :, 0, y, x].sort().values, block.flatten(1).sort().values)
    assert torch.equal(encoders.decode_pixels(latents), pixels)


def test_a_word_is_the_bits_of_its_hash():
    bits = "".join(f"{byte:08b}" for byte in hashlib.shake_256(b"zarp").digest(6))
    assert word_vector("zarp", 48).tolist() == [1.0 if bit == "1" else -1.0 for bit in bits]


def test_captions_are_bags_of_words_padded_with_zeros(toy):
    short, empty = toy.load_encoders("cpu").encode_text([Prompt("red circle"), Prompt("")])
    batch = toy.collate([short, empty]).text
    assert batch.shape == (2, toy.text_length, toy.text_dim)
    assert torch.equal(batch[0, :2], torch.stack([word_vector("red", 48), word_vector("circle", 48)]))
    assert not batch[0, 2:].any()
    assert not batch[1].any()


def test_captions_that_are_too_long_are_refused(toy):
    with pytest.raises(ValueError, match="has 9 words, model=toy takes 8"):
        toy.load_encoders("cpu").encode_text([Prompt("a b c d e f g h i")])
    with pytest.raises(ValueError, match="a cached caption has 9 tokens, model.text_length is 8"):
        toy.collate([ToyConditioning(torch.zeros(9, 48))])


def test_the_true_velocity_walks_diffusers_scheduler_back_to_the_latents(toy):
    latents, _, _ = inputs(toy)
    noise = torch.randn_like(latents)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=toy.sigma.shift)
    scheduler.set_timesteps(7)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(flow.velocity(latents, noise), timestep, x).prev_sample
    assert torch.allclose(x, latents, atol=1e-5)


def test_the_base_predicts_the_velocity_of_its_own_world_far_better_than_nothing(toy):
    from benchmarks.phantom_limb.world import named_scenes, render

    scenes, captions = named_scenes(32, torch.Generator().manual_seed(5))
    encoders = toy.load_encoders("cpu")
    latents = encoders.encode_pixels(render(scenes)[:, :, None] * 2 - 1)
    noise = torch.randn_like(latents)
    sigma = torch.linspace(0.2, 0.9, 32)
    conditioning = toy.collate(encoders.encode_text([Prompt(c) for c in captions]))
    pred = toy.velocity(toy.load_transformer(), flow.interpolate(latents, noise, sigma), sigma, conditioning)
    target = flow.velocity(latents, noise)
    assert (pred - target).square().mean() < 0.1 * target.square().mean()
    wrong = toy.velocity(toy.load_transformer(), flow.interpolate(latents, noise, 1 - sigma), sigma, conditioning)
    assert (wrong - target).square().mean() > 0.2 * target.square().mean()


def test_padding_to_another_length_changes_what_the_model_says_so_the_length_is_fixed(toy):
    latents, sigma, conditioning = inputs(toy)
    longer = ToyConditioning(torch.nn.functional.pad(conditioning.text, (0, 0, 0, 4)))
    model = toy.load_transformer()
    assert not torch.allclose(
        toy.velocity(model, latents, sigma, conditioning), toy.velocity(model, latents, sigma, longer), atol=1e-5
    )


def test_the_teacher_is_the_base_bit_for_bit(toy):
    model, base = toy.load_transformer(), toy.load_transformer()
    inject(model, Adapter(rank=4, alpha=4), toy.lora_targets, seed=0)
    helpers.randomise_adapter(model)
    latents, sigma, conditioning = inputs(toy)
    expected = toy.velocity(base, latents, sigma, conditioning)
    noisy = flow.Noisy(latents, sigma, latents)
    assert torch.equal(Teacher().predict(toy, model, noisy, conditioning, [0, 1]), expected)
    assert not torch.equal(toy.velocity(model, latents, sigma, conditioning), expected)
    with adapters_off(model):
        assert torch.equal(toy.velocity(model, latents, sigma, conditioning), expected)


def test_two_sizes_and_gradients_to_every_adapter(toy):
    model = toy.load_transformer()
    inject(model, Adapter(rank=4, alpha=4), toy.lora_targets, seed=0)
    helpers.randomise_adapter(model)
    for size in (24, 32):
        latents, sigma, conditioning = inputs(toy, size=size)
        toy.velocity(model, latents, sigma, conditioning).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 * (2 * 4 + 2) * 2  # blocks, modules of each, A and B
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.text_dim=56", "has text_dim=48, model=toy needs 56"),
        ("model.latents.channels=27,model.latents.spatial_stride=3", "has in_channels=14, model=toy needs 29"),
        ("model.latents.patch=[1,1,1]", r"has patch_size=\[1, 2, 2\], model=toy needs \[1, 1, 1\]"),
        ("model.pretrained=nowhere", "model.pretrained=nowhere is not there"),
    ],
)
def test_a_transformer_of_another_shape_is_refused(override, message):
    cfg = helpers.config(
        "train", ["model=toy", f"model.pretrained={BASE}", "data.cache_dir=x", *re.split(r",(?=model)", override)]
    )
    with pytest.raises(ValueError, match=message):
        helpers.build(cfg.model).check()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.latents.channels=16", "stride 2 makes 12 channels"),
        ("model.text_dim=50", "multiple of 8, got 50"),
        ("model.latents.temporal_stride=4", "must be 1 for model=toy, got 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, message):
    cfg = helpers.config("train", ["model=toy", f"model.pretrained={BASE}", "data.cache_dir=x", override])
    with pytest.raises(ValueError, match=message):
        helpers.build(cfg.model)


def test_constructing_it_opens_nothing(monkeypatch):
    cfg = helpers.config("train", ["model=toy", "model.pretrained=/nowhere", "data.cache_dir=x"])
    monkeypatch.setattr("mpp.models.families.toy.resolve_folder", lambda *_: pytest.fail("opened"))
    assert isinstance(helpers.build(cfg.model), Toy)
