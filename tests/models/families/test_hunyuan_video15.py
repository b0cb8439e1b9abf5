import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
)

from mpp.cache.format import read_tensors, write_tensors
from mpp.lora.adapters import Adapter, inject
from mpp.media.geometry import image_tensor
from mpp.models.contract import Prompt
from mpp.models.families.hunyuan_video15 import HunyuanVideo15, HunyuanVideo15Conditioning
from tests.families.base import architecture, batch, image, pixels
from tests.families.hunyuan_video15 import TARGETS, VARIANTS, transformer
from tests.helpers import config, randomise_adapter, unchecked_error
from tests.models.test_contract import generation_of

T2V, I2V = VARIANTS
PLAIN, QUOTING = "a cat", 'a sign says "OPEN" and “24 h”'


@pytest.fixture(scope="module")
def folders(built):
    """Both pipelines."""
    return {variant.name: built(variant) for variant in VARIANTS}


@pytest.fixture(scope="module", params=VARIANTS, ids=["t2v", "i2v"])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def arch(variant, folders):
    return architecture(variant, folders[variant.name])


@pytest.fixture(scope="module")
def t2v(folders):
    return architecture(T2V, folders[T2V.name])


@pytest.fixture(scope="module")
def i2v(folders):
    return architecture(I2V, folders[I2V.name])


