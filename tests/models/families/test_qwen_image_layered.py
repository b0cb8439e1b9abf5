from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image

from mpp.lora.adapters import Adapter, inject
from mpp.models.contract import Generation, Prompt
from mpp.models.families.qwen_image_layered import LayeredConditioning
from tests.families import qwen_image as tiny
from tests.families.base import architecture, batch, image, pixels
from tests.families.qwen_image_layered import VARIANTS

WITH_BASE, WITHOUT = VARIANTS


@pytest.fixture(scope="module")
def folder(built):
    """A tiny random pipeline."""
    return built(WITH_BASE)


@pytest.fixture
def make(folder):
    """The architecture with the base frame or without, and its encoders."""

    def of(variant=WITH_BASE, *overrides):
        arch = architecture(variant, folder, *overrides)
        return arch, arch.load_encoders("cpu")

    return of


def witness(encoders):
    """The pipeline itself with the VAE."""
    return QwenImageLayeredPipeline(
        scheduler=None, vae=encoders.vae(), text_encoder=None, tokenizer=None, processor=None, transformer=None
    )


def test_text_is_what_the_pipeline_makes_of_it(make):
    _, encoders = make()
    captions = ["a photo of a cat", "", "Tom & Jerry are here " * 60]
    records = encoders.encode_text([Prompt(caption) for caption in captions])
    pipe = encoders.text_pipeline(QwenImageLayeredPipeline, processor=None)
    for caption, record in zip(captions, records, strict=True):
        with torch.no_grad():
            want, _ = pipe.encode_prompt([caption], max_sequence_length=512)
        torch.testing.assert_close(record.text, want[0])
    assert records[2].text.shape[0] == 512


def test_every_frame_is_encoded_as_an_image_of_its_own(make):
    arch, encoders = make()
    clip = pixels(arch, WITH_BASE, (2, 3), 0)
    latents = encoders.encode_pixels(clip)
    for frame in range(3):
        with torch.no_grad():
            want = witness(encoders)._encode_vae_image(clip[:, :, frame : frame + 1], None)
        torch.testing.assert_close(latents[:, :, frame : frame + 1], want)


def test_the_condition_is_what_the_pipeline_prepares_of_the_whole_image(make):
    _, encoders = make()
    shown = image(48, 32, 0).convert("RGBA")
    shown.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (32, 1))))
    pipe = witness(encoders)
    frame = pipe.image_processor.preprocess(shown, 32, 48)[:, :, None]
    clip = torch.cat([frame, -frame, frame.flip(-1)], 2)
    condition = encoders.encode_images(clip, ())["condition"]
    _, packed = pipe.prepare_latents(frame, 1, 16, 32, 48, 2, torch.float32, "cpu", torch.Generator())
    torch.testing.assert_close(pipe._pack_latents(condition[None], 1, 16, 4, 6, 1), packed)


@pytest.mark.parametrize("variant", VARIANTS, ids=["base", "layers only"])
def test_the_transformer_sees_the_frames_and_the_condition_and_no_more(make, variant):
    arch, encoders = make(variant)
    data = batch(arch, variant, encoders, ("x", "a longer y"))
    frames = 3 - arch.given_frames
    assert data.latents.shape[2] == frames
    transformer, seen, sigma = arch.load_transformer(), {}, torch.tensor([0.3, 0.8])
    hook = transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        ours = arch.velocity(transformer, data.latents, sigma, data.conditioning)
    hook.remove()
    pack, unpack = QwenImageLayeredPipeline._pack_latents, QwenImageLayeredPipeline._unpack_latents
    noisy = pack(data.latents.permute(0, 2, 1, 3, 4).contiguous(), 2, 16, 4, 6, frames)
    clean = pack(data.conditioning.condition, 2, 16, 4, 6, 1)
    with torch.no_grad():
        theirs = transformer(
            hidden_states=torch.cat([noisy, clean], 1),
            encoder_hidden_states=data.conditioning.text,
            encoder_hidden_states_mask=data.conditioning.mask,
            timestep=sigma,
            img_shapes=[[(1, 2, 3)] * (frames + 1)] * 2,
            additional_t_cond=torch.zeros(2, dtype=torch.long),
            return_dict=False,
        )[0][:, : frames * 6]
    assert torch.equal(ours, unpack(theirs, 32, 48, frames - 1, 8))
    assert seen["hidden_states"].shape[1] == (frames + 1) * 6


