import json
import shutil
from functools import lru_cache

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers
from safetensors.torch import save_file
from torch import nn

from mpp.lora.adapters import Adapter, inject
from mpp.models.contract import Generation, Prompt
from mpp.models.families.qwen_image import QwenImageConditioning
from mpp.models.qwen import ImageProcessor
from tests.families import qwen_image as family
from tests.families.base import Variant, architecture, batch, image
from tests.helpers import unchecked_error

NAMED = {variant.name: variant for variant in family.VARIANTS}
BASE, EDIT, PLUS, LATEST = NAMED.values()
ONE_MEGAPIXEL = "model.control_pixels=1048576"
CAPTIONS = ["a photo of a cat", "", "Tom & Jerry are here " * 40]


@pytest.fixture(scope="module")
def folders(built):
    """A tiny random pipeline of each variant, by its name."""
    return {variant.name: built(variant) for variant in family.VARIANTS}


@pytest.fixture
def make(folders):
    """The architecture of a variant and its encoders."""

    def of(variant: Variant, *overrides):
        arch = architecture(variant, folders[variant.name], *overrides)
        return arch, arch.load_encoders("cpu")

    return of


class Stop(Exception):  # noqa: N818
    pass


class Recording:
    """A processor that remembers what it made last."""

    def __init__(self, processor):
        self.processor, self.made = processor, {}

    def __call__(self, **kwargs):
        self.made = self.processor(**kwargs)
        return self.made


class Told(nn.Module):
    """A text encoder that is given all that its processor made, which the pipelines do not do."""

    def __init__(self, encoder, recording):
        super().__init__()
        self.encoder, self.recording = encoder, recording
        self.dtype, self.device = encoder.dtype, encoder.device

    def forward(self, **kwargs):
        return self.encoder(**kwargs, mm_token_type_ids=self.recording.made["mm_token_type_ids"])


def edit_pipeline(variant, encoders):
    """The pipeline itself with everything in it, and its text encoder told of images."""
    kind = QwenImageEditPipeline if variant is EDIT else QwenImageEditPlusPipeline
    encoders._text_with_images(Prompt("", (image(48, 32, 0),) * variant.controls))  # loads
    processor = Recording(encoders._loaded["processor"])
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**family.SCHEDULER),
        vae=encoders.vae(),
        text_encoder=Told(encoders._loaded["text_encoder"], processor),
        tokenizer=encoders.tokenizer(),
        processor=processor,
        transformer=QwenImageTransformer2DModel(**family.TRANSFORMER),
    )


def test_text_is_what_the_pipeline_makes_of_it(make):
    arch, encoders = make(BASE)
    records = encoders.encode_text([Prompt(caption) for caption in CAPTIONS])
    pipe = encoders.text_pipeline(QwenImagePipeline)
    for caption, record in zip(CAPTIONS, records, strict=True):
        with torch.no_grad():
            want, mask = pipe.encode_prompt([caption], max_sequence_length=512)
        assert mask is None
        torch.testing.assert_close(record.text, want[0])
    assert records[2].text.shape[0] == 512
    batched = arch.collate(records)
    with torch.no_grad():
        _, mask = pipe.encode_prompt(CAPTIONS, max_sequence_length=512)
    assert torch.equal(batched.mask, mask.bool())


@pytest.mark.parametrize("variant", [EDIT, PLUS], ids=["edit", "edit_plus"])
def test_text_with_images_is_what_the_pipeline_makes_of_it(make, monkeypatch, variant):
    _, encoders = make(variant, ONE_MEGAPIXEL)
    images = tuple(image(90 + 30 * n, 64, n) for n in range(variant.controls))
    pipe = edit_pipeline(variant, encoders)
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        raise Stop

    monkeypatch.setattr(pipe, "encode_prompt", spy)
    with pytest.raises(Stop):  # for the images as the pipeline resizes them
        pipe(image=list(images) if variant is PLUS else images[0], prompt="make it blue")
    with torch.no_grad():
        want, _ = type(pipe).encode_prompt(pipe, prompt=["make it blue"], image=seen["image"])
    (record,) = encoders.encode_text([Prompt("make it blue", images)])
    torch.testing.assert_close(record.text, want[0])
    (other,) = encoders.encode_text([Prompt("make it blue", tuple(image(p.width, 64, 9) for p in images))])
    assert (record.text - other.text).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [EDIT, PLUS], ids=["edit", "edit_plus"])
