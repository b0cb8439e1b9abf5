"""Samples by base and LoRA: from the same noise, as files, without disturbing the training."""

from contextlib import nullcontext
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mpp.sample
import mpp.train
import mpp.training.callbacks
from mpp.lora.adapters import Adapter, adapters_off, inject
from mpp.media.lettering import font_size, line_height
from mpp.memory.settings import Memory
from mpp.models.contract import Generation, Prompt
from mpp.models.families.wan import WanEncoders
from mpp.models.frame_axis import Layers, Moments
from mpp.sampling.generation import Pair, generate, save, strip
from mpp.sampling.prompts import Prompts, ReadyPrompt
from tests.helpers import config, logged, prepare, randomise_adapter, train, train_config

SAMPLING = [
    "sampling.prompts=[a red box,a cat]", "sampling.width=64", "sampling.height=48", "sampling.steps=2",
    "sampling.guidance_scale=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, pipeline):
    """A cache with embeddings of two prompts."""
    from tests.helpers import draw_photos

    root = tmp_path_factory.mktemp("sampled")
    draw_photos(root / "photos", root / "masks", count=4)
    prepare(pipeline, root, *SAMPLING)
    return root / "cache"


@pytest.fixture
def ready(architecture):
    encoders = architecture.load_encoders("cpu")
    record = architecture.collate(encoders.encode_text([Prompt("a cat")]))
    return encoders, ReadyPrompt("a cat", Generation(64, 48, 5, 2, 1.0, 3), record, None)


def test_base_is_the_pipeline_without_adapter_and_the_lora_starts_from_the_same_noise(architecture, ready):
    encoders, todo = ready
    transformer = architecture.load_transformer()
    plain = architecture.generate(transformer, encoders, todo.positive, None, todo.generation)
    alone = generate(architecture, transformer, encoders, todo, name="0_a", device="cpu")
    assert alone.lora is None
    assert torch.equal(alone.base, plain)
    inject(transformer, Adapter(rank=2), architecture.lora_targets, seed=0)
    fresh = generate(architecture, transformer, encoders, todo, name="0_a", device="cpu")
    assert torch.equal(fresh.lora, plain)  # an untrained adapter generates what the base generates
    randomise_adapter(transformer, 0.3)
    pair = generate(architecture, transformer, encoders, todo, name="0_a", device="cpu")
    assert torch.equal(pair.base, plain)
    assert not torch.equal(pair.lora, plain)


def test_generating_leaves_mode_and_random_state_alone_and_generates_the_base_once(architecture, ready, monkeypatch):
    encoders, todo = ready
    transformer = architecture.load_transformer().train()
    transformer.blocks[0].eval()
    inject(transformer, Adapter(rank=2), architecture.lora_targets, seed=0)
    modes, state = [m.training for m in transformer.modules()], torch.random.get_rng_state()
    calls = []
    original = type(architecture).generate
    monkeypatch.setattr(type(architecture), "generate", lambda *a: calls.append(torch.rand(1)) or original(*a))
    bases = {}
    generate(architecture, transformer, encoders, todo, name="0_a", device="cpu", bases=bases)
    generate(architecture, transformer, encoders, todo, name="0_a", device="cpu", bases=bases)
    assert len(calls) == 3  # base, LoRA; LoRA
    assert [m.training for m in transformer.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


LINE, GAP = 19, 6  # heights in images that are 64 pixels wide: of a line of text, and between images


def frames_of(file):
    """A video's frames as arrays."""
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def ramp(frames, channels=3, height=48, width=64, start=0.0):
    """Frames of one colour each, brighter from frame to frame."""
    values = start + torch.arange(frames) * 0.1
    return values.view(-1, 1, 1, 1).expand(frames, channels, height, width).contiguous()


def test_a_clip_becomes_an_mp4_of_base_beside_lora_and_a_strip(tmp_path):
    files = save(Pair("0_a", "a", ramp(5), ramp(5, start=0.5), Moments()), tmp_path)
    names = ["0_a.png", "0_a.mp4", "0_a_base.mp4", "0_a_lora.mp4", "0_a_base.png", "0_a_lora.png"]
    assert [file.name for file in files] == names
    frames, base, lora = (frames_of(file) for file in files[1:4])
    assert len(frames) == 5
    for number in range(5):
        assert base[number].shape == lora[number].shape == (48, 64, 3)
        assert base[number].mean() / 255 == pytest.approx(0.1 * number, abs=0.03)
        assert lora[number].mean() / 255 == pytest.approx(0.5 + 0.1 * number, abs=0.03)
    for file, value in zip(files[4:], (0.2, 0.7), strict=True):  # the middle frame
        assert np.unique(Image.open(file)).tolist() == [round(255 * value)]
    for number, frame in enumerate(frames):
        assert frame.shape == (48, 128, 3)
        assert frame[:, 8:56].mean() / 255 == pytest.approx(0.1 * number, abs=0.03)
        assert frame[:, 72:120].mean() / 255 == pytest.approx(0.5 + 0.1 * number, abs=0.03)
    sheet = np.asarray(Image.open(files[0]))
    assert sheet.shape == (LINE + 2 * (LINE + 48) + GAP, 5 * 64 + 4 * GAP, 3)
    first = sheet[2 * LINE + 10, [10 + n * (64 + GAP) for n in range(5)], 0]
    assert np.abs(first - 25.5 * np.arange(5)).max() <= 0.5


def test_an_image_is_side_by_side_and_layers_are_a_strip_over_a_checkerboard(tmp_path):
    file, base, lora = save(Pair("0_a", "a", ramp(1), ramp(1, start=1.0), Moments()), tmp_path)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (48 + 2 * LINE, 128 + GAP, 3)
    assert sheet[2 * LINE + 10, 10].tolist() == [0, 0, 0]
    assert sheet[2 * LINE + 10, 100].tolist() == [255, 255, 255]
    assert [np.unique(Image.open(path)).tolist() for path in (base, lora)] == [[0], [255]]
    assert [np.asarray(Image.open(path)).shape for path in (base, lora)] == [(48, 64, 3)] * 2
    layers = torch.cat([ramp(3, 3), torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 48, 64)], dim=1)
    file, whole = save(Pair("1_b", "b", layers, None, Layers()), tmp_path)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (48 + 2 * LINE, 3 * 64 + 2 * GAP, 3)
    assert set(np.unique(sheet[2 * LINE :, :64])) == {200, 255}  # transparent: nothing but the board
    assert set(np.unique(sheet[2 * LINE :, 64 + GAP : 128 + GAP])) == {26}
    np.testing.assert_array_equal(np.asarray(Image.open(whole)), sheet[2 * LINE :, :64])


def test_step_and_seed_are_written_above_and_in_the_file(tmp_path):
    pair = Pair("0_a", "a cat", ramp(1, width=600), ramp(1, width=600), Moments(), seed=7, step=500)
    assert pair.title == "step 500, seed 7: a cat"
    file, base, lora = save(pair, tmp_path)
    for path in (file, base, lora):
        with Image.open(path) as image:
            assert image.text == {"step": "500", "seed": "7"}
    sheet = np.asarray(Image.open(file))
    other = np.asarray(strip(replace(pair, step=501)))
    high = line_height(font_size(600))
    assert (sheet[:high] != other[:high]).any()
    np.testing.assert_array_equal(sheet[high:], other[high:])
    assert replace(pair, step=None).title == "seed 7: a cat"


def test_strips_of_long_clips_show_their_first_and_last_frame():
    sheet = np.asarray(strip(Pair("0", "a", ramp(9) / 2, None, Moments())))
    assert sheet.shape[1] == 6 * 64 + 5 * GAP
    assert sheet[2 * LINE + 10, 10, 0] == 0
    assert sheet[2 * LINE + 10, -10, 0] == round(0.4 * 255)


def test_samples_during_training_come_from_the_cache_and_change_no_number(pipeline, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(WanEncoders, "encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    plain, generating = tmp_path / "plain", tmp_path / "painting"
    train(pipeline, sampled, plain)
    train(pipeline, sampled, generating, *SAMPLING, "callbacks.samples.every_n_steps=3")
    folders = [f"step-{n:06d}" for n in (0, 3, 4)]
    assert sorted(p.name for p in (generating / "samples").glob("[!.]*")) == ["contact.png", *folders]
    names = sorted(p.name for p in (generating / "samples" / "step-000003").glob("[!.]*"))
    assert names == [f"{name}{part}.png" for name in ("0_a_red_box", "1_a_cat") for part in ("", "_base", "_lora")]
    with Image.open(generating / "samples" / "step-000003" / "1_a_cat_lora.png") as image:
        assert image.text == {"step": "3", "seed": "0"}
    without = [{k: v for k, v in row.items() if "perf" not in k} for row in logged(plain)]
    assert [{k: v for k, v in row.items() if "perf" not in k} for row in logged(generating)] == without
    ours, theirs = (load_file(out / "lora.safetensors") for out in (generating, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_samples_go_to_tensorboard(pipeline, sampled, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(pipeline, sampled, tmp_path / "out", *SAMPLING, "logger=tensorboard")
    (events,) = (tmp_path / "out").rglob("events.out*")
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    assert {"samples/0_a_red_box", "samples/1_a_cat"} <= set(found.Tags()["images"])
    assert [image.step for image in found.Images("samples/1_a_cat")] == [0, 4]


def test_prompts_that_were_not_prepared_are_refused_before_the_transformer_loads(
    pipeline, sampled, tmp_path, monkeypatch
):
    cfg = train_config(pipeline, sampled, tmp_path / "out", *SAMPLING, "sampling.prompts=[a dog]")
    from mpp.models.families.wan import Wan

    monkeypatch.setattr(Wan, "load_transformer", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="no embeddings of the prompt 'a dog' for samples"):
        mpp.train.run(cfg)


def sample_config(pipeline, out, *overrides):
    return config(
        "sample",
        ["model=tiny_wan", f"model.pretrained={pipeline}", f"output_dir={out}", "device=cpu", *SAMPLING, *overrides],
    )


def test_the_command_generates_base_and_lora_of_a_run(pipeline, sampled, tmp_path, architecture):
    train(pipeline, sampled, tmp_path / "run", "optimizer.lr=0.5")
    files = mpp.sample.run(sample_config(pipeline, tmp_path / "painted", f"lora_path={tmp_path / 'run'}"))
    names = [f"{name}{part}.png" for name in ("0_a_red_box", "1_a_cat") for part in ("", "_base", "_lora")]
    assert [file.name for file in files] == names
    sheet = np.asarray(Image.open(files[3]).convert("RGB")).astype(int)[2 * LINE :]
    assert sheet.shape == (48, 128 + GAP, 3)
    base, lora = sheet[:, :64], sheet[:, 64 + GAP :]
    for file, part in ((files[4], base), (files[5], lora)):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), part)
    assert np.abs(base - lora).max() > 2
    encoders = architecture.load_encoders("cpu")
    record = architecture.collate(encoders.encode_text([Prompt("a cat")]))
    transformer = architecture.load_transformer().eval()
    with torch.no_grad(), adapters_off(transformer):
        want = architecture.generate(transformer, encoders, record, None, Generation(64, 48, 1, 2, 1.0, 0))
    assert np.abs(base - (want[0].permute(1, 2, 0) * 255).round().numpy()).max() <= 1


def test_the_command_refuses_what_cannot_work(pipeline, tmp_path):
    with pytest.raises(ValueError, match="sampling.prompts is empty"):
        mpp.sample.run(sample_config(pipeline, tmp_path, "sampling.prompts=[]"))
    with pytest.raises(ValueError, match="lora=nowhere is not there"):
        mpp.sample.run(sample_config(pipeline, tmp_path, "lora_path=nowhere"))
    (tmp_path / "lora.safetensors").write_bytes(b"no LoRA")  # refused before anything is encoded or loaded
    with pytest.raises(ValueError, match="lora=.*lora.safetensors is not a complete"):
        mpp.sample.run(sample_config(pipeline, tmp_path, f"lora_path={tmp_path}"))


def test_a_sample_that_fails_is_said_and_loses_nothing(pipeline, sampled, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory for the decoder")

    monkeypatch.setattr("mpp.training.callbacks.generate", fail)
    caplog.set_level("WARNING", logger="mpp")
    train(pipeline, sampled, tmp_path / "out", *SAMPLING, "callbacks.samples.every_n_steps=4")
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").is_file()
    assert "the samples of step 4 failed, training goes on: no memory for the decoder" in caplog.text


@pytest.mark.slow
def test_a_step_is_saved_before_it_is_generated(pipeline, sampled, tmp_path, monkeypatch):
    there = []
    original = mpp.training.callbacks.generate
    monkeypatch.setattr(
        "mpp.training.callbacks.generate",
        lambda *a, **k: there.append((tmp_path / "out" / "lora.safetensors").is_file()) or original(*a, **k),
    )
    train(pipeline, sampled, tmp_path / "out", *SAMPLING, "callbacks.samples.every_n_steps=4")
    assert there == [False, False, True, True]  # two prompts at the start, two at the end


def test_processes_share_the_prompts(architecture, tmp_path):
    from types import SimpleNamespace

    names = []
    for rank in range(2):
        callback = mpp.training.callbacks.Generations(str(tmp_path), Prompts(), 1)
        callback._ready = [SimpleNamespace(prompt=p) for p in "abc"]
        trainer = SimpleNamespace(
            global_rank=rank,
            world_size=2,
            callbacks=[],
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )
        module = SimpleNamespace(
            architecture=architecture, transformer=None, device="cpu", evaluated_adapter=nullcontext, memory=Memory()
        )
        with pytest.MonkeyPatch.context() as patch:
            pair = Pair("", "", ramp(1), None, Moments())
            patch.setattr("mpp.training.callbacks.generate", lambda *_, name, **__: replace(pair, name=name))  # noqa: B023
            patch.setattr("mpp.training.callbacks.save", lambda one, folder, rank=rank: names.append((rank, one.name)))
            callback._generate_own(trainer, module, 3)
    assert names == [(0, "0_a"), (0, "2_c"), (1, "1_b")]


def test_the_vae_decodes_in_its_own_precision_under_autocast(architecture):
    vae = architecture.load_encoders("cpu").vae()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert vae.decode(torch.randn(1, 16, 1, 4, 4)).sample.dtype == torch.float32