def test_the_condition_matters_and_is_told_from_a_layer(make):
    arch, encoders = make()
    data = batch(arch, WITH_BASE, encoders, ("x",))
    transformer, sigma = arch.load_transformer(), torch.tensor([0.5])
    text, mask, condition = (getattr(data.conditioning, name) for name in ("text", "mask", "condition"))
    with torch.no_grad():
        before = arch.velocity(transformer, data.latents, sigma, data.conditioning)
        other = arch.velocity(transformer, data.latents, sigma, LayeredConditioning(text, mask, -condition))
        # as the noisy frame behind the layers, with the last layer as the condition
        swapped = torch.cat([data.latents[:, :, :2], condition], 2)
        last = LayeredConditioning(text, mask, data.latents[:, :, 2:])
        there = arch.velocity(transformer, swapped, sigma, last)
    assert (other - before).abs().max() > 1e-4
    assert (there[:, :, :2] - before[:, :, :2]).abs().max() > 1e-4


def test_at_the_pipelines_own_size_nothing_differs_from_the_pipeline(make, monkeypatch):
    arch, encoders = make()
    latents = torch.randn(1, 16, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(QwenImageLayeredPipeline, "_encode_vae_image", lambda self, image, generator: latents)
    record = arch.collate(encoders.encode_text([Prompt("x")]))
    transformer, shown = arch.load_transformer(), image(64, 64, 0).convert("RGBA")
    ours = arch.pipeline(transformer, encoders)
    theirs = QwenImageLayeredPipeline(**ours.components)

    def generated(pipe, **size):
        """Latents after both steps; nothing is decoded."""
        found = []

        def keep(pipe, step, timestep, tensors):
            found.append(tensors["latents"])
            if step == 1:
                raise StopIteration
            return {}

        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(StopIteration):
            pipe(
                image=shown,
                prompt="x",
                prompt_embeds=record.text,
                prompt_embeds_mask=record.mask,
                layers=1,
                true_cfg_scale=1.0,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(1),
                callback_on_step_end=keep,
                **size,
            )
        return found

    got, want = generated(ours, width=640, height=640), generated(theirs)
    assert len(got) == len(want) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_pipelines_rule_for_sizes_is_as_it_was_after_sampling(make):
    arch, encoders = make()
    rule = pipeline_qwenimage_layered.calculate_dimensions
    record = arch.collate(encoders.encode_text([Prompt("x")]))
    generation = Generation(48, 32, 2, 2, 1.0, 0, (image(48, 32, 0),))
    layers = arch.generate(arch.load_transformer(), encoders, record, None, generation)
    assert layers.shape == (2, 4, 32, 48)
    assert pipeline_qwenimage_layered.calculate_dimensions is rule
    broken = arch.load_transformer()
    broken.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        arch.generate(broken, encoders, record, None, generation)
    assert pipeline_qwenimage_layered.calculate_dimensions is rule


def test_without_the_base_frame_every_generated_frame_is_a_layer(make, monkeypatch):
    arch, encoders = make(WITHOUT)
    record = arch.collate(encoders.encode_text([Prompt("x")]))
    final, decoded = [], []
    pipe_class = type(arch.pipeline(arch.load_transformer(), encoders))
    original = QwenImageLayeredPipeline._unpack_latents

    def spy(tokens, *sizes):
        final.append(original(tokens, *sizes))
        return final[-1]

    monkeypatch.setattr(QwenImageLayeredPipeline, "_unpack_latents", staticmethod(spy))
    vae = encoders.vae()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **kwargs: decoded.append(z) or decode(z, **kwargs))
    generation = Generation(48, 32, 3, 2, 1.0, 0, (image(48, 32, 0),))
    generated = arch.generate(arch.load_transformer(), encoders, record, None, generation)
    assert pipe_class.__name__ == "BaselessLayeredPipeline"
    assert generated.shape == (3, 4, 32, 48)
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close((decoded[0].permute(2, 1, 0, 3, 4) - mean) / std, final[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 2])
def test_a_sample_needs_the_image_to_take_apart(make, count):
    arch, encoders = make()
    record = arch.collate(encoders.encode_text([Prompt("x")]))
    generation = Generation(48, 32, 2, 2, 1.0, 0, (image(48, 32, 0),) * count)
    with pytest.raises(ValueError, match=f"has {count} control images, qwen_image_layered takes 1"):
        arch.generate(arch.load_transformer(), encoders, record, None, generation)


