import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from mpp.config import build
from mpp.core.flow import SigmaLaw, interpolate
from mpp.lora.adapters import Adapter, adapter_state, inject, load_adapter_state
from mpp.lora.stack import load_base
from mpp.memory.bases import dequantise, is_quantised
from mpp.models.contract import Generation, LatentSpec, Prompt
from mpp.models.experts import Experts
from mpp.models.families.wan import Wan, WanConditioning
from mpp.models.tiny import TRANSFORMER
from tests.families import parameters
from tests.families.base import architecture, batch, conditioning, image
from tests.families.wan import CHANNELS, CLIP, SMALL, VARIANTS, original_keys
from tests.helpers import architecture as make
from tests.helpers import config, randomise_adapter, unchecked_error


@pytest.fixture(scope="module")
def folders(built):
    """Tiny pipelines by variant, each made when first asked for."""
    return built


def named(name):
    return next(variant for variant in VARIANTS if variant.name == name)


WITH_IMAGE = [variant for variant in VARIANTS if " I2V" in variant.name]
every = pytest.mark.parametrize("variant", parameters(of=VARIANTS.__contains__))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A transformer with WAN's head size, its diffusers keys, and the same with original keys."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SMALL)
    folder = tmp_path_factory.mktemp("single")
    model.save_pretrained(folder / "transformer")
    return model, folder, {k: v.contiguous() for k, v in model.state_dict().items()}


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


def test_weights_that_diffusers_leaves_out_do_not_make_a_file_foreign(single, tmp_path):
    model, _, state = single
    save_file({**state, "blocks.0.attn2.norm_added_q.weight": torch.ones(4)}, tmp_path / "wan.safetensors")
    loaded = wan(tmp_path / "wan.safetensors").load_transformer().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    save_file({**state, "blocks.0.attn2.unheard_of.weight": torch.ones(4)}, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="has 1 others"):
        wan(tmp_path / "wan.safetensors").load_transformer()


def test_incomplete_and_foreign_files_are_refused(single, tmp_path):
    _, _, state = single
    part = {k: v for k, v in state.items() if "attn1.to_k" not in k}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        wan(tmp_path / "part.safetensors").load_transformer()
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no WanTransformer3DModel: it has no patch_embedding.weight"):
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
    with pytest.raises(ValueError, match="has in_channels=16, this model config needs 48"):
        wan(pipeline, "model.latents.channels=48").check()


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("wan", CHANNELS, "in_channels=36, this model config needs 16"),
        ("wan", CLIP, "in_channels=36, this model config needs 16"),
        ("wan22_i2v_low", {}, "in_channels=16, this model config needs 36"),
        ("wan22_i2v_low", CLIP, "image_dim=24, this model config needs None"),
        ("wan_i2v_480p", CHANNELS, "image_dim=None, this model config needs 1280"),
        ("wan_i2v_480p", {**CLIP, "image_dim": 1280, "pos_embed_seq_len": 514}, "pos_embed_seq_len=514"),
        ("wan22_5b", {}, "in_channels=16, this model config needs 48"),
    ],
)
@pytest.mark.parametrize("single_file", [False, True])
def test_a_model_of_another_variant_is_refused(tmp_path, model, changes, message, single_file):
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**SMALL, **changes})
    source = tmp_path / "wan.safetensors" if single_file else tmp_path
    if single_file:
        state = original_keys(transformer.state_dict())
        if "pos_embed_seq_len" in changes:
            state["img_emb.emb_pos"] = state.pop("condition_embedder.image_embedder.pos_embed")
        save_file({k: v.contiguous() for k, v in state.items()}, source)
    else:
        transformer.save_pretrained(tmp_path / "transformer")
        transformer.save_pretrained(tmp_path / "transformer_2")
    with pytest.raises(ValueError, match=message):
        architecture(named("WAN 2.1 T2V"), source, f"model={model}", "model.text_length=512").check()


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