def test_control_images_have_the_pipelines_own_pixels(make, monkeypatch, variant):
    arch, encoders = make(variant, ONE_MEGAPIXEL)
    seen_images = tuple(image(90 + 30 * n, 64, n) for n in range(variant.controls))
    pipe, theirs, ours = edit_pipeline(variant, encoders), [], []

    def spy(images, *args):
        theirs.extend(images if isinstance(images, list) else [images])
        raise Stop

    monkeypatch.setattr(pipe, "prepare_latents", spy)
    with pytest.raises(Stop):
        pipe(image=list(seen_images) if variant is PLUS else seen_images[0], prompt_embeds=torch.zeros(1, 3, 32))
    monkeypatch.setattr(encoders, "latents_of", lambda pixels: ours.append(pixels) or pixels)
    encoders.encode_images(torch.zeros(1, 3, 1, 32, 48), seen_images)
    assert len(ours) == len(theirs) == variant.controls
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[0].shape[-2:] == (864, 1216)
    assert arch.control_pixels == 1024 * 1024


@pytest.mark.parametrize("variant", [EDIT, PLUS], ids=["edit", "edit_plus"])
def test_control_latents_are_those_that_the_pipeline_prepares(make, variant):
    arch, encoders = make(variant)
    images = tuple(image(48 + 8 * n, 32, n) for n in range(variant.controls))
    latents = encoders.encode_images(torch.zeros(1, 3, 1, 32, 48), images)["controls"]
    pipe = arch.pipeline(arch.load_transformer(), encoders)
    pixels = []
    for generation in images:
        width, height, *_ = pipe.sizes(1024 * 1024, generation.width / generation.height)
        pixels.append(pipe.image_processor.preprocess(generation, height, width)[:, :, None])
    kind = QwenImageEditPipeline if variant is EDIT else QwenImageEditPlusPipeline
    _, packed = kind.prepare_latents(
        pipe, pixels if variant is PLUS else pixels[0], 1, 16, 32, 32, torch.float32, "cpu", torch.Generator()
    )
    want = torch.cat([kind._pack_latents(one[None], 1, 16, *one.shape[-2:]) for one in latents], 1)
    torch.testing.assert_close(want, packed)


def test_latents_are_normalised_as_the_pipeline_does(make):
    _, encoders = make(BASE)
    pixels = torch.rand(2, 3, 1, 32, 48) * 2 - 1
    witness = QwenImageEditPipeline(
        scheduler=None, vae=encoders.vae(), text_encoder=None, tokenizer=None, processor=None, transformer=None
    )
    with torch.no_grad():
        torch.testing.assert_close(encoders.encode_pixels(pixels), witness._encode_vae_image(pixels, None))


def test_clips_are_refused(make):
    _, encoders = make(BASE)
    with pytest.raises(ValueError, match="single images, got a clip of 5 frames"):
        encoders.encode_pixels(torch.zeros(1, 3, 5, 32, 32))


@pytest.mark.parametrize(
    ("variant", "count", "wanted"),
    [(BASE, 1, "takes 0"), (EDIT, 0, "takes 1"), (EDIT, 2, "takes 1"), (PLUS, 0, "1 to 3"), (PLUS, 4, "1 to 3")],
)
def test_too_few_or_too_many_control_images_are_refused(make, variant, count, wanted):
    arch, encoders = make(variant)
    images = (image(48, 32, 0),) * count
    with pytest.raises(ValueError, match=rf"has {count} control images, .* {wanted}"):
        encoders.encode_images(torch.zeros(1, 3, 1, 32, 48), images)
    if variant is not BASE:
        with pytest.raises(ValueError, match=rf"the caption 'x' has {count} control images, .* {wanted}"):
            encoders.encode_text([Prompt("x", images)])
    generation = Generation(48, 32, 1, 1, 1.0, 0, images)
    text = QwenImageConditioning(torch.zeros(1, 2, 32), torch.ones(1, 2))
    with pytest.raises(ValueError, match=rf"a sample image has {count} control images"):
        arch.generate(arch.load_transformer(), encoders, text, None, generation)


