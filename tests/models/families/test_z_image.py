import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, ZImageImg2ImgPipeline, ZImagePipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Model

from mpp.lora.adapters import Adapter, inject
from mpp.models.contract import Generation, Prompt
from tests.families.base import architecture, batch, pixels
from tests.families.z_image import VARIANTS, transformer

(VARIANT,) = VARIANTS
SHORT, LONG = "a red box", "a cat on a blue chair by the sea, " * 3


@pytest.fixture(scope="module")
def folder(built):
    return built(VARIANT)


@pytest.fixture(scope="module")
def arch(folder):
    return architecture(VARIANT, folder)


@pytest.fixture(scope="module")
def encoders(arch):
    return arch.load_encoders("cpu")


def generation(steps=2, guidance_scale=1.0):
    return Generation(width=48, height=32, frames=1, steps=steps, guidance_scale=guidance_scale, seed=0)


def seen_by_scheduler(arch, encoders, model, positive, negative, generation, monkeypatch):
    """Sigma, latents and prediction of each step of the pipeline."""
    steps = []
    kind = type(arch.pipeline(model, encoders).scheduler)
    original = kind.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        steps.append((float(timestep) / 1000, sample[:, :, None].clone(), model_output[:, :, None].clone()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(kind, "step", spy)
    arch.generate(model, encoders, positive, negative, generation)
    return steps


def test_text_is_the_pipelines_own_at_each_captions_length(arch, folder, encoders):
    pipe = ZImagePipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder"),
        vae=None, scheduler=None, transformer=None,
    )  # fmt: skip
    for caption in (SHORT, LONG, ""):
        (expected,), _ = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        (record,) = encoders.encode_text([Prompt(caption)])
        torch.testing.assert_close(record.text, expected, rtol=1e-4, atol=1e-5)
    together = encoders.encode_text([Prompt(SHORT), Prompt(LONG)])
    assert len({record.text.shape[0] for record in together}) == 2
    alone = encoders.encode_text([Prompt(LONG)])[0]
    torch.testing.assert_close(together[1].text, alone.text, rtol=1e-4, atol=1e-5)


def test_long_captions_are_cut_as_the_pipeline_cuts_them(folder):
    short = architecture(VARIANT, folder, "model.text_length=40").load_encoders("cpu")
    (record,) = short.encode_text([Prompt(LONG)])
    assert record.text.shape == (40, 24)


def test_latents_are_those_of_the_pipeline(arch, folder, encoders, monkeypatch):
    clip = pixels(arch, VARIANT, (2, 3), 0)
    pipe = ZImageImg2ImgPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        scheduler=None, tokenizer=None, text_encoder=None, transformer=None,
    )  # fmt: skip
    pipe.scheduler = SimpleNamespace(scale_noise=lambda latents, timestep, noise: latents)
    # the pipeline draws from the posterior, mpp takes its mode
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with torch.no_grad():
        expected = pipe.prepare_latents(clip[:, :, 0], None, 1, 16, 32, 48, torch.float32, "cpu", None)
    torch.testing.assert_close(encoders.encode_pixels(clip)[:, :, 0], expected)


def test_clips_are_refused(arch, encoders):
    with pytest.raises(ValueError, match="single images, got a clip of 5 frames"):
        encoders.encode_pixels(torch.zeros(1, 3, 5, 32, 48))