@pytest.mark.parametrize(("task", "boundary"), [("wan22", 0.875), ("wan22_i2v", 0.9)])
def test_experts_train_on_their_own_range_of_sigma(task, boundary):
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high, both = (
        build(config("train", [f"model={task}{name}", "data.cache_dir=x"]).model) for name in ("_low", "_high", "")
    )
    assert float(high.sigma.quantile(uniform, 1).min()) >= boundary
    assert float(low.sigma.quantile(uniform, 1).max()) <= boundary
    assert both.boundaries == (boundary,)
    assert low.boundaries == high.boundaries == ()
    assert {arch.family for arch in (low, high, both)} == {"wan" if task == "wan22" else "wan_i2v"}  # one cache for all


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
    captions = [
        "a photo of a cat",
        "",
        "  Tom &amp; Jerry\n are   here ",
        "a\tcat &amp;amp; a   dog â€” ",
        "long " * 40,
    ]
    items = encoders.encode_text([Prompt(caption) for caption in captions])
    folder = Path(pipeline)
    theirs = WanPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        want, _ = theirs.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=64)
    assert torch.equal(arch.collate(items).text, want)
    lengths = [
        len(theirs.tokenizer(c).input_ids) for c in ["a photo of a cat", "", "Tom & Jerry are here", "a cat & a dog —"]
    ]
    assert [item.text.shape[0] for item in items] == [*lengths, 64]


def test_latents_are_the_normalised_mode_of_the_vae(pipeline):
    encoders = make(pipeline).load_encoders("cpu")
    pixels = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    got = encoders.encode_pixels(pixels)
    vae = AutoencoderKLWan.from_pretrained(Path(pipeline) / "vae")
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


def test_constructing_loads_nothing(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("mpp.models.family.resolve_folder", lambda *a, **k: opened.append(a))
    monkeypatch.setattr("mpp.models.fp8_file.safe_open", lambda *a, **k: opened.append(a))
    wan(tmp_path / "not there yet")
    wan(tmp_path / "not there yet.safetensors")
    assert opened == []


def test_identity_follows_the_weights_not_the_path(pipeline, tmp_path):
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
    with pytest.raises(ValueError, match="model.text_encoder is not set"):
        wan(tmp_path / "wan.safetensors").identity(fetch=True)


# ---------------------------------------------------------------- image to video


def whole_pipeline(folder, arch):
    """Diffusers' pipeline with all its encoders, from the folder alone."""
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        "vae": AutoencoderKLWan.from_pretrained(folder / "vae"),
        "scheduler": arch.scheduler(FlowMatchEulerDiscreteScheduler(shift=arch.sigma.shift)),
        "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer"),
        "expand_timesteps": "5B" in str(folder),
    }
    if (folder / "image_encoder").is_dir():
        parts["image_encoder"] = CLIPVisionModel.from_pretrained(folder / "image_encoder")
        parts["image_processor"] = CLIPImageProcessor.from_pretrained(folder / "image_processor")
    if (folder / "transformer_2").is_dir():
        parts["transformer_2"] = WanTransformer3DModel.from_pretrained(folder / "transformer_2")
        parts["boundary_ratio"] = 0.9 if arch.image_to_video else 0.875
    return (WanImageToVideoPipeline if arch.image_to_video else WanPipeline)(**parts)


@pytest.mark.parametrize("variant", parameters(of=lambda v: v in VARIANTS and "low" not in v.name))
def test_samples_are_those_of_the_whole_pipeline(variant, folders):
    arch = architecture(variant, folders(variant))
    step = arch.latents.pixel_step
    first = image(3 * step, 2 * step, 1)
    seen = (first,) if arch.image_to_video else ()
    size = {"height": 2 * step, "width": 3 * step}
    theirs = whole_pipeline(folders(variant), arch)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(
        prompt="a cat", negative_prompt="grey", guidance_scale=3.0, num_frames=5, num_inference_steps=4,
        generator=torch.Generator().manual_seed(7), output_type="pt", max_sequence_length=arch.text_length,
        **size, **({"image": first} if seen else {}),
    ).frames[0]  # fmt: skip
    encoders = arch.load_encoders("cpu")
    positive, negative = encoders.encode_text([Prompt("a cat"), Prompt("grey")])
    clip = torch.zeros(1, 3, 5, *size.values())
    clip[0, :, 0] = theirs.video_processor.preprocess(first)[0]
    fields = encoders.encode_images(clip, ())
    record = arch.collate([WanConditioning(positive.text, **fields)])
    generation = Generation(**size, frames=5, steps=4, guidance_scale=3.0, seed=7, controls=seen)
    got = arch.generate(arch.load_transformer(), encoders, record, arch.collate([negative]), generation)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", WITH_IMAGE, ids=lambda v: v.name)