def theirs(folder):
    """Diffusers' own pipeline, whole, from its folders."""
    parts = {
        "text_encoder": Qwen2_5_VLTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "transformer": HunyuanVideo15Transformer3DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKLHunyuanVideo15.from_pretrained(folder / "vae"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "text_encoder_2": T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        "tokenizer_2": ByT5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        "guider": ClassifierFreeGuidance(guidance_scale=1.0),
    }
    kind = HunyuanVideo15Pipeline
    if (folder / "image_encoder").is_dir():
        kind = HunyuanVideo15ImageToVideoPipeline
        parts["image_encoder"] = SiglipVisionModel.from_pretrained(folder / "image_encoder")
        parts["feature_extractor"] = SiglipImageProcessor.from_pretrained(folder / "feature_extractor")
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls_of(model):
    """The arguments of every call of a transformer, as they come."""
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def steps_of(monkeypatch):
    """Sigma, sample and model output of every step of the scheduler, as they come."""
    seen, original = [], FlowMatchEulerDiscreteScheduler.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        seen.append((self.sigmas[self.index_for_timestep(timestep)], sample.clone(), model_output.clone()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", spy)
    return seen


def texts(arch, *captions):
    encoders = arch.load_encoders("cpu")
    return arch.collate(encoders.encode_text([Prompt(caption) for caption in captions]))


def noise(count=1, seed=0):
    return torch.randn(count, 32, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("captions", [[PLAIN], [PLAIN, QUOTING, ""], ["x" * 2000 + f' "{"y" * 400}"', PLAIN]])
def test_both_texts_are_what_the_pipeline_encodes(t2v, folders, captions):
    ours = texts(t2v, *captions)
    with torch.no_grad():
        text, mask, glyphs, glyph_mask = theirs(folders[T2V.name]).encode_prompt(captions, batch_size=len(captions))
    assert torch.equal(ours.text_mask.sum(1), mask.sum(1).long())
    assert torch.equal(ours.glyph_mask.sum(1), glyph_mask.sum(1).long())
    torch.testing.assert_close(ours.text[ours.text_mask], text[mask.bool()])
    torch.testing.assert_close(ours.glyphs[ours.glyph_mask], glyphs[glyph_mask.bool()])
    assert ours.text.shape[1] <= 1000
    assert ours.glyphs.shape[1] <= 256


def test_captions_that_quote_nothing_have_no_glyphs_and_survive_the_cache(t2v, tmp_path):
    (record,) = t2v.load_encoders("cpu").encode_text([Prompt(PLAIN)])
    assert record.glyphs.shape == (0, 24)
    write_tensors(tmp_path / "text.safetensors", record.tensors(), {})
    again = HunyuanVideo15Conditioning.from_tensors(read_tensors(tmp_path / "text.safetensors"))
    assert again.glyphs.shape == (0, 24)
    assert torch.equal(again.text, record.text)


def test_quoted_text_matters_and_its_padding_does_not(t2v):
    model = t2v.load_transformer()
    together, alone = texts(t2v, PLAIN, QUOTING), texts(t2v, PLAIN)
    assert together.glyphs.shape[1] > alone.glyphs.shape[1]
    with torch.no_grad():
        both = t2v.velocity(model, noise().expand(2, -1, -1, -1, -1), torch.tensor([0.4, 0.4]), together)
        one = t2v.velocity(model, noise(), torch.tensor([0.4]), alone)
        quoting = together.select([1])
        unquoted = replace(quoting, glyph_mask=torch.zeros_like(quoting.glyph_mask))
        mute = t2v.velocity(model, noise(), torch.tensor([0.4]), unquoted)
    torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-5)
    assert (both[1:] - mute).abs().max() > 1e-4


def test_latents_are_what_the_pipeline_makes_of_an_image(i2v, folders):
    pipe = theirs(folders[I2V.name])
    shown = image(48, 32, 0)
    with torch.no_grad():
        want = pipe._get_image_latents(pipe.vae, pipe.video_processor, shown, 32, 48, torch.device("cpu"))
    got = i2v.load_encoders("cpu").encode_pixels(image_tensor(shown)[None])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert pipe.vae.config.scaling_factor != 1


def test_a_batch_of_clips_has_the_latents_of_each(t2v):
    encoders = t2v.load_encoders("cpu")
    clips = torch.cat([pixels(t2v, T2V, (2, 3), seed) for seed in range(2)])
    assert torch.equal(encoders.encode_pixels(clips)[1:], encoders.encode_pixels(clips[1:]))


def test_a_first_frame_is_seen_as_diffusers_pipeline_shows_it(i2v, folders, monkeypatch):
    # The pipeline as it is: it chooses its own size, resizes, and encodes text and image.
    pipe = theirs(folders[I2V.name])
    pipe.target_size = 64
    seen, steps = calls_of(pipe.transformer), steps_of(monkeypatch)
    shown_ = image(80, 48, 1)
    pipe(image=shown_, prompt=QUOTING, num_frames=5, num_inference_steps=2, generator=torch.manual_seed(0))
    height, width = (16 * side for side in seen[0]["hidden_states"].shape[-2:])
    shown = pipe.video_processor.resize(shown_, height=height, width=width, resize_mode="crop")

    encoders = i2v.load_encoders("cpu")
    clip = torch.rand(1, 3, 5, height, width) * 2 - 1
    clip[0, :, :1] = image_tensor(shown)
    (text,) = encoders.encode_text([Prompt(QUOTING)])
    record = i2v.collate([type(text)(text.text, text.glyphs, **encoders.encode_images(clip, ()))])
    torch.testing.assert_close(record.image_embeds, seen[0]["image_embeds"], rtol=1e-4, atol=1e-5)
    model = i2v.load_transformer()
    mine = calls_of(model)
    for (sigma, sample, output), call in zip(steps, seen, strict=True):
        with torch.no_grad():
            ours = i2v.velocity(model, sample, sigma[None], record)
        torch.testing.assert_close(mine[-1]["hidden_states"], call["hidden_states"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
    assert seen[0]["hidden_states"][:, 32:64, 0].abs().min() > 0


def test_an_image_of_another_size_is_cropped_to_the_samples(i2v):
    encoders, model = i2v.load_encoders("cpu"), i2v.load_transformer()
    record = batch(i2v, I2V, encoders, (PLAIN,)).conditioning
    frames = i2v.generate(model, encoders, record, None, generation_of(i2v, I2V, controls=(image(100, 70, 0),)))
    assert frames.shape == (5, 3, 32, 48)


def test_a_still_is_text_to_video_even_for_an_image_to_video_model(i2v, monkeypatch):
    encoders, model = i2v.load_encoders("cpu"), i2v.load_transformer()
    assert encoders.encode_images(pixels(i2v, I2V, (2, 3), 0)[:, :, :1], ()) == {}
    record, steps = texts(i2v, PLAIN), steps_of(monkeypatch)
    seen = calls_of(model)
    frames = i2v.generate(model, encoders, record, None, generation_of(i2v, I2V, frames=1, controls=()))
    assert frames.shape == (1, 3, 32, 48)
    assert all(call["image_embeds"].abs().sum() == 0 for call in seen)
    for sigma, sample, output in steps:
        with torch.no_grad():
            ours = i2v.velocity(model, sample, sigma[None], record)
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)


def test_image_to_video_without_an_image_is_refused(i2v):
    encoders, model = i2v.load_encoders("cpu"), i2v.load_transformer()
    record = batch(i2v, I2V, encoders, (PLAIN,)).conditioning
    with pytest.raises(ValueError, match="no image"):
        i2v.generate(model, encoders, record, None, generation_of(i2v, I2V, controls=()))


def test_text_to_video_ignores_the_first_frame(t2v):
    assert t2v.load_encoders("cpu").encode_images(pixels(t2v, T2V, (2, 3), 0), ()) == {}
    assert not t2v.images.first_frame


def test_samples_with_and_without_an_image_never_share_a_batch(i2v):
    encoders = i2v.load_encoders("cpu")
    (text,) = encoders.encode_text([Prompt(PLAIN)])
    fields = encoders.encode_images(pixels(i2v, I2V, (2, 3), 0), ())
    others = encoders.encode_images(pixels(i2v, I2V, (3, 2), 0), ())
    moving, still, tall = (type(text)(text.text, text.glyphs, **found) for found in (fields, {}, others))
    assert i2v.collate([moving, moving]).image_embeds.shape == (2, 16, 20)
    assert i2v.collate([still, still]).image_embeds is None
    with pytest.raises(ValueError, match=r"image_latents of shapes .*None"):
        i2v.collate([moving, still])
    with pytest.raises(ValueError, match="image_latents of shapes"):
        i2v.collate([moving, tall])


def test_guidance_is_the_pipelines_and_runs_only_with_a_negative(t2v, monkeypatch):
    encoders, model = t2v.load_encoders("cpu"), t2v.load_transformer()
    positive, negative = texts(t2v, QUOTING), texts(t2v, "bad")
    seen, steps = calls_of(model), steps_of(monkeypatch)
    t2v.generate(model, encoders, positive, None, generation_of(t2v, T2V))
    assert len(seen) == len(steps) == 3
    t2v.generate(model, encoders, positive, None, generation_of(t2v, T2V, guidance_scale=6.0))
    assert len(seen) == 6
    t2v.generate(model, encoders, positive, negative, generation_of(t2v, T2V, guidance_scale=1.0))
    assert len(seen) == 9
    t2v.generate(model, encoders, positive, negative, generation_of(t2v, T2V, guidance_scale=6.0))
    assert len(seen) == 15
    sigma, sample, output = steps[-1]
    with torch.no_grad():
        towards, away = (t2v.velocity(model, sample, sigma[None], record) for record in (positive, negative))
    torch.testing.assert_close(output, away + 6 * (towards - away), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "timestep"), [(torch.float32, 487.3), (torch.bfloat16, 488)])
def test_without_autocast_timesteps_are_in_the_weights_dtype(arch, variant, dtype, timestep):
    # In any other the transformer's time embedding raises over bf16 weights.
    model = arch.load_transformer().to(dtype)
    seen = calls_of(model)
    data = batch(arch, variant, arch.load_encoders("cpu"), (PLAIN,))
    with torch.no_grad():
        prediction = arch.velocity(model, data.latents, torch.tensor([0.4873]), data.conditioning)
    assert {t.dtype for t in seen[0].values() if isinstance(t, torch.Tensor) and t.is_floating_point()} == {dtype}
    assert seen[0]["timestep"].item() == pytest.approx(timestep)
    assert torch.isfinite(prediction).all()


def test_sigmas_that_coincide_in_bf16_give_different_predictions_under_autocast(t2v):
    drawn = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    first = drawn[0]
    second = (first * 1000 + 0.25 + 0.5 * drawn[1]) / 1000
    coincide = (first * 1000).bfloat16() == (second * 1000).bfloat16()
    pairs = torch.stack([first[coincide], second[coincide]])[:, :4]
    assert pairs.shape == (2, 4)
    exact, model = t2v.load_transformer().eval(), t2v.load_transformer().to(torch.bfloat16).eval()
    embeddings = []
    model.time_embed.register_forward_hook(lambda module, args, output: embeddings.append(output))
    text, latents = texts(t2v, PLAIN), noise()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = torch.stack([t2v.velocity(model, latents, s[None], text).float() for s in pairs.flatten()])
    with torch.no_grad():
        want = torch.stack([t2v.velocity(exact, latents, s[None], text) for s in pairs.flatten()])
    assert {e.dtype for e in embeddings} == {torch.bfloat16}
    apart, wanted = got[:4] - got[4:], want[:4] - want[4:]
    assert (apart.flatten(1).abs().amax(1) > 0).all()
    # in the direction of float32: that of rounding alone is near 0
    assert torch.nn.functional.cosine_similarity(apart.flatten(), wanted.flatten(), dim=0) > 0.5


def test_float32_adapters_train_over_bf16_weights_under_autocast(arch, variant):
    data = batch(arch, variant, arch.load_encoders("cpu"), (PLAIN, QUOTING))
    model = arch.load_transformer().to(torch.bfloat16).train()
    inject(model, Adapter(rank=4), arch.lora_targets, seed=0)
    randomise_adapter(model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        prediction = arch.velocity(model, data.latents, torch.tensor([0.3, 0.8]), data.conditioning)
    prediction.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in adapters)


@pytest.mark.parametrize("name", ["hunyuan_video15", pytest.param("hunyuan_video15_i2v", marks=pytest.mark.slow)])
def test_published_targets_are_the_layers_of_the_blocks_that_reach_the_output(t2v, name):
    published = config("train", [f"model={name}", "data.cache_dir=x"]).model.lora_targets
    assert published.replace("(?!53", "(?!1") == TARGETS
    torch.manual_seed(0)
    model = transformer(num_layers=54)
    layers = {
        layer: module
        for layer, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.match(r"transformer_blocks\.\d+\.(attn|ff)", layer)
    }
    t2v.velocity(model, noise(), torch.tensor([0.4]), texts(t2v, QUOTING)).square().sum().backward()
    alive = {layer for layer, module in layers.items() if module.weight.grad is not None and module.weight.grad.any()}
    targeted = {layer for layer, _ in model.named_modules() if re.fullmatch(published, layer)}
    assert targeted == alive
    assert len(layers) - len(alive) == 4


def test_names_in_comfyui_are_those_of_hunyuan_video_there(t2v):
    # ComfyUI holds HunyuanVideo 1.0 and 1.5 in one class, whose names comfy/lora.py relates to those of 1.0's files
    # like this; and those files diffusers can convert.
    comfy = {"_attn.qkv.": "_attn_qkv.", "_attn.proj.": "_attn_proj.", "mlp.0.": "mlp.fc1.", "mlp.2.": "mlp.fc2."}
    state = {
        layer: torch.randn(module.weight.shape)
        for layer, module in transformer().named_modules()
        if isinstance(module, torch.nn.Linear) and re.match(r"transformer_blocks\.\d+\.(attn|ff)", layer)
    }
    original = {}
    for layer in state:
        (rule,) = (rule for rule in t2v.names_in("comfyui").rules if re.fullmatch(rule.pattern, layer))
        parts = [re.sub(rule.pattern, part, layer) for part in rule.parts] or [layer]
        name = re.sub(rule.pattern, rule.name, layer) + ".weight"
        (renamed,) = (name.replace(ours, theirs) for ours, theirs in comfy.items() if ours in name)
        original[renamed] = torch.cat([state[part] for part in parts])
    converted = convert_hunyuan_video_transformer_to_diffusers(original)
    assert converted.keys() == {f"{layer}.weight" for layer in state}
    assert all(torch.equal(converted[f"{layer}.weight"], weight) for layer, weight in state.items())


def test_native_names_are_tencents(t2v):
    """MMDoubleStreamBlock of hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py, and musubi-tuner's."""
    streams = [f"{stream}_{layer}" for stream in ("img", "txt") for layer in (
        "attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2",
    )]  # fmt: skip
    layers = [
        layer
        for layer, module in transformer().named_modules()
        if isinstance(module, torch.nn.Linear) and re.match(r"transformer_blocks\.1\.(attn|ff)", layer)
    ]
    for rules in (t2v.native, t2v.names_in("kohya").rules):
        names = [re.sub(rule.pattern, rule.name, layer) for layer in layers for rule in rules
                 if re.fullmatch(rule.pattern, layer) and not rule.parts]  # fmt: skip
        assert sorted(names) == sorted(f"double_blocks.1.{name}" for name in streams)


def test_weights_of_the_other_task_and_step_distilled_ones_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="has task_type=t2v, this model config needs i2v"):
        architecture(I2V, folders[T2V.name]).check()
    with pytest.raises(ValueError, match="has task_type=i2v, this model config needs t2v"):
        architecture(T2V, folders[I2V.name]).check()
    shutil.copytree(folders[I2V.name] / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_meanflow": True}))
    with pytest.raises(ValueError, match="use_meanflow=True"):
        architecture(I2V, tmp_path).check()


def test_unknown_tasks_and_other_vaes_are_refused(folders):
    error = unchecked_error(HunyuanVideo15, pretrained="x", latents=None, sigma=None, lora_targets=(), task="v2v")
    assert error == "ValueError: model.task must be t2v or i2v, got 'v2v'"
    with pytest.raises(ValueError, match="32 channels at stride 16, the model needs 32 at 8"):
        architecture(T2V, folders[T2V.name], "model.latents.spatial_stride=8").load_encoders("cpu").vae()


def test_identity_of_text_covers_every_encoder_that_makes_conditioning(folders, tmp_path):
    before = architecture(I2V, folders[I2V.name]).identity()
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        copy = tmp_path / name
        shutil.copytree(folders[I2V.name], copy)
        weights = copy / name / "model.safetensors"
        state = load_file(weights)
        save_file({k: v + 0.01 for k, v in state.items()}, weights, metadata={"format": "pt"})
        after = architecture(I2V, copy).identity()
        assert after.text_encoder != before.text_encoder
        assert (after.transformer, after.vae) == (before.transformer, before.vae)
