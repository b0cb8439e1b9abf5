"""Every family and variant keeps the contract of `models/contract.py`; the witness is diffusers' own pipeline."""

import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpp.prepare
import mpp.train
from mpp.batching.batch import Collate
from mpp.cache.format import Cache
from mpp.core.flow import Noisy, interpolate
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter, adapter_state, adapters_off, inject
from mpp.media.geometry import image_tensor
from mpp.memory.bases import quantise, restore
from mpp.models.contract import Generation, Prompt
from mpp.training.teacher import Teacher
from tests.batching.test_loader import pickled
from tests.families import parameters, wan_first
from tests.families.base import architecture, batch, conditioning, controls, draw_set, pixels
from tests.helpers import QUIET, config, corrupted, logged, loss_of, randomise_adapter, student_of, teacher_of
from tests.helpers import module as make_module

TEXTS = ("a red box", "a cat on a blue chair by the sea")


@pytest.fixture(scope="module", params=parameters())
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def folder(variant, built):
    """A tiny random pipeline of the variant."""
    return built(variant)


@pytest.fixture(scope="module")
def arch(variant, folder):
    return architecture(variant, folder)


@pytest.fixture(scope="module")
def encoders(arch):
    return arch.load_encoders("cpu")


@pytest.fixture(scope="module")
def two(arch, variant, encoders):
    """A batch of two with texts of different length."""
    return batch(arch, variant, encoders, TEXTS)


def noisy_of(data, sigmas=(0.3, 0.95), seed=0):  # on both sides of where experts change
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(seed))
    sigma = torch.tensor(sigmas[: len(data)])
    return Noisy(interpolate(data.latents, noise, sigma), sigma, noise - data.latents)


def generation_of(arch, variant, cells=(2, 3), **settings):
    step = arch.latents.pixel_step
    frames = variant.frames - 1 if arch.latents.layered else variant.frames
    images = controls(variant, 0)
    if arch.images.first_frame:
        from tests.families.base import image

        images = (image(cells[1] * step, cells[0] * step, 0),)
    defaults = {"width": cells[1] * step, "height": cells[0] * step, "frames": frames, "steps": 3}
    return Generation(**{**defaults, "guidance_scale": 1.0, "seed": 0, "controls": images, **settings})


def test_check_accepts_the_pipeline_and_constructing_loads_nothing(arch, variant, tmp_path):
    arch.check()
    architecture(variant, tmp_path / "not there yet")


def test_latents_have_the_shape_the_spec_says(arch, variant, encoders):
    clip = pixels(arch, variant, (2, 3), 0)
    latents = encoders.encode_pixels(clip)
    assert tuple(latents.shape[1:]) == arch.latents.shape(*clip.shape[2:])
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()


def test_workers_collate_as_the_main_process_does(arch, variant, encoders):
    records = [conditioning(arch, variant, encoders, text) for text in TEXTS]
    own, told = arch.collate(records), pickle.loads(pickled(Collate(arch))).architecture.collate(records)
    assert own.tensors().keys() == told.tensors().keys()
    assert all(torch.equal(tensor, told.tensors()[name]) for name, tensor in own.tensors().items())