def test_captions_of_different_length_in_a_batch_are_each_as_if_alone(arch, encoders):
    """Z-Image pads texts to 32 tokens with a token of its own and places the image after them."""
    model = arch.load_transformer()
    data = batch(arch, VARIANT, encoders, (SHORT, LONG))
    lengths = data.conditioning.text_mask.sum(1).tolist()
    assert len({-(-length // 32) for length in lengths}) == 2
    sigma = torch.tensor([0.4, 0.4])
    with torch.no_grad():
        together = arch.velocity(model, data.latents, sigma, data.conditioning)
        for number, caption in enumerate((SHORT, LONG)):
            one = arch.collate(encoders.encode_text([Prompt(caption)]))
            alone = arch.velocity(model, data.latents[[number]], sigma[:1], one)
            torch.testing.assert_close(together[[number]], alone, rtol=1e-4, atol=1e-5)


def test_the_mask_that_cuts_texts_stays_on_the_host(arch, encoders):
    record = arch.collate(encoders.encode_text([Prompt(SHORT), Prompt(LONG)]))
    moved = record.to("meta")
    assert moved.text.device.type == "meta"
    assert moved.text_mask.device.type == "cpu"
    assert [text.shape for text in moved.texts()] == [text.shape for text in record.texts()]
    assert record.select([1]).texts()[0].shape == record.texts()[1].shape


def test_guidance_one_is_none_and_more_moves_away_from_the_negative(arch, encoders, monkeypatch):
    model = arch.load_transformer().eval()
    positive, negative = (arch.collate(encoders.encode_text([Prompt(text)])) for text in (LONG, "blurry"))
    guided = seen_by_scheduler(arch, encoders, model, positive, negative, generation(guidance_scale=3.0), monkeypatch)
    plain = seen_by_scheduler(arch, encoders, model, positive, negative, generation(guidance_scale=1.0), monkeypatch)
    for steps, scale in ((guided, 3.0), (plain, 1.0)):
        sigma, noisy, output = steps[0]
        with torch.no_grad():
            towards, away = (arch.velocity(model, noisy, torch.tensor([sigma]), c) for c in (positive, negative))
        assert (towards - away).abs().max() > 1e-3
        torch.testing.assert_close(output, away + scale * (towards - away), rtol=1e-3, atol=1e-5)


def test_timesteps_keep_float32_precision_over_a_bf16_model(folder, encoders):
    """The witness is the pipeline: it feeds the time in float32 whatever the weights are."""
    arch = architecture(VARIANT, folder, "model.dtype=bfloat16")
    model = arch.load_transformer().eval()
    times = []
    model.t_embedder.register_forward_pre_hook(lambda module, arguments: times.append(arguments[0].clone()))
    record = arch.collate(encoders.encode_text([Prompt(SHORT)]))
    arch.generate(model, encoders, record, None, generation(steps=7))
    theirs = torch.cat(times)
    times.clear()
    noisy = torch.randn(1, 16, 1, 4, 6)
    scheduler = arch.pipeline(model, encoders).scheduler
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist())
    for sigma in scheduler.sigmas[:-1]:
        arch.velocity(model, noisy, sigma[None], record)
    ours = torch.cat(times)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (theirs - theirs.bfloat16().float()).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_any_base_trains_float32_adapters_on_text_of_any_precision(folder, dtypes, autocast):
    arch = architecture(VARIANT, folder, f"model.dtype={dtypes[0]}", f"model.text_dtype={dtypes[1]}")
    model = arch.load_transformer().train()
    inject(model, Adapter(rank=2), arch.lora_targets, seed=0)
    encoders = arch.load_encoders("cpu")
    data = batch(arch, VARIANT, encoders, (SHORT, LONG))
    assert str(data.conditioning.text.dtype) == f"torch.{dtypes[1]}"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = arch.velocity(model, data.latents, torch.tensor([0.3, 0.7]), data.conditioning)
    prediction.float().square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in trained)
    record = data.conditioning.select([0])
    assert torch.isfinite(arch.generate(model.eval(), encoders, record, record, generation(guidance_scale=2.0))).all()


def test_refiners_and_modulation_get_no_adapter(arch):
    model = arch.load_transformer()
    names = {name for name, _ in model.named_modules() if re.fullmatch(arch.lora_targets, name)}
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    assert names == {
        f"layers.{n}.{part}"
        for n in range(2)
        for part in [*(f"attention.{layer}" for layer in layers), *(f"feed_forward.w{w}" for w in (1, 2, 3))]
    }


def is_linear(module):
    return isinstance(module, torch.nn.Linear)


def native_name(arch, name):
    """The name that the one rule for a module gives, and diffusers' names of all modules that share it."""
    (rule,) = [rule for rule in arch.native if re.fullmatch(rule.pattern, name)]
    names = [re.sub(rule.pattern, text, name) for text in (rule.name, *rule.parts)]
    return names[0], tuple(names[1:]) or (name,)


def test_native_names_are_those_that_diffusers_reads_back(arch):
    """Kohya's underscores over the original names; diffusers splits what the original keeps fused."""
    model = arch.load_transformer()
    wanted = [n for n, m in model.named_modules() if is_linear(m) and re.search(r"\.(attention|feed_forward)\.", n)]
    assert any("refiner" in name for name in wanted)
    fused = dict(native_name(arch, name) for name in wanted)
    file, expected = {}, {}
    for name, parts in fused.items():
        down, ups = torch.randn(2, 32), [torch.randn(8, 2) for _ in parts]
        key = "lora_unet_" + name.replace(".", "_")
        file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"] = down, torch.cat(ups)
        for part, up in zip(parts, ups, strict=True):
            expected[f"transformer.{part}.lora_A.weight"] = down
            expected[f"transformer.{part}.lora_B.weight"] = up
    assert {key.split(".lora_")[0].removeprefix("transformer.") for key in expected} == set(wanted)
    converted = _convert_non_diffusers_z_image_lora_to_diffusers(file)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_native_names_are_those_of_the_original_file(arch):
    model, original = VARIANT.single_file()
    block = r"(layers|\w+_refiner)\.\d+\.\w+\."
    ours = {native_name(arch, name)[0] for name, m in model.named_modules() if is_linear(m) and re.match(block, name)}
    matrices = {name for name, tensor in original.items() if re.match(block, name) and tensor.ndim == 2}
    assert ours == {name.removesuffix(".weight") for name in matrices}


def test_a_single_file_has_the_published_shape(tmp_path):
    model, state = VARIANT.single_file()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "z.safetensors")
    loaded = architecture(VARIANT, tmp_path / "z.safetensors").load_transformer()
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in loaded.config.items() if name in settings} == {
        name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()
    }


def test_the_model_that_sees_images_is_refused(folder, tmp_path):
    transformer(siglip_feat_dim=12).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="has siglip_feat_dim=12, this model config needs None"):
        architecture(VARIANT, tmp_path).check()
    state = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    wide = transformer(siglip_feat_dim=12, dim=128, axes_dims=[32, 48, 48], n_heads=1, n_kv_heads=1).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in wide.items()}, tmp_path / "omni.safetensors")
    with pytest.raises(ValueError, match="has siglip_feat_dim=12"):
        architecture(VARIANT, tmp_path / "omni.safetensors").check()
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="width 32 is no multiple of Z-Image's head size 128"):
        architecture(VARIANT, tmp_path / "narrow.safetensors").check()


def test_another_vae_is_refused(folder):
    with pytest.raises(ValueError, match="makes 16 channels at stride 8, the model needs 32 at 8"):
        architecture(VARIANT, folder, "model.latents.channels=32").load_encoders("cpu").vae()
