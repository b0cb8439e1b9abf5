import re

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from safetensors.torch import save_file
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration, ProcessorMixin, Qwen3ForCausalLM

from mpp.config import build
from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.models.contract import Generation, Prompt
from mpp.models.families.flux2 import Flux2Conditioning
from tests.families import flux2
from tests.families.base import architecture, image
from tests.helpers import config, unchecked_error

DEV, _, KLEIN, _ = flux2.VARIANTS
TEXTS = ["a red box", "", "a [IMG] cat on a blue chair"]


@pytest.fixture(scope="module")
def dev(built):
    return built(DEV)


@pytest.fixture(scope="module")
def klein(built):
    return built(KLEIN)


def vae_of(folder):
    return AutoencoderKLFlux2.from_pretrained(folder / "vae").eval()


def noisy_of(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def record(arch, *, seed=0, batch=None, controls=()):
    """Random conditioning; unbatched, or batched by `collate`."""
    items = [
        Flux2Conditioning(
            noisy_of(arch.text_length, 3 * flux2.WIDTH, seed=seed + n),
            tuple(noisy_of(128, *size, seed=seed + n + 10 * k) for k, size in enumerate(controls, 1)) or None,
        )
        for n in range(batch or 1)
    ]
    return items[0] if batch is None else arch.collate(items)


class TextProcessor(ProcessorMixin):
    """What dev's PixtralProcessor does with text; its images need torchvision."""

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


def test_texts_of_dev_are_those_of_the_pipeline_with_its_processor(dev):
    arch = architecture(DEV, dev)
    tokenizer = AutoTokenizer.from_pretrained(dev / "tokenizer")
    pipe = Flux2Pipeline(
        scheduler=None,
        vae=None,
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(dev / "text_encoder").eval(),
        tokenizer=TextProcessor(tokenizer, tokenizer.chat_template),
        transformer=None,
    )
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(TEXTS, device="cpu", max_sequence_length=arch.text_length)
    ours = arch.load_encoders("cpu").encode_text([Prompt(text) for text in TEXTS])
    assert torch.equal(torch.stack([item.text for item in ours]), theirs)
    assert all(item.controls is None for item in ours)


def test_texts_of_klein_are_those_of_the_pipeline(klein):
    arch = architecture(KLEIN, klein)
    pipe = Flux2KleinPipeline(
        scheduler=None,
        vae=None,
        text_encoder=Qwen3ForCausalLM.from_pretrained(klein / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(klein / "tokenizer"),
        transformer=None,
    )
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(TEXTS, device="cpu", max_sequence_length=arch.text_length)
    ours = arch.load_encoders("cpu").encode_text([Prompt(text) for text in TEXTS])
    assert torch.equal(torch.stack([item.text for item in ours]), theirs)


@pytest.mark.parametrize("variant", [DEV, KLEIN], ids=["dev", "klein"])
def test_text_is_kept_at_padding_and_cut_at_the_models_length(variant, request):
    folder = request.getfixturevalue("dev" if variant is DEV else "klein")
    arch = architecture(variant, folder)
    short, long = arch.load_encoders("cpu").encode_text([Prompt("x"), Prompt("a long caption " * 40)])
    assert len(short.text) == len(long.text) == arch.text_length
    assert (short.text.abs().sum(1) > 0).all()


@pytest.mark.parametrize("length", [5, 4000])
def test_text_of_another_length_is_refused(klein, length):
    arch = architecture(KLEIN, klein)
    wrong = Flux2Conditioning(torch.zeros(length, 3 * flux2.WIDTH))
    with pytest.raises(ValueError, match=f"has {length} tokens, model.text_length is 112; run `python -m mpp.prepare`"):
        arch.collate([record(arch), wrong])


def test_latents_are_those_of_the_pipeline(dev):
    arch = architecture(DEV, dev)
    pipe = Flux2Pipeline(scheduler=None, vae=vae_of(dev), text_encoder=None, tokenizer=None, transformer=None)
    pixels = noisy_of(2, 3, 1, 48, 64).clamp(-1, 1)
    with torch.no_grad():
        theirs = pipe._encode_vae_image(pixels[:, :, 0], generator=None)
    torch.testing.assert_close(arch.load_encoders("cpu").encode_pixels(pixels)[:, :, 0], theirs, rtol=1e-5, atol=1e-5)


class StopError(Exception):
    """Raised when a spy has seen enough."""


@pytest.mark.parametrize("kind", [Flux2Pipeline, pytest.param(Flux2KleinPipeline, marks=pytest.mark.slow)])
def test_reference_images_are_encoded_as_the_pipeline_does(dev, monkeypatch, kind):
    """Odd sizes are cropped, and those above a megapixel made smaller first."""
    arch = architecture(DEV, dev)
    original, seen = kind.prepare_image_latents, []

    def spy(self, *args, **kwargs):
        seen.append(original(self, *args, **kwargs)[0])
        raise StopError

    monkeypatch.setattr(kind, "prepare_image_latents", spy)
    transformer = arch.load_transformer()
    pipe = kind(scheduler=None, vae=vae_of(dev), text_encoder=None, tokenizer=None, transformer=transformer)
    images = [image(101, 75, 0), image(1400, 801, 1)]
    with pytest.raises(StopError):
        pipe(image=images, prompt_embeds=record(arch).text[None], height=32, width=32, guidance_scale=1.0)
    controls = arch.load_encoders("cpu").encode_images(torch.zeros(1, 3, 1, 32, 32), images)["controls"]
    ours = torch.cat([Flux2Pipeline._pack_latents(control[None]) for control in controls], 1)
    torch.testing.assert_close(ours, seen[0], rtol=1e-5, atol=1e-5)


def test_without_reference_images_there_is_no_field(dev):
    assert architecture(DEV, dev).load_encoders("cpu").encode_images(torch.zeros(1, 3, 1, 32, 32), ()) == {}


@pytest.mark.parametrize("size", [(63, 200), (600, 70)])
def test_reference_images_that_the_pipeline_refuses_are_refused(dev, size):
    with pytest.raises(ValueError, match="Image too small|Aspect ratio too extreme"):
        architecture(DEV, dev).load_encoders("cpu").encode_images(torch.zeros(1, 3, 1, 32, 32), [image(*size, 0)])


@pytest.mark.parametrize("others", [(), ((2, 3),), ((2, 3), (3, 2))])
def test_mixed_reference_images_in_a_batch_are_refused(dev, others):
    arch = architecture(DEV, dev)
    with pytest.raises(ValueError, match="reference images of different number or size"):
        arch.collate([record(arch, controls=((2, 3), (2, 3))), record(arch, controls=others)])


def test_every_reference_image_and_their_order_matter(dev):
    arch = architecture(DEV, dev)
    transformer = arch.load_transformer()
    conditioning = record(arch, batch=2, controls=((2, 3), (3, 2), (2, 3)))
    noisy, sigma = noisy_of(2, 128, 1, 3, 3), torch.tensor([0.3, 0.8])
    first, second, third = conditioning.controls
    with torch.no_grad():
        all_three, *fewer = [
            arch.velocity(transformer, noisy, sigma, Flux2Conditioning(conditioning.text, controls))
            for controls in ((first, second, third), (first, second), (third, second, first), None)
        ]
    assert all_three.shape == noisy.shape
    for other in fewer:
        assert (all_three - other).abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_timesteps_stay_exact_over_bfloat16_weights_under_autocast(dev):
    arch = architecture(DEV, dev, "model.dtype=bfloat16")
    transformer = arch.load_transformer()
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    assert next(iter(adapter_state(transformer).values())).dtype == torch.float32
    seen = []
    transformer.time_guidance_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    conditioning = record(arch, batch=2, controls=((2, 3),))
    sigma = torch.tensor([0.4873, 0.4874])  # one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        exact = arch.velocity(transformer, noisy_of(2, 128, 1, 3, 3), sigma, conditioning)
    assert seen[0].tolist() == pytest.approx([487.3, 487.4], abs=1e-3)
    assert torch.isfinite(exact).all()


def test_a_bfloat16_model_without_autocast_predicts_and_generates_with_a_float32_vae(dev):
    arch = architecture(DEV, dev, "model.dtype=bfloat16")
    transformer = arch.load_transformer()
    prediction = arch.velocity(transformer, noisy_of(1, 128, 1, 3, 3), torch.tensor([0.5]), record(arch, batch=1))
    assert prediction.dtype == torch.bfloat16
    assert (
        arch.generate(transformer, arch.load_encoders("cpu"), record(arch, batch=1), None, generation(1.0))
        .isfinite()
        .all()
    )


def generation(guidance_scale, **settings):
    return Generation(width=48, height=32, frames=1, steps=2, guidance_scale=guidance_scale, seed=0, **settings)


def fed(arch, monkeypatch, transformer, *arguments):
    """What sampling feeds its scheduler: sigma, latents, prediction; and how often it asks the model."""
    encoders = arch.load_encoders("cpu")
    kind = type(arch.pipeline(transformer, encoders).scheduler)
    original, steps, calls = kind.step, [], []

    def spy(self, output, timestep, sample, *args, **kwargs):
        steps.append((float(timestep) / 1000, sample.clone(), output.clone()))
        return original(self, output, timestep, sample, *args, **kwargs)

    hook = transformer.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    monkeypatch.setattr(kind, "step", spy)
    arch.generate(transformer, encoders, *arguments)
    hook.remove()
    shape = (128, 1, 2, 3)
    return [(sigma, flux2.unpack(a, shape), flux2.unpack(b, shape)) for sigma, a, b in steps], len(calls)


def test_devs_guidance_in_training_is_the_pipelines_embedded_guidance(dev, monkeypatch):
    arch = architecture(DEV, dev, "model.guidance=3.5")
    transformer = arch.load_transformer()
    conditioning = record(arch, batch=1)
    steps, calls = fed(arch, monkeypatch, transformer, conditioning, record(arch, batch=1, seed=5), generation(3.5))
    assert calls == len(steps) == 2
    plain = architecture(DEV, dev)
    for sigma, noisy, theirs in steps:
        with torch.no_grad():
            ours = arch.velocity(transformer, noisy, torch.tensor([sigma]), conditioning)
            unguided = plain.velocity(transformer, noisy, torch.tensor([sigma]), conditioning)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (unguided - theirs).abs().max() > 1e-3


def test_kleins_guidance_is_real_and_needs_a_negative_prompt(klein, monkeypatch):
    arch = architecture(KLEIN, klein)
    transformer = arch.load_transformer()
    positive, negative = record(arch, batch=1), record(arch, batch=1, seed=5)
    steps, calls = fed(arch, monkeypatch, transformer, positive, negative, generation(3.0))
    assert calls == 4
    for sigma, noisy, theirs in steps:
        with torch.no_grad():
            towards, away = (
                arch.velocity(transformer, noisy, torch.tensor([sigma]), conditioning)
                for conditioning in (positive, negative)
            )
        torch.testing.assert_close(away + 3 * (towards - away), theirs, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    assert fed(arch, monkeypatch, transformer, positive, None, generation(3.0))[1] == 2


def test_dev_and_klein_are_told_apart(dev, klein):
    with pytest.raises(ValueError, match="has guidance_embeds=False, this model config needs True"):
        architecture(DEV, klein).check()
    with pytest.raises(ValueError, match="has guidance_embeds=True, this model config needs False"):
        architecture(KLEIN, dev).check()
    assert architecture(DEV, dev).family != architecture(KLEIN, klein).family


def test_an_unknown_text_encoder_is_refused():
    message = unchecked_error(build, config("train", ["model=flux2", "data.cache_dir=x", "model.text=t5"]).model)
    assert message.startswith("ValueError: model.text must be one of mistral, qwen3, got 't5'")


def test_another_vae_is_refused(dev, tmp_path):
    small = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3}
    up = {"up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKLFlux2(**small, **up).save_pretrained(tmp_path / "vae")
    encoders = architecture(DEV, dev, f"model.vae={tmp_path}").load_encoders("cpu")
    with pytest.raises(ValueError, match="makes 128 channels at stride 8 as 2x2 patches, the model needs 128 at 16"):
        encoders.vae()


def test_a_single_file_of_another_head_size_is_refused(dev, tmp_path):
    file = tmp_path / "flux2.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in flux2.original(flux2.transformer()).items()}, file)
    with pytest.raises(ValueError, match="head size 16 is not FLUX.2's 128"):
        architecture(DEV, file).check()


def linears(transformer: Flux2Transformer2DModel):
    """All linear layers of the blocks."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    }


def test_default_targets_are_all_linear_layers_of_the_blocks(dev):
    arch = architecture(DEV, dev)
    transformer = arch.load_transformer()
    wanted = set(linears(transformer))
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    assert {name.split(".lora_")[0] for name in adapter_state(transformer)} == wanted


@pytest.mark.parametrize("form", ["diffusion_model", "kohya"])
def test_native_names_are_those_that_diffusers_reads(dev, form):
    """Each original layer gets a LoRA whose rows are numbered; diffusers puts them where the rules say they belong."""
    arch = architecture(DEV, dev)
    sizes = {name: layer.weight.shape for name, layer in linears(arch.load_transformer()).items()}
    state, expected = {}, {}
    for name in sizes:
        ((rule, match),) = [(r, m) for r in arch.native if (m := re.fullmatch(r.pattern, name))]
        original, parts = match.expand(rule.name), [match.expand(part) for part in rule.parts] or [name]
        rows = torch.cat([torch.arange(sizes[part][0]) + 1e4 * n for n, part in enumerate(parts)])
        up, down = rows[:, None].repeat(1, 2), torch.ones(2, sizes[name][1])
        if form == "kohya":
            key = f"lora_unet_{original.replace('.', '_')}"
            state |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        else:
            state |= {
                f"diffusion_model.{original}.lora_B.weight": up,
                f"diffusion_model.{original}.lora_A.weight": down,
            }
        own = torch.arange(sizes[name][0]) + 1e4 * parts.index(name)
        expected[f"transformer.{name}.lora_B.weight"] = own[:, None].repeat(1, 2)
    convert = (
        _convert_kohya_flux2_lora_to_diffusers if form == "kohya" else _convert_non_diffusers_flux2_lora_to_diffusers
    )
    read = {name: tensor for name, tensor in convert(state).items() if name.endswith("lora_B.weight")}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