def test_velocity_is_what_diffusers_pipeline_feeds_its_scheduler(arch, variant, encoders, monkeypatch):
    transformer = arch.load_transformer().eval()
    generation = generation_of(arch, variant)
    record = arch.collate([conditioning_for(arch, variant, encoders, TEXTS[1], generation)])
    steps = []
    pipe = arch.pipeline(transformer, encoders)
    kind = type(pipe.scheduler)
    original = kind.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        index = self.step_index if self.step_index is not None else self.index_for_timestep(timestep)
        steps.append((float(self.sigmas[index]), sample.clone(), model_output.clone()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(kind, "step", spy)
    arch.generate(transformer, encoders, record, None, generation)
    assert len(steps) == generation.steps
    frames = generation.frames + 1 if arch.latents.layered else generation.frames
    c, f, h, w = arch.latents.shape(frames, generation.height, generation.width)
    shape = (c, f - arch.given_frames, h, w)
    for sigma, sample, output in steps:
        noisy, theirs = variant.unpack(sample, shape), variant.unpack(output, shape)
        assert noisy.shape == (1, *shape)
        with torch.no_grad():
            ours = arch.velocity(transformer, noisy.float(), torch.tensor([sigma]), record)
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
        assert float(ours.std()) > 1e-3  # a model that answers 0 would agree with anything


def conditioning_for(arch, variant, encoders, text, generation):
    """The record that belongs to a generation: image to video sees the generation's image as its clip's first frame."""
    from mpp.models.conditioning import flat_tensors

    clip = pixels(arch, variant, (2, 3), 0)
    if arch.images.first_frame:
        clip[0, :3, :1] = image_tensor(generation.controls[0])
        clip[:, 3:, 0] = 1  # a generation's image is RGB: opaque
    images = generation.controls if arch.images.first_frame else controls(variant, 0)
    (record,) = encoders.encode_text([Prompt(text, images if arch.images.in_text else ())])
    fields = encoders.encode_images(clip, () if arch.images.first_frame else images)
    return type(record).from_tensors({**record.tensors(), **flat_tensors(fields)})


def test_one_step_of_the_familys_scheduler_with_the_true_velocity_lands_on_the_latents(arch, encoders, two):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = arch.pipeline(arch.load_transformer(), encoders).scheduler
    noise = torch.randn(two.latents.shape, generator=torch.Generator().manual_seed(1))
    euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=1.0)
    euler.set_timesteps(sigmas=[0.7])
    sigma = euler.sigmas[0]
    noisy = interpolate(two.latents, noise, sigma.expand(2))
    (landed,) = euler.step(noise - two.latents, euler.timesteps[0], noisy, return_dict=False)
    torch.testing.assert_close(landed, two.latents, rtol=1e-4, atol=1e-5)


def test_teacher_is_the_base_bit_for_bit_whatever_was_trained(arch, two):
    transformer = arch.load_transformer()
    noisy = noisy_of(two)
    with torch.no_grad():
        base = arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning)
    inject(transformer, Adapter(rank=4), arch.lora_targets, seed=0)
    randomise_adapter(transformer, 0.3)
    assert torch.equal(Teacher().predict(arch, transformer, noisy, two.conditioning, (0, 1)), base)
    student = arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning)
    assert (student - base).abs().max() > 1e-4


