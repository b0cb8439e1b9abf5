import re

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.models.contract import Generation, Prompt
from mpp.models.families.flux import FluxConditioning
from tests.families.base import architecture, batch, conditioning, image, pixels
from tests.families.flux import DEV, KONTEXT, original_state, transformer
from tests.families.flux import pipeline as save_pipeline

TEXTS = ["a red box", "a cat on a blue chair", "far too long a caption " * 8]  # the last has over 64 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("flux")
    save_pipeline(target)
    return target


@pytest.fixture(scope="module")
def theirs(folder):
    """Diffusers' pipelines with all their components."""
    parts = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": T5TokenizerFast,
    }
    loaded = {name: kind.from_pretrained(folder / name) for name, kind in parts.items()}
    pipelines = {DEV: FluxPipeline(**loaded), KONTEXT: FluxKontextPipeline(**loaded)}
    for pipe in pipelines.values():
        pipe.set_progress_bar_config(disable=True)
    return pipelines


@pytest.fixture(scope="module", params=[DEV, KONTEXT], ids=lambda v: v.name)
def variant(request):
    return request.param


def generation(**settings):
    return Generation(
        **{"width": 48, "height": 32, "frames": 1, "steps": 3, "guidance_scale": 3.5, "seed": 5, **settings}
    )


def told(arch, record, sigma=0.5, noisy=None):
    """What the transformer is called with."""
    seen = {}
    model = arch.load_transformer()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    noisy = random(1, 16, 1, 4, 6) if noisy is None else noisy
    with torch.no_grad():
        arch.velocity(model, noisy, torch.tensor([sigma]), record)
    return seen


def random(*shape):
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- text


def test_text_is_that_of_the_pipelines_own_encode_prompt(folder, theirs, variant):
    records = architecture(variant, folder).load_encoders("cpu").encode_text([Prompt(text) for text in TEXTS])
    for text, record in zip(TEXTS, records, strict=True):
        states, pooled, _ = theirs[variant].encode_prompt(prompt=text, max_sequence_length=64)
        torch.testing.assert_close(record.text, states[0])
        torch.testing.assert_close(record.pooled, pooled[0])


def test_padding_has_states_of_its_own_and_the_transformer_attends_to_them(folder):
    arch = architecture(DEV, folder)
    (record,) = arch.load_encoders("cpu").encode_text([Prompt("a red box")])
    assert record.text.shape == (64, 32)
    assert record.text[-1].abs().max() > 0.1
    zeroed = FluxConditioning(torch.cat([record.text[:20], torch.zeros(44, 32)]), record.pooled)
    model, noisy, sigma = arch.load_transformer(), random(1, 16, 1, 4, 6), torch.tensor([0.5])
    with torch.no_grad():
        whole, other = (arch.velocity(model, noisy, sigma, arch.collate([r])) for r in (record, zeroed))
    assert (whole - other).abs().max() > 1e-4


def test_text_prepared_with_another_length_is_refused(folder):
    (record,) = architecture(DEV, folder).load_encoders("cpu").encode_text([Prompt("a red box")])
    for length, message in ((48, "has 64 tokens, model.text_length is 48"), (80, "has 64 tokens, .* is 80")):
        arch = architecture(DEV, folder, f"model.text_length={length}")
        with pytest.raises(ValueError, match=message):
            arch.collate([record])


@pytest.mark.parametrize("length", [0, 513])
def test_text_lengths_that_the_pipeline_refuses_are_refused(folder, length):
    with pytest.raises(ValueError, match="model.text_length must be 1 to 512"):
        architecture(DEV, folder, f"model.text_length={length}")


# ---------------------------------------------------------------- latents and control images


def test_latents_are_normalised_as_the_pipeline_does(folder, theirs, variant):
    arch = architecture(variant, folder)
    clip = pixels(arch, variant, (2, 3), 0)
    with torch.no_grad():
        expected = theirs[KONTEXT]._encode_vae_image(clip[:, :, 0], generator=None)
    latents = arch.load_encoders("cpu").encode_pixels(clip)
    torch.testing.assert_close(latents[:, :, 0], expected)
    assert 0.5 < float(latents.std()) < 2


def test_clips_are_refused(folder):
    with pytest.raises(ValueError, match="got a clip of 5 frames"):
        architecture(DEV, folder).load_encoders("cpu").encode_pixels(torch.zeros(1, 3, 5, 32, 32))