def test_samples_with_other_images_are_not_batched(make):
    arch, _ = make(PLUS)
    one, two = torch.zeros(16, 1, 4, 4), torch.zeros(16, 1, 4, 6)
    text = torch.zeros(3, 32)
    with pytest.raises(ValueError, match="1 and 2 control images"):
        arch.collate([QwenImageConditioning(text, None, (one,)), QwenImageConditioning(text, None, (one, two))])
    with pytest.raises(ValueError, match="differ in the latents of control 0: 16x1x4x4, 16x1x4x6"):
        arch.collate([QwenImageConditioning(text, None, (one,)), QwenImageConditioning(text, None, (two,))])
    both = arch.collate([QwenImageConditioning(text, None, (one, two)), QwenImageConditioning(text, None, (one, two))])
    assert [tuple(control.shape) for control in both.controls] == [(2, 16, 1, 4, 4), (2, 16, 1, 4, 6)]


@pytest.mark.parametrize("variant", [EDIT, PLUS, LATEST], ids=["edit", "2509", "2511"])
def test_every_control_image_matters(make, variant):
    arch, encoders = make(variant)
    data = batch(arch, variant, encoders, ("x",))
    transformer, sigma = arch.load_transformer(), torch.tensor([0.5])
    with torch.no_grad():
        before = arch.velocity(transformer, data.latents, sigma, data.conditioning)
        for number in range(variant.controls):
            controls = list(data.conditioning.controls)
            controls[number] = -controls[number]
            other = QwenImageConditioning(data.conditioning.text, data.conditioning.mask, tuple(controls))
            assert (arch.velocity(transformer, data.latents, sigma, other) - before).abs().max() > 1e-4


def test_edit_2511_is_told_from_2509_before_loading(make, folders):
    for variant, other, found in ((PLUS, LATEST, True), (LATEST, PLUS, False)):
        with pytest.raises(ValueError, match=f"has zero_cond_t={found}, this model config needs {not found}"):
            architecture(variant, folders[other.name]).check()


def test_zero_cond_t_is_given_to_a_single_file(tmp_path):
    model, state = family.single_file_2511()
    file = tmp_path / "comfy.safetensors"
    save_file(state, file)
    with pytest.raises(ValueError, match="choose model=qwen_image_edit_2511"):
        architecture(PLUS, file).check()
    assert architecture(LATEST, file).load_transformer().config.zero_cond_t
    save_file(dict(model.state_dict()), file)  # without the mark
    assert architecture(LATEST, file).load_transformer().config.zero_cond_t
    assert not architecture(PLUS, file).load_transformer().config.zero_cond_t


def test_a_single_file_of_another_head_size_is_refused(tmp_path):
    save_file(QwenImageTransformer2DModel(**family.TRANSFORMER).state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="head size 16 is not Qwen-Image's 128"):
        architecture(BASE, tmp_path / "small.safetensors").check()


def test_layered_transformers_and_vaes_are_refused(folders, tmp_path):
    folder = tmp_path / "layered"
    shutil.copytree(folders[BASE.name], folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_layer3d_rope": True}))
    with pytest.raises(ValueError, match="use_layer3d_rope=True, this model config needs False"):
        architecture(BASE, folder).check()
    family.vae(input_channels=4).save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="of 4-channel images, the model needs 16 at 8 of 3-channel ones"):
        architecture(BASE, folder).load_encoders("cpu").vae()


def test_wrong_settings_are_refused():
    settings = ("task=inpaint", "control_pixels=100", "text_length=2000", "text_length=1024")
    task, area, length, fits = (unchecked_error(architecture, BASE, "x", f"model.{setting}") for setting in settings)
    assert "model.task must be one of text, edit, edit_plus, got 'inpaint'" in task
    assert "model.control_pixels must be at least 1024 (32x32), got 100" in area
    assert "model.text_length must be in 1 to 1024, got 2000" in length
    assert fits == "accepted"