def test_teacher_of_a_part_of_the_batch_is_that_of_the_whole(arch, variant, encoders):
    three = batch(arch, variant, encoders, (*TEXTS, "x"))
    transformer = arch.load_transformer()
    inject(transformer, Adapter(rank=4), arch.lora_targets, seed=0)
    noisy = noisy_of(three, (0.2, 0.5, 0.9))
    whole = Teacher().predict(arch, transformer, noisy, three.conditioning, (0, 1, 2))
    part = Teacher().predict(arch, transformer, noisy, three.conditioning, (0, 2))
    torch.testing.assert_close(part[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)
    assert part[1].abs().sum() == 0


def test_gradients_reach_every_adapter_also_with_checkpointing(arch, two):
    gradients = train_once(arch, two, checkpointing=False)
    assert gradients
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]
    assert dead == []
    recomputed = train_once(arch, two, checkpointing=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def train_once(arch, data, *, checkpointing):
    transformer = arch.load_transformer().train()
    inject(transformer, Adapter(rank=4), arch.lora_targets, seed=0)
    randomise_adapter(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    noisy = noisy_of(data)
    pred = arch.velocity(transformer, noisy.latents, noisy.sigma, data.conditioning)
    prior = Teacher().predict(arch, transformer, noisy, data.conditioning, (0, 1))
    loss = MaskedPriorLoss(prior_weight=1.0, normalization="per_sample")
    loss(pred, noisy.target, data.mask, prior).total.backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}


def test_base_weights_never_change_and_the_adapter_does(arch, two):
    built = make_module(arch)
    before = {n: p.detach().clone() for n, p in built.transformer.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(built, two).backward()
        optimizer.step()
    changed = {n for n, p in built.transformer.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name for name in changed)


def test_fresh_student_has_no_prior_loss(arch, two):
    built = make_module(arch)
    noisy = corrupted(built, two)
    terms = built.loss(student_of(built, noisy, two), noisy.target, two.mask, teacher_of(built, noisy, two))
    assert float(terms.prior.detach()) == 0
    assert float(terms.target.detach()) > 0


def test_text_padding_is_neutral_or_the_length_is_fixed(arch, variant, encoders, two):
    transformer = arch.load_transformer()
    noisy = noisy_of(two)
    alone = arch.collate([conditioning(arch, variant, encoders, TEXTS[0])])
    if variant.fixed_text:
        shapes = {name: t.shape[1:] for name, t in two.conditioning.tensors().items()}
        assert {name: t.shape[1:] for name, t in alone.tensors().items()} == shapes
        (record,) = encoders.encode_text([Prompt(TEXTS[0])])
        longer = type(record).from_tensors(
            {**record.tensors(), "text": record.text.new_zeros(4000, record.text.shape[1])}
        )
        with pytest.raises(ValueError, match="4000 tokens"):
            arch.collate([longer])
    with torch.no_grad():
        together = arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning)[:1]
        by_itself = arch.velocity(transformer, noisy.latents[:1], noisy.sigma[:1], alone)
    torch.testing.assert_close(together, by_itself, rtol=1e-4, atol=1e-5)


def test_text_matters(arch, variant, encoders, two):
    transformer = arch.load_transformer()
    noisy = noisy_of(two)
    with torch.no_grad():
        one = arch.velocity(transformer, noisy.latents[:1], noisy.sigma[:1], two.conditioning.select([0]))
        other = arch.collate([conditioning(arch, variant, encoders, TEXTS[1])])
        two_ = arch.velocity(transformer, noisy.latents[:1], noisy.sigma[:1], other)
    assert (one - two_).abs().max() > 1e-5


def test_two_resolutions_and_two_text_lengths_in_one_run(arch, variant, encoders):
    built = make_module(arch)
    for number, (cells, text) in enumerate([((2, 3), TEXTS[0]), ((3, 2), TEXTS[1]), ((4, 2), TEXTS[0])]):
        data = batch(arch, variant, encoders, (text,), cells=cells, seed=number)
        loss = loss_of(built, data)
        assert torch.isfinite(loss)
        assert float(loss.detach()) > 0


def test_a_record_survives_the_cache(arch, variant, encoders):
    record = conditioning(arch, variant, encoders, TEXTS[0])
    again = type(record).from_tensors(record.tensors())
    assert again.tensors().keys() == record.tensors().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), record.tensors().values(), strict=True))
    assert type(record) is arch.conditioning


def test_samples_of_base_and_adapter_start_from_the_same_noise(arch, variant, encoders):
    transformer = arch.load_transformer().eval()
    generation = generation_of(arch, variant)
    record = arch.collate([conditioning_for(arch, variant, encoders, TEXTS[0], generation)])
    plain = arch.generate(transformer, encoders, record, None, generation)
    inject(transformer, Adapter(rank=4), arch.lora_targets, seed=0)
    assert torch.equal(arch.generate(transformer, encoders, record, None, generation), plain)
    randomise_adapter(transformer, 0.3)
    changed = arch.generate(transformer, encoders, record, None, generation)
    with adapters_off(transformer):
        assert torch.equal(arch.generate(transformer, encoders, record, None, generation), plain)
    assert not torch.equal(changed, plain)
    assert plain.shape[-2:] == (generation.height, generation.width)
    assert plain.shape[0] == generation.frames
    assert 0 <= float(plain.min()) <= float(plain.max()) <= 1


def test_default_targets_cover_attention_and_nothing_but_blocks(arch):
    transformer = arch.load_transformer()
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    names = {name.split(".lora_")[0] for name in adapter_state(transformer)}
    assert names
    assert all("block" in name or "layers." in name for name in names)
    assert not any("refiner" in name or "norm" in name or "mod" in name.split(".")[-1] for name in names)