def test_images_are_what_the_pipeline_makes_of_the_first_frame(variant, folders):
    arch = architecture(variant, folders(variant))
    step = arch.latents.pixel_step
    first = image(3 * step, 2 * step, 1)
    theirs = whole_pipeline(folders(variant), arch)
    shown = theirs.video_processor.preprocess(first)
    with torch.no_grad():
        condition = theirs.prepare_latents(shown, 1, 16, 2 * step, 3 * step, 5, torch.float32, torch.device("cpu"))[1]
    clip = torch.cat([shown[:, :, None], torch.rand(1, 3, 4, 2 * step, 3 * step) * 2 - 1], dim=2)
    before = torch.random.get_rng_state()
    fields = arch.load_encoders("cpu").encode_images(clip, ())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(fields["condition"], condition[0])
    assert ("image" in fields) == ("2.1" in variant.name)
    if "image" in fields:
        with torch.no_grad():
            assert torch.equal(fields["image"], theirs.encode_image(first)[0])


@pytest.mark.parametrize("variant", WITH_IMAGE, ids=lambda v: v.name)
def test_the_first_frame_matters(variant, folders):
    arch = architecture(variant, folders(variant))
    encoders, transformer = arch.load_encoders("cpu"), arch.load_transformer()
    data = batch(arch, variant, encoders, ("a", "a"))
    noisy, sigma = data.latents[:1], torch.tensor([0.5])
    with torch.no_grad():
        one, other = (arch.velocity(transformer, noisy, sigma, data.conditioning.select([n])) for n in (0, 1))
    assert (one - other).abs().max() > 1e-3


def test_clip_features_matter_by_themselves(folders):
    variant = named("WAN 2.1 I2V")
    arch = architecture(variant, folders(variant))
    transformer = arch.load_transformer()
    record = arch.collate([conditioning(arch, variant, arch.load_encoders("cpu"), "a")])
    other = WanConditioning(record.text, record.image.flip(2), record.condition)
    noisy, sigma = torch.zeros(1, 16, 2, 4, 6), torch.tensor([0.5])
    with torch.no_grad():
        one, two = (arch.velocity(transformer, noisy, sigma, c) for c in (record, other))
    assert (one - two).abs().max() > 1e-4


def test_tokens_of_the_given_frame_have_timestep_0_and_all_keep_float32(folders):
    variant, seen = named("WAN 2.2 TI2V-5B I2V"), {}
    arch = architecture(variant, folders(variant))
    model = arch.load_transformer().to(torch.bfloat16)
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    data = batch(arch, variant, arch.load_encoders("cpu"), ("a", "b"))
    got = arch.velocity(model, data.latents, torch.tensor([0.4873, 1.0]), data.conditioning)
    assert got.shape == data.latents.shape == (2, 48, 1, 4, 6)
    assert seen["timestep"].dtype == torch.float32
    want = torch.tensor([[0.0] * 6 + [487.3] * 6, [0.0] * 6 + [1000.0] * 6])
    torch.testing.assert_close(seen["timestep"], want)


