import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

from mpp.lora.adapters import Adapter, inject
from mpp.models.contract import Generation, Prompt
from mpp.models.families.ltx2 import LTX2Conditioning
from tests.families.base import architecture, batch, pixels
from tests.families.ltx2 import TRANSFORMER, VARIANTS, text_to_video

(VARIANT,) = VARIANTS
SHORT, LONG = "a red box", "a cat on a blue chair by the sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("ltx2")
    text_to_video(target)
    return target


@pytest.fixture(scope="module")
def arch(folder):
    return architecture(VARIANT, folder)


@pytest.fixture(scope="module")
def encoders(arch):
    return arch.load_encoders("cpu")


@pytest.fixture(scope="module")
def theirs(arch, folder):
    """Diffusers' pipeline for video with sound; of the sound's VAE only the statistics."""
    pipe = LTX2Pipeline(
        scheduler=arch.scheduler(),
        vae=AutoencoderKLLTX2Video.from_pretrained(folder / "vae"),
        text_encoder=Gemma3ForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        connectors=LTX2TextConnectors.from_pretrained(folder / "connectors"),
        transformer=arch.load_transformer(),
        audio_vae=None,
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    settings = SimpleNamespace(mel_bins=64, latent_channels=8)
    pipe.audio_vae = SimpleNamespace(config=settings, latents_mean=torch.zeros(128), latents_std=torch.ones(128))
    return pipe


def record_of(arch, encoders, caption):
    return arch.collate(encoders.encode_text([Prompt(caption)]))


def generation(steps=2, guidance_scale=1.0):
    return Generation(width=96, height=64, frames=9, steps=steps, guidance_scale=guidance_scale, seed=0)


def noise(seed=0):
    return torch.randn(1, 128, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fps", [24.0, 12.0])
def test_velocity_is_that_of_the_pipelines_pass_with_the_modalities_isolated(folder, encoders, theirs, fps):
    """The pipeline makes such a pass for its modality guidance, here with real sound and text."""
    arch = architecture(VARIANT, folder, f"model.fps={fps}")
    model, passes = theirs.transformer, []

    def spy(module, args, kwargs, output):
        if kwargs["isolate_modalities"]:
            passes.append((kwargs["hidden_states"], kwargs["timestep"], output[0]))

    handle = model.register_forward_hook(spy, with_kwargs=True)
    theirs(
        LONG, height=64, width=96, num_frames=9, num_inference_steps=2, frame_rate=fps, guidance_scale=1.0,
        audio_guidance_scale=1.0, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=3.0, max_sequence_length=64,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    handle.remove()
    assert len(passes) == 2
    record = record_of(arch, encoders, LONG)
    for packed, time, output in passes:
        noisy = LTX2Pipeline._unpack_latents(packed, 2, 2, 3)
        with torch.no_grad():
            ours = arch.velocity(model, noisy, time / 1000, record)
        torch.testing.assert_close(ours, LTX2Pipeline._unpack_latents(output, 2, 2, 3), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_sound_reaches_the_video(arch, encoders):
    model = arch.load_transformer()
    record, sigma = record_of(arch, encoders, SHORT), torch.tensor([0.6])
    with torch.no_grad():
        before = arch.velocity(model, noise(), sigma, record)
        for name, parameter in model.named_parameters():
            if "audio" in name or "av_cross" in name or "a2v" in name:
                parameter.normal_()
        assert torch.equal(arch.velocity(model, noise(), sigma, record), before)
        model.transformer_blocks[-1].attn1.to_v.weight.normal_()
        assert not torch.equal(arch.velocity(model, noise(), sigma, record), before)


def test_large_clips_are_trained_at_low_noise(arch):
    levels = torch.tensor([0.01, 0.05, 0.25, 0.5])
    want = torch.tensor([0.08, 0.36, 0.81, 0.91], dtype=torch.float64)
    torch.testing.assert_close(arch.sigma.quantile(levels, 12_288), want, rtol=0, atol=5e-3)


def test_sampling_leaves_the_transformer_as_it_was(arch, encoders):
    model = arch.load_transformer().eval()
    arch.generate(model, encoders, record_of(arch, encoders, SHORT), None, generation())
    assert not model._forward_pre_hooks


def test_text_is_what_the_pipelines_connectors_make_for_video(encoders, theirs):
    states, mask, *_ = theirs.encode_prompt(
        [SHORT, LONG], do_classifier_free_guidance=False, max_sequence_length=64, device="cpu"
    )
    with torch.no_grad():
        expected, _, kept = theirs.connectors(states, mask, padding_side="left")
    assert kept.all()  # registers stand where padding was, and the transformer attends to them
    for record, text in zip(encoders.encode_text([Prompt(SHORT), Prompt(LONG)]), expected, strict=True):
        torch.testing.assert_close(record.text, text, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_captions_of_another_length_are_refused(arch, encoders):
    (record,) = encoders.encode_text([Prompt(SHORT)])
    for length in (32, 128):
        with pytest.raises(ValueError, match=f"{length} tokens, model.text_length is 64"):
            arch.collate([record, LTX2Conditioning(record.text.new_zeros(length, 16))])


def test_latents_are_normalised_as_the_pipeline_normalises_them(arch, encoders, theirs):
    clip = pixels(arch, VARIANT, (2, 3), 0)
    with torch.no_grad():
        raw = theirs.vae.encode(clip).latent_dist.mode()
        expected = theirs.prepare_latents(latents=raw, noise_scale=0.0, dtype=torch.float32, device="cpu")
    ours = encoders.encode_pixels(clip)
    torch.testing.assert_close(ours, LTX2Pipeline._unpack_latents(expected, 2, 2, 3))
    assert (ours - raw).abs().max() > 0.1


def test_guidance_moves_away_from_the_negative(arch, encoders, monkeypatch):
    model = arch.load_transformer().eval()
    positive, negative = record_of(arch, encoders, LONG), record_of(arch, encoders, "blurry")
    kind, steps = type(arch.pipeline(model, encoders).scheduler), []
    original = kind.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        steps.append((float(timestep) / 1000, sample.clone(), model_output.clone()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(kind, "step", spy)
    arch.generate(model, encoders, positive, negative, generation(guidance_scale=3.0))
    sigma, packed, output = steps[0]
    noisy, output = (LTX2Pipeline._unpack_latents(x, 2, 2, 3) for x in (packed, output))
    with torch.no_grad():
        towards, away = (arch.velocity(model, noisy, torch.tensor([sigma]), c) for c in (positive, negative))
    assert (towards - away).abs().max() > 1e-3
    torch.testing.assert_close(output, away + 3 * (towards - away), rtol=1e-3, atol=1e-4)


def test_timesteps_keep_float32_precision_over_a_bf16_model(folder, encoders):
    arch = architecture(VARIANT, folder, "model.dtype=bfloat16")
    model, times = arch.load_transformer().eval(), []
    model.time_embed.register_forward_pre_hook(lambda module, arguments: times.append(arguments[0].clone()))
    arch.velocity(model, noise(), torch.tensor([0.4873]), record_of(arch, encoders, SHORT))
    assert times[0].dtype == torch.float32
    torch.testing.assert_close(times[0], torch.tensor([487.3]))


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


def test_adapters_attach_to_the_video_alone_under_names_that_diffusers_reads(arch):
    model = arch.load_transformer()
    names = {name for name, _ in model.named_modules() if re.fullmatch(arch.lora_targets, name)}
    layers = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert names == {f"transformer_blocks.{n}.{x}" for n in range(2) for x in (*layers, "ff.net.0.proj", "ff.net.2")}
    assert arch.native == ()
    file = {f"diffusion_model.{name}.lora_A.weight": torch.ones(1) for name in names}
    converted = _convert_non_diffusers_ltx2_lora_to_diffusers(file)
    assert converted.keys() == {f"transformer.{name}.lora_A.weight" for name in names}


def test_a_single_file_has_the_published_shape(tmp_path):
    model, state = VARIANT.single_file()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "ltx.safetensors")
    loaded = architecture(VARIANT, tmp_path / "ltx.safetensors").load_transformer()
    plain = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in plain} == plain


def test_later_versions_and_other_vaes_are_refused(folder, tmp_path):
    LTX2VideoTransformer3DModel(**TRANSFORMER, cross_attn_mod=True).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="has cross_attn_mod=True, this model config needs False"):
        architecture(VARIANT, tmp_path).check()
    with pytest.raises(ValueError, match="at stride 32 and 8 in time, the model needs 128 at 32 and 4"):
        architecture(VARIANT, folder, "model.latents.temporal_stride=4").load_encoders("cpu").vae()
    with pytest.raises(ValueError, match=r"model\.fps must be greater than 0, got 0"):
        architecture(VARIANT, folder, "model.fps=0")