def test_blocks_hold_all_attention_and_run_in_their_order(arch, two):
    transformer = arch.load_transformer()
    blocks, modules = dict(arch.blocks(transformer)), dict(transformer.named_modules())
    assert blocks
    assert all(modules[name] is block for name, block in blocks.items())
    owners = {name: [b for b in blocks if name.startswith(f"{b}.")] for name in modules}
    assert [name for name in blocks if owners[name]] == []  # none lies in another
    attention = [name for name, module in modules.items() if re.search("Attention|Attn", type(module).__name__)]
    assert [name for name in attention if len(owners[name]) != 1] == []
    assert {owner for name in attention for owner in owners[name]} == set(blocks)
    inject(transformer, Adapter(rank=2), arch.lora_targets, seed=0)
    assert [name for name in adapter_state(transformer) if not any(name.startswith(f"{b}.") for b in blocks)] == []
    assert dict(arch.blocks(transformer)) == blocks  # adapters are no blocks
    ran = []
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    noisy = noisy_of(two)
    with torch.no_grad():
        arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning)
    assert list(dict.fromkeys(ran)) == list(blocks)


@pytest.mark.parametrize("variant", wan_first(), indirect=True)
def test_one_training_step_by_the_command_line_on_a_prepared_cache(variant, arch, folder, tmp_path):
    model = [*variant.overrides, f"model.pretrained={folder}", "model.dtype=float32", "model.text_dtype=float32"]
    files = draw_set(variant, arch, tmp_path)
    cache = tmp_path / "cache"
    mpp.prepare.run(config("prepare", [*model, *files, "data.clips.fps=24", f"data.cache_dir={cache}", "device=cpu"]))
    frames = {entry.shape[1] for entry in Cache(cache).entries()}
    assert max(frames) > 1 or not (arch.fps or arch.latents.layered)
    assert min(frames) >= arch.least_frames
    train = [
        *model, f"data.cache_dir={cache}", f"output_dir={tmp_path / 'out'}", "data.batch_size=2",
        "data.num_workers=0", "trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.precision=32-true",
        "trainer.accelerator=cpu", "lora.rank=2", "logger=csv",
        "trainer.log_every_n_steps=1", *QUIET,
    ]  # fmt: skip
    _, module = mpp.train.run(config("train", train))
    assert module.samples_seen == 2
    row = logged(tmp_path / "out")[0]
    assert row["train/target_loss"] > 0
    assert row["train/teacher_fraction"] == 1
    loras = [file for file in (tmp_path / "out").glob("lora*.safetensors") if not file.stem.endswith("_comfyui")]
    assert loras
    for file in loras:
        assert all(name.startswith("transformer.") for name in load_file(file))
        assert file.with_stem(f"{file.stem}_comfyui").exists()


@pytest.mark.parametrize("variant", wan_first(), indirect=True)
def test_whatever_of_the_blocks_a_file_has_in_fp8_they_predict_as_dequantised(arch, two):
    transformer = arch.load_transformer()
    inside = [name for _, block in arch.blocks(transformer) for name in linears_of(transformer, block)]
    quantise(transformer, inside, "fp8")
    noisy = noisy_of(two)
    with torch.no_grad():
        packed = arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning)
        assert restore(transformer, inside) == inside
        assert torch.equal(packed, arch.velocity(transformer, noisy.latents, noisy.sigma, two.conditioning))


def linears_of(transformer, block):
    """Names in the transformer of all linear layers of a block, modulation too."""
    own = {id(module) for module in block.modules() if isinstance(module, torch.nn.Linear)}
    return [name for name, module in transformer.named_modules() if id(module) in own]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_original_single_file_loads_exactly_or_the_family_says_it_cannot(variant, tmp_path, prefix):
    file = tmp_path / "model.safetensors"
    if variant.single_file is None:
        save_file({"x": torch.ones(1)}, file)
        with pytest.raises(ValueError, match="diffusers cannot load a .* from a single file; give a diffusers folder"):
            architecture(variant, file).check()
        return
    model, state = variant.single_file()
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, file)
    single = architecture(variant, file)
    single.check()
    ours, theirs = single.load_transformer().state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_file({prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    assert all(torch.equal(t, theirs[name]) for name, t in single.load_transformer().state_dict().items())