@every
def test_bf16_weights_with_a_float32_adapter_learn_under_autocast(variant, folders):
    arch = architecture(variant, folders(variant), "model.dtype=bfloat16")
    transformer = arch.load_transformer()
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    randomise_adapter(transformer)
    data = batch(arch, variant, arch.load_encoders("cpu"), ("a", "b"))
    with torch.autocast("cpu", torch.bfloat16):
        pred = arch.velocity(transformer, data.latents, torch.tensor([0.3, 0.95]), data.conditioning)
    pred.float().square().mean().backward()
    gradients = [p.grad for p in transformer.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    whole = architecture(variant, folders(variant))
    exact = whole.load_transformer()
    inject(exact, Adapter(rank=2), whole.lora_targets, seed=0)
    load_adapter_state(exact, adapter_state(transformer), "the other")
    with torch.no_grad():
        want = whole.velocity(exact, data.latents, torch.tensor([0.3, 0.95]), data.conditioning)
    assert (pred.float() - want).abs().mean() < 0.05 * want.abs().mean()  # bf16 has a precision of 0.4 percent


def test_a_batch_of_different_first_frames_is_refused():
    arch = wan("x")
    text = torch.ones(3, 8)
    shapes = [(20, 2, 4, 6), (20, 2, 6, 4)]
    with pytest.raises(ValueError, match="first frames of different shapes"):
        arch.collate([WanConditioning(text, condition=torch.zeros(shape)) for shape in shapes])
    with pytest.raises(ValueError, match="first frames of different shapes"):
        arch.collate([WanConditioning(text), WanConditioning(text, condition=torch.zeros(shapes[0]))])


def test_image_to_video_samples_need_their_image():
    arch = architecture(named("WAN 2.2 A14B I2V low"), Path("x"))
    generation = Generation(width=48, height=32, frames=5, steps=1, guidance_scale=1.0, seed=0)
    with pytest.raises(ValueError, match="starts from one image, the sample has 0"):
        arch.arguments(WanConditioning(torch.ones(1, 4, 32)), None, generation)


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(
    "name", [pytest.param("WAN 2.2 A14B T2V both", marks=pytest.mark.slow), "WAN 2.2 A14B I2V both"]
)
def test_each_sample_is_predicted_by_the_expert_that_serves_its_sigma(name, folders):
    variant = named(name)
    arch = architecture(variant, folders(variant))
    experts = arch.load_transformer()
    (boundary,) = arch.boundaries
    data = batch(arch, variant, arch.load_encoders("cpu"), ("a", "b", "c", "d"))
    sigma = torch.tensor([0.95, 0.2, boundary, boundary - 1e-3])
    with torch.no_grad():
        mixed = arch.velocity(experts, data.latents, sigma, data.conditioning)
        for row, expert in enumerate(("high", "low", "high", "low")):
            alone = architecture(variant, folders(variant), f"model.expert={expert}")
            transformer, mine = alone.load_transformer(), data.conditioning.select([row])
            want = alone.velocity(transformer, data.latents[[row]], sigma[[row]], mine)
            torch.testing.assert_close(mixed[[row]], want, rtol=1e-4, atol=1e-5)
            other = arch.velocity(experts, data.latents[[row]], 1.1 - sigma[[row]], mine)
            assert (other - want).abs().max() > 1e-3


def test_a_boundary_of_ones_own_moves_the_experts(folders):
    variant = named("WAN 2.2 A14B T2V both")
    arch = architecture(variant, folders(variant), "model.boundary=0.5")
    assert arch.boundaries == (0.5,)
    assert arch.pipeline(arch.load_transformer(), arch.load_encoders("cpu")).config.boundary_ratio == 0.5


def test_a_single_expert_generates_alone(folders):
    variant = named("WAN 2.2 A14B I2V low")
    arch = architecture(variant, folders(variant))
    transformer = arch.load_transformer()
    pipe = arch.pipeline(transformer, arch.load_encoders("cpu"))
    assert pipe.transformer is transformer
    assert pipe.transformer_2 is None
    assert pipe.config.boundary_ratio is None


def test_both_experts_are_checked_and_identified(folders, tmp_path):
    variant = named("WAN 2.2 A14B T2V both")
    folder = folders(variant)
    parts = [architecture(variant, folder, f"model.expert={e}").identity().transformer for e in ("low", "high")]
    assert architecture(variant, folder).identity().transformer == "+".join(parts)
    assert parts[0] != parts[1]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "transformer_2")
    with pytest.raises(ValueError, match="neither transformer_2/config.json"):
        architecture(variant, broken).check()
    WanTransformer3DModel(**{**TRANSFORMER, **CHANNELS}).save_pretrained(broken / "transformer_2")
    with pytest.raises(ValueError, match="in_channels=36, this model config needs 16"):
        architecture(variant, broken).check()


def test_one_transformers_folder_does_not_make_both_experts(folders):
    variant = named("WAN 2.2 A14B T2V both")
    high, low = folders(variant) / "transformer", folders(variant) / "transformer_2"
    with pytest.raises(ValueError, match="gives both experts the same weights; set model.pretrained_low"):
        architecture(variant, high).check()
    architecture(variant, high, f"model.pretrained_low={low}").check()


def test_a_skeleton_has_the_names_of_the_weights_and_none_of_their_memory(folders):
    for name in ("WAN 2.2 A14B T2V both", "WAN 2.1 I2V"):
        arch = architecture(named(name), folders(named(name)))
        skeleton, loaded = arch.skeleton(), arch.load_transformer()
        shapes = {n: p.shape for n, p in loaded.named_parameters()}
        assert {n: p.shape for n, p in skeleton.named_parameters()} == shapes
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        assert isinstance(skeleton, type(loaded))