def test_guidance_runs_only_with_a_negative_prompt(make):
    arch, encoders = make()
    positive, negative = (arch.collate([record]) for record in encoders.encode_text([Prompt("x"), Prompt(" ")]))
    transformer, calls = arch.load_transformer(), []
    transformer.register_forward_pre_hook(lambda *a: calls.append(a))
    generation = Generation(48, 32, 2, 2, 4.0, 0, (image(48, 32, 0),))
    plain = arch.generate(transformer, encoders, positive, None, generation)
    assert len(calls) == 2
    guided = arch.generate(transformer, encoders, positive, negative, generation)
    assert len(calls) == 6
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("variant", VARIANTS, ids=["base", "layers only"])
def test_samples_are_generated_with_the_dtypes_that_configs_have(make, variant):
    arch, encoders = make(variant, "model.dtype=bfloat16", "model.text_dtype=bfloat16")
    record = arch.collate(encoders.encode_text([Prompt("x")]))
    assert encoders.vae().dtype == torch.float32
    generation = Generation(48, 32, 2, 2, 1.0, 0, (image(64, 64, 0),))
    assert arch.generate(arch.load_transformer(), encoders, record, None, generation).shape == (2, 4, 32, 48)


def test_a_bf16_base_trains_float32_adapters_under_autocast(make):
    data = batch(make()[0], WITH_BASE, make()[1], ("x", "a longer y"))
    arch, _ = make(WITH_BASE, "model.dtype=bfloat16")
    transformer = arch.load_transformer().train()
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = arch.velocity(transformer, data.latents, torch.tensor([0.3, 0.8]), data.conditioning)
    prediction.float().square().mean().backward()
    gradients = [p.grad for p in transformer.parameters() if p.requires_grad]
    assert gradients
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_validating_first_in_inference_mode_does_not_spoil_training(make):
    arch, encoders = make()
    data = batch(arch, WITH_BASE, encoders, ("x",))
    transformer = arch.load_transformer().train()
    rope = transformer.pos_embed
    # diffusers caches the tables on the model's device; on the CPU itself nothing would be copied
    rope._get_device_freqs = lru_cache(lambda device: (rope.pos_freqs.clone(), rope.neg_freqs.clone()))
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    with torch.inference_mode():
        first = arch.velocity(transformer, data.latents, torch.tensor([0.5]), data.conditioning)
    again = arch.velocity(transformer, data.latents, torch.tensor([0.5]), data.conditioning)
    torch.testing.assert_close(again, first.clone())
    again.square().mean().backward()


def test_images_of_other_sizes_are_not_batched(make):
    arch, _ = make()
    text = torch.zeros(3, 32)
    items = [LayeredConditioning(text, None, torch.zeros(16, 1, 4, size)) for size in (4, 6)]
    with pytest.raises(ValueError, match="differ in the latents of the whole image: 16x1x4x4, 16x1x4x6"):
        arch.collate(items)


def test_other_transformers_vaes_and_latents_are_refused(folder, tmp_path):
    tiny.build(tmp_path)
    with pytest.raises(ValueError, match="use_additional_t_cond=False, this model config needs True"):
        architecture(WITH_BASE, tmp_path).check()
    with pytest.raises(ValueError, match="of 3-channel images, the model needs 16 at 8 of 4-channel ones"):
        architecture(WITH_BASE, tmp_path).load_encoders("cpu").vae()
    with pytest.raises(Exception, match="needs model.latents.layered=true"):
        architecture(WITH_BASE, folder, "model.latents.layered=false")
