import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from mpp.core.flow import interpolate
from mpp.models.base import LatentSpec
from mpp.models.tiny import TRANSFORMER
from mpp.models.wan import WanConditioning, clean_caption
from tests.helpers import architecture as make

SMALL = {**TRANSFORMER, "num_attention_heads": 1, "attention_head_dim": 128, "rope_max_seq_len": 1024}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A transformer with WAN's head size, its diffusers keys, and the same with original keys."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SMALL)
    folder = tmp_path_factory.mktemp("single")
    model.save_pretrained(folder / "transformer")
    return model, folder, {k: v.contiguous() for k, v in model.state_dict().items()}


def original_keys(state):
    """Diffusers keys to those of the released WAN files, written from the original model's module names."""
    table = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".o."),
        ("ffn.net.0.proj.", "ffn.0."),
        ("ffn.net.2.", "ffn.2."),
        ("proj_out.", "head.head."),
    ]
    renamed = {}
    for name, tensor in state.items():
        new = name
        for theirs, ours in table:
            new = new.replace(theirs, ours)
        if new == "scale_shift_table":
            new = "head.modulation"
        new = new.replace("scale_shift_table", "modulation")
        # norm2 and norm3 trade places between the two
        new = new.replace(".norm2.", ".norm_x.").replace(".norm3.", ".norm2.").replace(".norm_x.", ".norm3.")
        renamed[new] = tensor
    return renamed


def call(model):
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 16, 1, 4, 4, generator=random)
    text = torch.randn(1, 5, 32, generator=random)
    return model(noisy, torch.tensor([300.0]), text, return_dict=False)[0]


def wan(pretrained, *overrides):
    return make(pretrained, "model.dtype=float32", *overrides)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("keys", ["original", "diffusers"])
def test_single_files_load_exactly(single, tmp_path, keys, prefix):
    model, _, state = single
    named = original_keys(state) if keys == "original" else state
    file = tmp_path / "wan.safetensors"
    save_file({prefix + name: tensor for name, tensor in named.items()}, file)
    arch = wan(file)
    arch.check()
    loaded = arch.load_transformer()
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        torch.testing.assert_close(call(loaded), call(model))
    assert dict(loaded.config)["ffn_dim"] == SMALL["ffn_dim"]


def test_single_file_in_bf16_keeps_what_diffusers_keeps_in_float32(single, tmp_path):
    _, folder, state = single
    file = tmp_path / "wan.safetensors"
    save_file({k: v.bfloat16() for k, v in original_keys(state).items()}, file)
    from_file = make(file, "model.dtype=bfloat16").load_transformer()
    from_folder = make(folder, "model.dtype=bfloat16").load_transformer()
    assert {n: p.dtype for n, p in from_file.named_parameters()} == {
        n: p.dtype for n, p in from_folder.named_parameters()
    }
    assert torch.float32 in {p.dtype for p in from_file.parameters()}


@pytest.mark.parametrize("marker", ["blocks.0.self_attn.q.scale_weight", "scaled_fp8", "blocks.0.ffn.0.weight_scale"])
def test_fp8_scaled_files_are_refused(single, tmp_path, marker):
    _, _, state = single
    file = tmp_path / "wan_fp8_scaled.safetensors"
    save_file({**original_keys(state), marker: torch.ones(1)}, file)
    for action in (wan(file).check, wan(file).load_transformer):
        with pytest.raises(ValueError, match="fp8_scaled"):
            action()


def test_incomplete_and_foreign_files_are_refused(single, tmp_path):
    _, _, state = single
    part = {k: v for k, v in state.items() if "attn1.to_k" not in k}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        wan(tmp_path / "part.safetensors").load_transformer()
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no WAN transformer"):
        wan(tmp_path / "other.safetensors").check()
    whole = Path(tmp_path / "part.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete"):
        wan(tmp_path / "cut.safetensors").check()


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./nowhere", "/no/where", "no-such-owner/no-such-model"])
def test_a_model_that_is_not_there_is_refused_before_loading(source):
    with pytest.raises(ValueError, match=r"model\.pretrained=.*(is not there|neither a folder)"):
        wan(source).check()


def test_a_model_of_another_latent_shape_is_refused(pipeline):
    with pytest.raises(ValueError, match="takes 16 latent channels, this model config 48"):
        wan(pipeline, "model.latents.channels=48").check()


def test_image_to_video_models_are_refused(single, tmp_path):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**SMALL, "in_channels": 36})
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="image-to-video"):
        wan(tmp_path).check()


def test_the_low_noise_expert_is_the_second_transformer(pipeline, tmp_path):
    folder = tmp_path / "a14b"
    shutil.copytree(pipeline, folder)
    torch.manual_seed(9)
    second = WanTransformer3DModel(**TRANSFORMER)
    second.save_pretrained(folder / "transformer_2")
    low, high = wan(folder, "model.expert=low"), wan(folder, "model.expert=high")
    assert torch.equal(low.load_transformer().proj_out.weight, second.proj_out.weight)
    assert not torch.equal(high.load_transformer().proj_out.weight, second.proj_out.weight)
    assert low.identity().transformer != high.identity().transformer


