import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)

from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.models.contract import Generation, Prompt
from tests.families.base import architecture, batch, image
from tests.families.kandinsky5 import VARIANTS, text_to_video, transformer, vae

(VARIANT,) = VARIANTS
TEXTS = ["a red box", "a cat on a  blue chair &amp; a dog", "far too long a caption " * 40]  # the last is cut


class Processor(Qwen2VLProcessor):
    """The pipeline's own, without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("kandinsky5")
    text_to_video(target)
    return target


@pytest.fixture(scope="module")
def arch(folder):
    return architecture(VARIANT, folder)


@pytest.fixture(scope="module")
def encoders(arch):
    return arch.load_encoders("cpu")


@pytest.fixture(scope="module")
def theirs(folder):
    """Diffusers' pipeline with all its components."""
    parts = {
        "transformer": Kandinsky5Transformer3DModel,
        "vae": AutoencoderKLHunyuanVideo,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "text_encoder_2": CLIPTextModel,
        "tokenizer_2": CLIPTokenizer,
    }
    loaded = {name: kind.from_pretrained(folder / name) for name, kind in parts.items()}
    processor = Processor(Qwen2VLImageProcessor(), AutoTokenizer.from_pretrained(folder / "tokenizer"))
    pipe = Kandinsky5T2VPipeline(tokenizer=processor, **loaded)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def records(arch, encoders, *texts):
    return encoders.encode_text([Prompt(text) for text in texts])


def told(arch, record, *, model=None, sigma=0.5, noisy=None):
    """What the transformer is called with."""
    seen = {}
    model = arch.load_transformer() if model is None else model
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    noisy = random(1, 16, 2, 4, 6) if noisy is None else noisy
    with torch.no_grad():
        prediction = arch.velocity(model, noisy, torch.tensor([sigma]), record)
    assert prediction.shape == noisy.shape
    return seen


def random(*shape):
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- text


def test_text_is_that_of_the_pipelines_own_encode_prompt(folder, theirs):
    arch = architecture(VARIANT, folder, "model.text_length=40")
    found = records(arch, arch.load_encoders("cpu"), *TEXTS)
    for text, record in zip(TEXTS, found, strict=True):
        states, pooled, ends = theirs.encode_prompt(text, max_sequence_length=40)
        torch.testing.assert_close(record.text, states[0])
        torch.testing.assert_close(record.pooled, pooled[0])
        assert ends.tolist() == [0, len(record.text)]
    lengths = [len(record.text) for record in found]
    assert lengths[0] < lengths[1] < lengths[2] <= 40


def test_samples_with_texts_of_several_lengths_are_predicted_as_if_alone(arch, encoders):
    short, long, other = records(arch, encoders, "a red box", "a cat on a blue chair", "a bed rox")
    assert len(short.text) == len(other.text) < len(long.text)
    model, calls = arch.load_transformer(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["timestep"])), with_kwargs=True)
    noisy, sigma = random(3, 16, 2, 4, 6), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        together = arch.velocity(model, noisy, sigma, arch.collate([short, long, other]))
        assert sorted(calls) == [1, 2]
        for number, record in enumerate((short, long, other)):
            one = slice(number, number + 1)
            alone = arch.velocity(model, noisy[one], sigma[one], arch.collate([record]))
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_the_transformer_attends_to_padding(arch, encoders):
    """Else the batch could go through it at once."""
    (record,) = records(arch, encoders, "a red box")
    batched = arch.collate([record])
    padded = type(record)(
        torch.cat([batched.text, torch.zeros(1, 9, 32)], 1), batched.pooled, torch.ones(1, len(record.text) + 9) > 0
    )
    model, noisy, sigma = arch.load_transformer(), random(1, 16, 2, 4, 6), torch.tensor([0.5])
    with torch.no_grad():
        plain, other = (arch.velocity(model, noisy, sigma, c) for c in (batched, padded))
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize("length", [0, 1024])
def test_text_lengths_beyond_the_transformers_positions_are_refused(folder, length):
    with pytest.raises(ValueError, match="model.text_length must be 1 to 1023"):
        architecture(VARIANT, folder, f"model.text_length={length}")


# ---------------------------------------------------------------- latents and samples