def test_two_single_files_make_both_experts(tmp_path):
    models = {}
    for seed, name in enumerate(("high", "low")):
        torch.manual_seed(seed)
        models[name] = WanTransformer3DModel(**SMALL)
        state = {k: v.contiguous() for k, v in original_keys(models[name].state_dict()).items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    variant, high = named("WAN 2.2 A14B T2V both"), tmp_path / "high.safetensors"
    for action in ("check", "load_transformer", "identity"):
        with pytest.raises(ValueError, match="set model.pretrained_low"):
            getattr(architecture(variant, high), action)()
    arch = architecture(variant, high, f"model.pretrained_low={tmp_path / 'low.safetensors'}")
    arch.check()
    experts = arch.load_transformer()
    assert isinstance(experts, Experts)
    assert list(experts) == ["low", "high"]
    for name, model in models.items():
        assert all(torch.equal(t, experts[name].state_dict()[n]) for n, t in model.state_dict().items())
    assert len(arch.identity().transformer.split("+")) == 2


@pytest.mark.slow
def test_of_two_experts_a_file_in_fp8_stays_as_it_is_and_the_other_is_quantised(tmp_path):
    states = {}
    for seed, name in enumerate(("high", "low")):
        torch.manual_seed(seed)
        states[name] = {
            k: v.contiguous() for k, v in original_keys(WanTransformer3DModel(**SMALL).state_dict()).items()
        }
    layer = "blocks.1.self_attn.q"
    states["high"][f"{layer}.weight"] = states["high"][f"{layer}.weight"].to(torch.float8_e5m2)
    states["high"][f"{layer}.scale_weight"] = torch.tensor(0.25)
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    files = (tmp_path / "high.safetensors", f"model.pretrained_low={tmp_path / 'low.safetensors'}")
    arch = architecture(named("WAN 2.2 A14B T2V both"), *files)
    assert arch.stored() == {"high": "fp8"}
    experts = load_base(arch, "fp8")
    quantised = {name for name, module in experts.named_modules() if is_quantised(module)}
    low = {name for name, _ in arch.quantisable(arch.skeleton()) if name.startswith("low.")}
    assert quantised == {"high.blocks.1.attn1.to_q"} | low
    wanted = states["high"][f"{layer}.weight"].float() * 0.25
    assert torch.equal(dequantise(experts.get_submodule("high.blocks.1.attn1.to_q")), wanted)


def test_settings_that_exclude_one_another_are_refused():
    needed = {
        "pretrained": "x",
        "latents": LatentSpec(16, 8, 4, (1, 2, 2)),
        "sigma": SigmaLaw(),
        "lora_targets": "x",
    }
    clip = {"clip_dim": 1280, "image_to_video": True}
    for settings, start in [
        ({"expert": "medium"}, "model.expert must be high, low, both or null, got 'medium'"),
        ({"expert": "high", "boundary": 0.5}, "model.boundary and model.pretrained_low are for model.expert=both"),
        ({"pretrained_low": "x"}, "model.boundary and model.pretrained_low are for model.expert=both"),
        ({"expert": "both", "boundary": 875.0}, "model.boundary must lie between 0 and 1, got 875.0"),
        ({"expert": "both", "expand_timesteps": True}, "model.expand_timesteps is TI2V-5B"),
        ({"clip_dim": 1280}, "model.clip_dim is for WAN 2.1 image to video"),
        ({**clip, "expert": "low"}, "model.clip_dim is for WAN 2.1 image to video"),
        ({**clip, "text_length": 226}, "model.text_length must be 512 where the model sees"),
    ]:
        assert unchecked_error(Wan, **needed, **settings).startswith(f"ValueError: {start}")


@every
def test_diffusers_reads_the_original_names_of_all_targets(variant, folders):
    arch = architecture(variant, folders(variant))
    transformer = arch.skeleton()
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    modules = {n.removeprefix("low.").removeprefix("high.").split(".lora_")[0] for n in adapter_state(transformer)}
    originals = {}
    for module in modules:
        (rule,) = [rule for rule in arch.native if re.fullmatch(rule.pattern, module)]
        originals[module] = re.sub(f"^{rule.pattern}$", rule.name, module)
    state = {
        f"diffusion_model.{name}.{part}.weight": torch.full((1, 1), float(number))
        for number, name in enumerate(originals.values())
        for part in ("lora_A", "lora_B")
    }
    read = _convert_non_diffusers_wan_lora_to_diffusers(state)
    assert len(read) == 2 * len(modules)
    for number, module in enumerate(originals):
        for part in ("lora_A", "lora_B"):
            assert float(read[f"transformer.{module}.{part}.weight"]) == number