@pytest.mark.parametrize(
    ("resize", "size", "cells"),
    [
        (False, (100, 60), (12, 6)),
        (False, (48, 90), (6, 10)),
        (True, (100, 60), (182, 90)),  # by the aspect of 96x48
        pytest.param(True, (90, 91), (128, 128), marks=pytest.mark.slow),
        pytest.param(True, (20, 90), (84, 196), marks=pytest.mark.slow),
    ],
)
def test_control_latents_are_those_the_pipeline_makes(folder, theirs, monkeypatch, resize, size, cells):
    arch = architecture(KONTEXT, folder, f"model.auto_resize={resize}")
    source = image(*size, seed=1)
    fields = arch.load_encoders("cpu").encode_images(torch.zeros(1, 3, 1, 32, 48), (source,))
    made = {}

    class StopError(Exception):
        pass

    def prepare(*args, **kwargs):
        _, made["latents"], _, _ = original(*args, **kwargs)
        raise StopError

    pipe = theirs[KONTEXT]
    original = pipe.prepare_latents
    monkeypatch.setattr(pipe, "prepare_latents", prepare)
    with pytest.raises(StopError):
        pipe(image=source, prompt="x", height=32, width=48, max_area=32 * 48, _auto_resize=resize)
    width, height = cells
    assert fields["control"].shape == (16, height, width)
    packed = FluxPipeline._pack_latents(fields["control"][None], 1, 16, height, width)
    torch.testing.assert_close(packed, made["latents"], rtol=1e-4, atol=1e-5)


def test_dev_sees_no_images_and_kontext_exactly_one(folder):
    dev, kontext = architecture(DEV, folder), architecture(KONTEXT, folder)
    clip, source = torch.zeros(1, 3, 1, 32, 48), image(48, 32, 0)
    assert dev.load_encoders("cpu").encode_images(clip, ()) == {}
    encoders = kontext.load_encoders("cpu")
    for images in ((), (source, source)):
        with pytest.raises(ValueError, match=f"exactly 1 control image per sample, got {len(images)}"):
            encoders.encode_images(clip, images)
    with pytest.raises(ValueError, match="has 48x9 pixels, needed are 16x16"):
        encoders.encode_images(clip, (image(48, 9, 0),))
    assert (dev.images.most, kontext.images.least, kontext.images.most) == (0, 1, 1)
    assert (dev.family, kontext.family) == ("flux", "flux_kontext")


def test_batches_with_some_or_unlike_control_images_are_refused(folder):
    dev, kontext = architecture(DEV, folder), architecture(KONTEXT, folder)
    text, pooled = torch.zeros(64, 32), torch.zeros(24)
    bare, small, large = (
        FluxConditioning(text, pooled, control) for control in (None, torch.zeros(16, 4, 4), torch.zeros(16, 4, 6))
    )
    with pytest.raises(ValueError, match="1 of 2 samples .* Kontext needs one for each"):
        kontext.collate([small, bare])
    with pytest.raises(ValueError, match="several sizes"):
        kontext.collate([small, large])
    with pytest.raises(ValueError, match="dev sees none; choose model=flux_kontext"):
        dev.collate([small])


def test_control_image_of_any_size_changes_the_prediction(folder):
    arch = architecture(KONTEXT, folder)
    encoders = arch.load_encoders("cpu")
    (record,) = encoders.encode_text([Prompt("a red box")])
    model, noisy, sigma = arch.load_transformer(), random(1, 16, 1, 4, 6), torch.tensor([0.5])
    found = []
    for size, seed in (((48, 32), 0), ((48, 32), 1), ((32, 96), 0)):
        fields = encoders.encode_images(torch.zeros(1, 3, 1, 32, 48), (image(*size, seed),))
        seen = FluxConditioning(record.text, record.pooled, fields["control"])
        with torch.no_grad():
            found.append(arch.velocity(model, noisy, sigma, arch.collate([seen])))
    assert all(prediction.shape == noisy.shape for prediction in found)
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert (found[0] - found[2]).abs().max() > 1e-4


# ---------------------------------------------------------------- sampling, guidance, precision


def test_samples_from_the_cache_are_those_of_the_pipeline_from_prompt_and_image(folder, theirs, variant):
    arch = architecture(variant, folder)
    encoders = arch.load_encoders("cpu")
    (record,) = encoders.encode_text([Prompt("a red box")])
    extra, source = {}, image(100, 60, 3)
    if variant is KONTEXT:
        fields = encoders.encode_images(torch.zeros(1, 3, 1, 32, 48), (source,))
        record = FluxConditioning(record.text, record.pooled, fields["control"])
        extra = {"image": source, "max_area": 32 * 48, "_auto_resize": False}
    expected = theirs[variant](
        prompt="a red box",
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=3.5,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **extra,
    ).images
    model, seen = arch.load_transformer(), arch.collate([record])
    got = arch.generate(model, encoders, seen, None, generation())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(arch.generate(model, encoders, seen, seen, generation()), got)  # distilled: no negative prompt
    assert (arch.generate(model, encoders, seen, None, generation(guidance_scale=1.0)) - got).abs().max() > 1e-3


def test_training_guidance_is_the_settings(folder):
    dev = architecture(DEV, folder)
    record = dev.collate([conditioning(dev, DEV, dev.load_encoders("cpu"), "a red box")])
    assert told(dev, record)["guidance"].tolist() == [1.0]
    assert told(architecture(DEV, folder, "model.guidance=3.5"), record)["guidance"].tolist() == [3.5]


