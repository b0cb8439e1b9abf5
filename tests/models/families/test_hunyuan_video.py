import re
from contextlib import contextmanager

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModel, LlamaModel, LlavaForConditionalGeneration

from mpp.lora.adapters import Adapter, inject
from mpp.models.contract import Generation, Prompt
from tests.families.base import architecture, batch, conditioning, image
from tests.families.hunyuan_video import VARIANTS
from tests.helpers import unchecked_error

TEXT = "a red fox runs through the snow"
LONG = "zq " * 150  # two tokens a word under the tests' tokenizer: more than the 256 that the pipelines read
T2V, CONCAT, REPLACE = VARIANTS
I2V = (CONCAT, REPLACE)


def named(variant):
    return variant.name.replace(" ", "_")


@pytest.fixture(scope="module")
def folders(built):
    """The pipeline folder of each variant."""
    return {variant.name: built(variant) for variant in VARIANTS}


@pytest.fixture(params=VARIANTS, ids=named)
def made(request, folders):
    """A variant, its architecture and its encoders."""
    arch = architecture(request.param, folders[request.param.name])
    return request.param, arch, arch.load_encoders("cpu")


def whole_pipeline(folder, arch, encoders, model):
    """Diffusers' pipeline with its text encoders, put together without mpp's encoders."""
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder_2": CLIPTextModel.from_pretrained(folder / "text_encoder_2"),
        "tokenizer_2": AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        "transformer": model,
        "vae": encoders.vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }
    if arch.image_condition is None:
        pipe = HunyuanVideoPipeline(text_encoder=LlamaModel.from_pretrained(folder / "text_encoder"), **parts)
    else:
        pipe = HunyuanVideoImageToVideoPipeline(
            text_encoder=LlavaForConditionalGeneration.from_pretrained(folder / "text_encoder"),
            image_processor=CLIPImageProcessor.from_pretrained(folder / "image_processor"),
            **parts,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def inputs_of(model):
    """What the transformer is called with, one dict for each call."""
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def record_of(arch, encoders, text, frame, clip=None):
    """The collated record of one sample whose first frame is `frame`."""
    if clip is None and frame is not None:
        clip = torch.zeros(1, 3, 9, frame.height, frame.width)
        pixels = torch.tensor(list(frame.convert("RGB").tobytes()), dtype=torch.float32)
        clip[0, :, 0] = pixels.view(frame.height, frame.width, 3).permute(2, 0, 1) / 127.5 - 1
    (record,) = encoders.encode_text([Prompt(text, () if frame is None else (frame,))])
    fields = {} if arch.image_condition is None else encoders.encode_images(clip, ())
    return arch.collate([type(record).from_tensors({**record.tensors(), **fields})])


@pytest.mark.parametrize("text", [TEXT, "", LONG], ids=["text", "empty", "too long"])
def test_the_transformer_sees_what_the_pipeline_shows_it_from_prompt_and_image(made, folders, text):
    variant, arch, encoders = made
    model = arch.load_transformer().eval()
    pipe = whole_pipeline(folders[variant.name], arch, encoders, model)
    frame = image(48, 32, 1)
    more = {} if arch.image_condition is None else {"image": frame}
    with inputs_of(model) as calls:
        pipe(prompt=text, height=32, width=48, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
             output_type="latent", generator=torch.Generator().manual_seed(0), **more)  # fmt: skip
    for theirs in calls:
        hidden = theirs["hidden_states"]
        noisy = hidden[:, :, 1:] if variant is REPLACE else hidden[:, :16]
        record = record_of(arch, encoders, text, frame if more else None)
        with inputs_of(model) as ours, torch.no_grad():
            arch.velocity(model, noisy, theirs["timestep"] / 1000, record)
        (ours,) = ours
        torch.testing.assert_close(ours["hidden_states"], hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["timestep"], theirs["timestep"])
        assert ours["guidance"] is None if variant is CONCAT else torch.equal(ours["guidance"], theirs["guidance"])
        real = theirs["encoder_attention_mask"][0].bool()
        assert torch.equal(ours["encoder_attention_mask"], torch.ones(1, int(real.sum()), dtype=torch.bool))
        torch.testing.assert_close(
            ours["encoder_hidden_states"], theirs["encoder_hidden_states"][:, real], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(ours["pooled_projections"], theirs["pooled_projections"])


def test_captions_of_one_call_are_encoded_as_each_alone(made):
    _, arch, encoders = made
    seen = () if arch.image_condition is None else (image(48, 32, 1),)
    together = encoders.encode_text([Prompt(text, seen) for text in (TEXT, "x")])
    for text, record in zip((TEXT, "x"), together, strict=True):
        (alone,) = encoders.encode_text([Prompt(text, seen)])
        assert torch.equal(alone.text, record.text)
        assert torch.equal(alone.pooled, record.pooled)
    assert together[0].text.shape[0] > together[1].text.shape[0]


@pytest.mark.parametrize("variant", I2V, ids=named)
def test_the_text_encoder_sees_the_image_and_none_is_a_black_one(folders, variant):
    encoders = architecture(variant, folders[variant.name]).load_encoders("cpu")
    images = [(image(48, 32, 1),), (image(48, 32, 2),), (), (Image.new("RGB", (48, 32)),)]
    one, other, none, black = (r.text for r in encoders.encode_text([Prompt(TEXT, seen) for seen in images]))
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(none, black)


@pytest.mark.parametrize("variant", I2V, ids=named)
def test_the_first_frames_latents_matter_and_are_asked_for(folders, variant):
    arch = architecture(variant, folders[variant.name])
    encoders, model = arch.load_encoders("cpu"), arch.load_transformer()
    data = batch(arch, variant, encoders, (TEXT,))
    other = type(data.conditioning)(**{**vars(data.conditioning), "first_frame": -data.conditioning.first_frame})
    without = type(data.conditioning)(**{**vars(data.conditioning), "first_frame": None})
    sigma = torch.tensor([0.5])
    with torch.no_grad():
        change = arch.velocity(model, data.latents, sigma, data.conditioning) - arch.velocity(
            model, data.latents, sigma, other
        )
    assert change.abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs the first frame's latents in its conditioning, got none"):
        arch.velocity(model, data.latents, sigma, without)


@pytest.mark.parametrize("variant", I2V, ids=named)
def test_samples_of_one_batch_have_first_frames_of_one_shape(folders, variant):
    arch = architecture(variant, folders[variant.name])
    encoders = arch.load_encoders("cpu")
    wide, high = (conditioning(arch, variant, encoders, TEXT, cells=cells) for cells in ((2, 3), (3, 2)))
    (textual,) = encoders.encode_text([Prompt(TEXT)])
    for pair in ((wide, high), (wide, textual)):
        with pytest.raises(ValueError, match="first frames of one batch must have one shape"):
            arch.collate(pair)
    assert arch.collate([textual, textual]).first_frame is None


def generation(**settings):
    defaults = {"width": 48, "height": 32, "frames": 9, "steps": 2, "guidance_scale": 1.0, "seed": 0}
    return Generation(**{**defaults, "controls": (image(48, 32, 1),), **settings})


def test_33_channels_are_generated_with_the_frames_that_the_pipeline_throws_away(folders):
    arch = architecture(CONCAT, folders[CONCAT.name])
    encoders, model = arch.load_encoders("cpu"), arch.load_transformer().eval()
    record = record_of(arch, encoders, TEXT, image(48, 32, 1))
    ours = arch.generate(model, encoders, record, None, generation())
    pipe = whole_pipeline(folders[CONCAT.name], arch, encoders, model)
    theirs = pipe(image(48, 32, 1), TEXT, height=32, width=48, num_frames=9, num_inference_steps=2,
                  output_type="pt", generator=torch.Generator().manual_seed(0)).frames[0]  # fmt: skip
    assert ours.shape[0] == theirs.shape[0] + 4
    torch.testing.assert_close(ours[4:], theirs.clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_guidance_is_told_to_distilled_transformers_and_classifier_free_for_others(made):
    variant, arch, encoders = made
    model = arch.load_transformer().eval()
    frame = None if variant is T2V else image(48, 32, 1)
    record = record_of(arch, encoders, TEXT, frame)
    negative = arch.collate(encoders.encode_text([Prompt("ugly")]))
    with inputs_of(model) as calls:
        arch.generate(model, encoders, record, negative, generation(guidance_scale=6.0))
    if variant is CONCAT:
        assert len(calls) == 4
        assert torch.equal(calls[1]["pooled_projections"], negative.pooled)
    else:
        assert [call["guidance"].tolist() for call in calls] == [[6000.0], [6000.0]]


def test_image_to_video_generates_from_one_image(folders):
    arch = architecture(CONCAT, folders[CONCAT.name])
    encoders, model = arch.load_encoders("cpu"), arch.load_transformer()
    record = record_of(arch, encoders, TEXT, image(48, 32, 1))
    with pytest.raises(ValueError, match="hunyuan_video_i2v generates from one image, the first frame; got 0"):
        arch.generate(model, encoders, record, None, generation(controls=()))


def test_bf16_weights_see_float32_timesteps_and_train_float32_adapters(made, folders):
    variant, arch, encoders = made
    data = batch(arch, variant, encoders, (TEXT,))
    low = architecture(variant, folders[variant.name], "model.dtype=bfloat16")
    model = low.load_transformer().train()
    inject(model, Adapter(rank=2), low.lora_targets, seed=0)
    with inputs_of(model) as calls, torch.autocast("cpu", torch.bfloat16):
        low.velocity(model, data.latents, torch.tensor([0.4873]), data.conditioning).float().square().mean().backward()
    assert calls[0]["timestep"].dtype == torch.float32
    assert float(calls[0]["timestep"]) == pytest.approx(487.3)  # 488 in bfloat16
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_default_targets_are_the_linear_layers_of_the_blocks_but_modulation(made):
    _, arch, _ = made
    linear = {name for name, module in arch.skeleton().named_modules() if isinstance(module, nn.Linear)}
    blocks = {name for name in linear if re.match(r"(single_)?transformer_blocks\.", name)}
    assert {n for n in linear if re.fullmatch(arch.lora_targets, n)} == {n for n in blocks if ".norm" not in n}


def test_diffusers_reads_native_names_and_fused_layers_as_the_modules_they_came_from(folders):
    arch = architecture(T2V, folders[T2V.name])
    with init_empty_weights():  # of the published width: diffusers' reader splits at it
        sizes = {
            name: module.out_features
            for name, module in HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=2).named_modules()
            if isinstance(module, nn.Linear) and re.match(r"(single_)?transformer_blocks\.", name)
        }
    random = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    for name in sizes:
        (rule,) = [rule for rule in arch.native if re.fullmatch(rule.pattern, name)]
        match = re.fullmatch(rule.pattern, name)
        native, parts = match.expand(rule.name), [match.expand(part) for part in rule.parts] or [name]
        assert name in parts
        if f"{native}.lora_A.weight" in state:
            continue
        down = torch.randn(2, 4, generator=random)
        ups = [torch.randn(sizes[part], 2, generator=random) for part in parts]
        state |= {f"{native}.lora_A.weight": down, f"{native}.lora_B.weight": torch.cat(ups)}
        for part, up in zip(parts, ups, strict=True):
            expected |= {f"transformer.{part}.lora_A.weight": down, f"transformer.{part}.lora_B.weight": up}
    found = _convert_hunyuan_video_lora_to_diffusers({f"diffusion_model.{name}": t for name, t in state.items()})
    assert found.keys() == {f"transformer.{n}.lora_{x}.weight" for n in sizes for x in "AB"}  # each of its own
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("wanted", "given", "entry"),
    [
        (T2V, CONCAT, "in_channels=33, this model config needs 16"),
        (T2V, REPLACE, "image_condition_type=token_replace, this model config needs None"),
        (CONCAT, REPLACE, "in_channels=16, this model config needs 33"),
        (REPLACE, T2V, "image_condition_type=None, this model config needs token_replace"),
    ],
)
def test_another_variants_transformer_is_refused(folders, wanted, given, entry):
    with pytest.raises(ValueError, match=entry):
        architecture(wanted, folders[given.name]).check()


def test_guidance_must_fit_the_transformer(folders):
    with pytest.raises(ValueError, match="guidance_embeds=True, this model config needs False"):
        architecture(T2V, folders[T2V.name], "model.guidance=null").check()


def test_an_unknown_image_condition_is_refused():
    error = unchecked_error(architecture, T2V, "x", "model.image_condition=concat")
    assert "model.image_condition must be latent_concat, token_replace or null, got 'concat'" in error


def test_a_single_file_is_read_as_the_variant_that_the_config_says(tmp_path):
    file = tmp_path / "hunyuan.safetensors"
    for variant in VARIANTS:
        model, state = variant.single_file()
        save_file(state, file)
        read = architecture(variant, file).load_transformer().config
        assert {name: read[name] for name in model.config if not name.startswith("_")} == {
            name: value for name, value in model.config.items() if not name.startswith("_")
        }
    with pytest.raises(ValueError, match="image_condition_type=token_replace|in_channels"):
        save_file(CONCAT.single_file()[1], file)
        architecture(REPLACE, file).check()


def test_a_file_under_comfyuis_own_names_is_refused_by_name(tmp_path):
    _, state = T2V.single_file()
    names = {"_mod.linear": "_mod.lin", "_attn_qkv": "_attn.qkv", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    file = tmp_path / "comfy.safetensors"
    for theirs, comfy in names.items():
        state = {name.replace(theirs, comfy): tensor for name, tensor in state.items()}
    save_file(state, file)
    with pytest.raises(ValueError, match=r"is no HunyuanVideoTransformer3DModel: it has no double_blocks\.0\.img_mlp"):
        architecture(T2V, file).check()


def test_a_vae_of_another_shape_is_refused(folders):
    arch = architecture(T2V, folders[T2V.name], "model.latents.spatial_stride=16")
    with pytest.raises(ValueError, match="makes 16 channels at strides 8 and 4, the model needs 16 at 16 and 4"):
        arch.load_encoders("cpu").vae()


def test_families_keep_apart_what_caches_hold(folders):
    found = {v.name: architecture(v, folders[v.name]) for v in VARIANTS}
    assert len({arch.family for arch in found.values()}) == 3
    tokens = {
        name: arch.load_encoders("cpu").encode_text([Prompt(TEXT)])[0].text.shape[0] for name, arch in found.items()
    }
    assert tokens[CONCAT.name] - tokens[REPLACE.name] == 576 // 2 - 576 // 4