def test_experts_train_on_their_own_range_of_sigma():
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    from mpp.config import build
    from tests.helpers import config

    laws = {
        n: build(config("train", [f"model={n}", "data.cache_dir=x"]).model).sigma for n in ("wan22_high", "wan22_low")
    }
    assert float(laws["wan22_high"].quantile(uniform, 1).min()) >= 0.875
    assert float(laws["wan22_low"].quantile(uniform, 1).max()) <= 0.875


@pytest.mark.parametrize("variant", [{}, {"in_channels": 48, "out_channels": 48}])
def test_velocity_is_what_diffusers_pipeline_feeds_its_scheduler(variant):
    # The pipeline passes timesteps 1000 * sigma and steps with the raw output, so ours must be that output.
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**TRANSFORMER, **variant})
    channels = model.config.in_channels
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    noisy, text = torch.randn(2, channels, 3, 4, 4), torch.randn(2, 64, 32)
    with torch.no_grad():
        for sigma, timestep in zip(scheduler.sigmas[:5], scheduler.timesteps, strict=True):
            theirs = model(noisy, timestep.expand(2), text, return_dict=False)[0]
            ours = wan("x").velocity(model, noisy, sigma.expand(2), WanConditioning(text))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_perfect_velocity_walks_diffusers_scheduler_back_to_the_latents():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    latents, noise = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 1, 4, 4)
    sample = interpolate(latents, noise, scheduler.sigmas[:1])
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - latents, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=1e-4, atol=1e-5)


def test_timesteps_keep_float32_precision_over_a_bf16_model():
    seen = {}
    model = WanTransformer3DModel(**TRANSFORMER).to(torch.bfloat16)
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    wan("x").velocity(
        model, torch.zeros(1, 16, 1, 4, 4), torch.tensor([0.4873]), WanConditioning(torch.zeros(1, 3, 32))
    )
    assert seen["timestep"].dtype == torch.float32
    assert float(seen["timestep"]) == pytest.approx(487.3)
    assert seen["hidden_states"].dtype == torch.bfloat16


def test_text_is_what_the_pipeline_makes_of_it(pipeline):
    arch = make(pipeline)
    encoders = arch.load_encoders("cpu")
    captions = ["a photo of a cat", "", "  Tom &amp; Jerry\n are   here "]
    batch = arch.collate(encoders.encode_text(captions))
    tokenizer, model = encoders._load_text()
    theirs = WanPipeline(tokenizer, model, encoders._load_vae(), FlowMatchEulerDiscreteScheduler())
    with torch.no_grad():
        want = theirs._get_t5_prompt_embeds(captions, max_sequence_length=arch.text_length)
    assert torch.equal(batch.text, want)


def test_latents_are_the_normalised_mode_of_the_vae(pipeline):
    encoders = make(pipeline).load_encoders("cpu")
    pixels = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    got = encoders.encode_pixels(pixels)
    vae = encoders._load_vae()
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
    config = vae.config
    for channel in range(16):
        want = (raw[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(got[:, channel], want)
    assert got.shape == (1, *LatentSpec(16, 8, 4, (1, 2, 2)).shape(1, 32, 48))


def test_a_vae_of_another_shape_is_refused(pipeline, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_factor_spatial": 16}))
    with pytest.raises(ValueError, match="at stride 16, the model needs 16 at 8"):
        make(folder).load_encoders("cpu").encode_pixels(torch.zeros(1, 3, 1, 32, 32))


def test_text_is_padded_with_zeros_to_the_fixed_length_and_too_long_is_refused():
    arch = wan("x")
    items = [WanConditioning(torch.ones(3, 8)), WanConditioning(torch.ones(64, 8))]
    text = arch.collate(items).text
    assert text.shape == (2, 64, 8)
    assert text[0, 3:].abs().sum() == 0
    with pytest.raises(ValueError, match="65 tokens, model.text_length is 64"):
        arch.collate([WanConditioning(torch.ones(65, 8))])


def test_captions_are_cleaned_as_the_pipeline_does():
    assert clean_caption("  a\n\tcat &amp;amp; a   dog â€” ") == "a cat & a dog —"


def test_constructing_loads_nothing(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("mpp.models.wan.resolve_folder", lambda *a, **k: opened.append(a))
    monkeypatch.setattr("mpp.models.wan.safe_open", lambda *a, **k: opened.append(a))
    wan(tmp_path / "not there yet")
    wan(tmp_path / "not there yet.safetensors")
    assert opened == []


def test_identity_follows_the_weights_not_the_place(pipeline, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pipeline, copy)
    assert make(copy).identity() == make(pipeline).identity()
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({k: v + 0.01 for k, v in state.items()}, weights, metadata={"format": "pt"})
    changed = make(copy).identity()
    assert changed.vae != make(pipeline).identity().vae
    assert changed.transformer == make(pipeline).identity().transformer


def test_a_single_file_needs_a_vae_and_text_encoder_to_prepare(single, tmp_path):
    _, _, state = single
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="model.vae is not set"):
        wan(tmp_path / "wan.safetensors").identity(fetch=True)