def test_latents_are_normalised_as_the_image_to_video_pipeline_does(arch, encoders, theirs, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = Kandinsky5I2VPipeline(**theirs.components)
    source = image(48, 32, 0)
    with torch.no_grad():
        made = pipe.prepare_latents(source, 1, 16, 32, 48, 5, torch.float32, torch.device("cpu"))
    pixels = pipe.video_processor.preprocess(source, 32, 48)[:, :, None]
    latents = encoders.encode_pixels(pixels)
    torch.testing.assert_close(latents[:, :, 0], made[:, 0, :, :, :16].permute(0, 3, 1, 2))
    assert 0.5 < float(latents.std()) < 2


def test_samples_from_the_cache_are_those_of_the_pipeline_from_prompts(arch, encoders, theirs):
    expected = theirs(
        prompt="a red box",
        negative_prompt="bad, worse and worst",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]
    positive, negative = (arch.collate([r]) for r in records(arch, encoders, "a red box", "bad, worse and worst"))
    generation = Generation(width=48, height=32, frames=5, steps=3, guidance_scale=4.0, seed=5)
    got = arch.generate(arch.load_transformer(), encoders, positive, negative, generation)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cells", "scale"), [((60, 106), (1, 2, 2)), ((4, 106), (1, 3.16, 3.16)), ((60, 108), (1, 3.16, 3.16))]
)
def test_positions_are_scaled_by_the_size_in_pixels(arch, encoders, theirs, cells, scale):
    (record,) = records(arch, encoders, "a red box")
    seen = told(arch, arch.collate([record]), noisy=random(1, 16, 1, *cells))
    assert seen["scale_factor"] == scale == theirs._get_scale_factor(cells[0] * 8, cells[1] * 8)


def test_a_transformer_without_visual_condition_gets_latents_alone(arch, encoders):
    (record,) = records(arch, encoders, "a red box")
    record = arch.collate([record])
    seen = told(arch, record)["hidden_states"]
    assert seen.shape[-1] == 33
    assert seen[..., 16:].abs().sum() == 0
    assert told(arch, record, model=transformer(visual_cond=False))["hidden_states"].shape[-1] == 16


# ---------------------------------------------------------------- precision, weights and names


def test_timesteps_reach_the_transformer_in_float32(folder, encoders):
    arch = architecture(VARIANT, folder, "model.dtype=bfloat16")
    (record,) = records(arch, encoders, "a red box")
    seen = told(arch, arch.collate([record]), sigma=0.4873)
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].tolist() == pytest.approx([487.3])
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16


def test_bf16_weights_with_float32_adapters_train_and_sample(folder, arch):
    low = architecture(VARIANT, folder, "model.dtype=bfloat16")
    encoders = low.load_encoders("cpu")
    data = batch(low, VARIANT, encoders, TEXTS[:2])
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = arch.velocity(arch.load_transformer(), data.latents, sigma, data.conditioning)
    model = low.load_transformer()
    inject(model, Adapter(rank=4), low.lora_targets, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = low.velocity(model, data.latents, sigma, data.conditioning)
        prediction.float().square().mean().backward()
    assert (prediction - expected).abs().max() < 0.1 * expected.abs().max()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    (record,) = records(low, encoders, "a red box")
    generation = Generation(width=48, height=32, frames=5, steps=2, guidance_scale=1.0, seed=5)
    assert torch.isfinite(low.generate(low.load_transformer(), encoders, low.collate([record]), None, generation)).all()


def test_default_targets_are_all_linear_layers_of_the_blocks_but_modulation(arch):
    model = arch.load_transformer()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inject(model, Adapter(rank=2), arch.lora_targets, seed=0)
    found = {name.split(".lora_")[0] for name in adapter_state(model)}
    assert found == {name for name in linear if "_transformer_blocks." in name and "modulation" not in name}


def test_the_ten_second_models_are_refused(tmp_path):
    transformer(attention_type="nabla").save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="has attention_type=nabla, this model config needs regular"):
        architecture(VARIANT, tmp_path).check()


def test_another_vae_is_refused(folder, tmp_path):
    vae(latent_channels=4).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="makes 4 channels at stride 8, the model needs 16 at 8"):
        architecture(VARIANT, folder, f"model.vae={tmp_path}").load_encoders("cpu").vae()