def test_the_transformer_gets_sigma_as_it_is(make):
    arch, encoders = make(BASE)
    data = batch(arch, BASE, encoders, ("x", "y"))
    transformer, seen = arch.load_transformer().bfloat16(), {}
    transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        arch.velocity(transformer, data.latents, torch.tensor([0.25, 0.4873]), data.conditioning)
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].tolist() == pytest.approx([0.25, 0.4873])
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert len(seen["img_shapes"]) == 2


@pytest.mark.parametrize("variant", [BASE, LATEST], ids=["text", "2511"])
def test_a_bf16_base_trains_float32_adapters_under_autocast(make, variant):
    arch, encoders = make(variant)
    data = batch(arch, variant, encoders, ("x", "a longer y"))
    bf16, _ = make(variant, "model.dtype=bfloat16")
    transformer = bf16.load_transformer().train()
    inject(transformer, Adapter(rank=2), bf16.lora_targets, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = bf16.velocity(transformer, data.latents, torch.tensor([0.3, 0.8]), data.conditioning)
    prediction.float().square().mean().backward()
    gradients = [p.grad for p in transformer.parameters() if p.requires_grad]
    assert gradients
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("variant", [BASE, EDIT, PLUS], ids=["text", "edit", "edit_plus"])
def test_samples_are_generated_with_the_dtypes_that_configs_have(make, folders, variant):
    arch, encoders = make(variant, "model.dtype=bfloat16", "model.text_dtype=bfloat16")
    images = tuple(image(48, 32, n) for n in range(variant.controls))
    record = arch.collate(encoders.encode_text([Prompt("x", images)]))
    assert encoders.vae().dtype == torch.float32
    generated = arch.generate(arch.load_transformer(), encoders, record, None, Generation(48, 32, 1, 2, 1.0, 0, images))
    assert generated.shape == (1, 3, 32, 48)
    assert float(generated.std()) > 0


@pytest.mark.parametrize("variant", [BASE, EDIT, PLUS], ids=["text", "edit", "edit_plus"])
def test_guidance_runs_only_with_a_negative_prompt_and_is_the_pipelines_own(make, variant):
    arch, encoders = make(variant)
    images = tuple(image(48, 32, n) for n in range(variant.controls))
    positive, negative = (arch.collate([r]) for r in encoders.encode_text([Prompt("x", images), Prompt(" ", images)]))
    transformer, calls = arch.load_transformer(), []
    transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k["encoder_hidden_states"]), with_kwargs=True)
    plain = arch.generate(transformer, encoders, positive, None, Generation(48, 32, 1, 2, 4.0, 0, images))
    assert len(calls) == 2
    guided = arch.generate(transformer, encoders, positive, negative, Generation(48, 32, 1, 2, 4.0, 0, images))
    assert len(calls) == 6
    assert [call.shape[1] for call in calls[2:4]] == [positive.text.shape[1], negative.text.shape[1]]
    assert not torch.equal(plain, guided)


def test_validating_first_in_inference_mode_does_not_spoil_training(make):
    arch, encoders = make(LATEST)
    data = batch(arch, LATEST, encoders, ("x",))
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


@pytest.mark.parametrize("style", ["diffusion_model", "lora_unet"])
def test_lora_names_of_every_layer_in_the_blocks_are_the_originals(make, style):
    transformer = make(BASE)[0].load_transformer()
    names = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer_bl")]
    assert len(names) == 28
    state = {}
    for name in names:
        stem = f"diffusion_model.{name}" if style == "diffusion_model" else f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
        state[f"{stem}.alpha"] = torch.tensor(2.0)
    found = _convert_non_diffusers_qwen_lora_to_diffusers(state)
    assert found.keys() == {f"transformer.{name}.lora_{x}.weight" for name in names for x in "AB"}


def test_the_processor_needs_no_part_for_videos(folders):
    processor = ImageProcessor.from_pretrained(folders[EDIT.name] / "processor")
    made = processor(text=["<|image_pad|> x"], images=[image(56, 56, 0)], padding=True, return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert made["mm_token_type_ids"].sum() == 4