def test_timesteps_reach_the_transformer_in_float32(folder, variant):
    arch = architecture(variant, folder, "model.dtype=bfloat16")
    data = batch(arch, variant, arch.load_encoders("cpu"), TEXTS[:1])
    seen = told(arch, data.conditioning, sigma=0.4873)
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].tolist() == pytest.approx([0.4873])
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16


def test_bf16_weights_with_float32_adapters_train_and_sample(folder, variant):
    arch = architecture(variant, folder, "model.dtype=bfloat16")
    encoders = arch.load_encoders("cpu")
    data = batch(arch, variant, encoders, TEXTS[:2])
    exact = architecture(variant, folder)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = exact.velocity(exact.load_transformer(), data.latents, sigma, data.conditioning)
    model = arch.load_transformer()
    inject(model, Adapter(rank=4), arch.lora_targets, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = arch.velocity(model, data.latents, sigma, data.conditioning)
        prediction.float().square().mean().backward()
        assert (prediction - expected).abs().max() < 0.1 * expected.abs().max()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.dtype == torch.float32 for g in grads.values())
        one = data.conditioning.select([0])
        sample = arch.generate(model, encoders, one, None, generation())
    assert torch.isfinite(sample).all()
    assert encoders.vae().dtype == torch.float32  # which the pipelines alone would hand bf16 latents
    base = arch.load_transformer()
    assert torch.isfinite(arch.generate(base, encoders, one, None, generation())).all()


# ---------------------------------------------------------------- weights and names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_embeds": False}, "has guidance_embeds=False, this model config needs True"),  # schnell
        ({"in_channels": 384}, "has in_channels=384, this model config needs 64"),  # Fill
    ],
)
def test_other_flux_models_are_refused(tmp_path, settings, message):
    transformer(**settings).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=message):
        architecture(DEV, tmp_path).check()


def test_another_vae_is_refused(folder, tmp_path):
    AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="makes 4 channels at stride 1, the model needs 16 at 8"):
        architecture(DEV, folder, f"model.vae={tmp_path}").load_encoders("cpu").vae()


def test_single_files_of_other_shapes_are_refused_and_schnell_is_told_apart(tmp_path):
    file = tmp_path / "flux.safetensors"
    big = {"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}
    save_file(original_state(transformer()), file)  # heads of size 16
    with pytest.raises(ValueError, match="heads of size 16, FLUX.1 has 128"):
        architecture(DEV, file).check()
    state = original_state(transformer(**big))
    save_file({name: tensor for name, tensor in state.items() if "guidance" not in name}, file)
    with pytest.raises(ValueError, match="has guidance_embeds=False"):
        architecture(DEV, file).check()
    save_file({name: tensor for name, tensor in state.items() if "final_layer.linear" not in name}, file)
    with pytest.raises(ValueError, match="no FluxTransformer2DModel: it has no final_layer.linear.weight"):
        architecture(DEV, file).check()


@pytest.fixture(scope="module")
def published():
    """One block of each kind at the published width, without weights."""
    with init_empty_weights():
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def test_default_targets_are_all_linear_layers_of_the_blocks_but_modulation(folder):
    arch = architecture(DEV, folder)
    model = arch.load_transformer()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inject(model, Adapter(rank=2), arch.lora_targets, seed=0)
    found = {name.split(".lora_")[0] for name in adapter_state(model)}
    assert found == {name for name in linear if "transformer_blocks." in name and "norm" not in name}


def test_diffusers_reads_the_native_names_back(folder, published):
    """Its importer of kohya's files, which have the original names, is the inverse of the rules."""
    arch = architecture(DEV, folder)
    linear = {name: module for name, module in published.named_modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name in linear if re.fullmatch(r"(single_)?transformer_blocks\..*", name)]
    kohya, marks = {}, {name: float(number) for number, name in enumerate(names, 1)}
    for name in names:
        (rule,) = (rule for rule in arch.native if re.fullmatch(rule.pattern, name))
        match = re.fullmatch(rule.pattern, name)
        parts = [match.expand(part) for part in rule.parts] or [name]
        assert name in parts
        key = "lora_unet_" + match.expand(rule.name).replace(".", "_")
        kohya[f"{key}.lora_down.weight"] = torch.ones(1, linear[name].in_features)
        rows = [torch.full((linear[part].out_features, 1), marks[part]) for part in parts]
        kohya[f"{key}.lora_up.weight"] = torch.cat(rows)
    back = _convert_kohya_flux_lora_to_diffusers(kohya)
    up = {name.removeprefix("transformer."): t for name, t in back.items() if name.endswith("lora_B.weight")}
    assert {name.removesuffix(".lora_B.weight") for name in up} == set(names)
    for name, mark in marks.items():
        tensor = up[f"{name}.lora_B.weight"]
        assert tensor.shape[0] == linear[name].out_features
        assert (tensor == mark).all()
