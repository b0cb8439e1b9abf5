"""Samples by base and LoRA: from the same noise, as files, without disturbing the training."""

from contextlib import nullcontext

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


def ramp(frames, channels=3, height=48, width=64, start=0.0):
    """Frames of one colour each, brighter from frame to frame."""
    values = start + torch.arange(frames) * 0.1
    return values.view(-1, 1, 1, 1).expand(frames, channels, height, width).contiguous()


def test_a_clip_becomes_an_mp4_of_base_beside_lora_and_a_strip(tmp_path):
    files = save(Pair("0_a", "a", ramp(5), ramp(5, start=0.5), Moments()), tmp_path)
    assert [file.suffix for file in files] == [".png", ".mp4"]
    with av.open(str(files[1])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    for number, frame in enumerate(frames):
        assert frame.shape == (48, 128, 3)
        assert frame[:, 8:56].mean() / 255 == pytest.approx(0.1 * number, abs=0.03)
        assert frame[:, 72:120].mean() / 255 == pytest.approx(0.5 + 0.1 * number, abs=0.03)
    assert np.asarray(Image.open(files[0])).shape == (2 * (48 + 16), 5 * 64, 3)


def test_an_image_is_side_by_side_and_layers_are_a_strip_over_a_checkerboard(tmp_path):
    (file,) = save(Pair("0_a", "a", ramp(1), ramp(1, start=1.0), Moments()), tmp_path)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (48 + 16, 128, 3)
    assert sheet[30, 10].tolist() == [0, 0, 0]
    assert sheet[30, 100].tolist() == [255, 255, 255]
    layers = torch.cat([ramp(3, 3), torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 48, 64)], dim=1)
    (file,) = save(Pair("1_b", "b", layers, None, Layers()), tmp_path)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (48 + 16, 3 * 64, 3)
    assert set(np.unique(sheet[17:, :64])) == {200, 255}  # transparent: nothing but the board
    assert set(np.unique(sheet[17:, 64:128])) == {26}


def test_strips_of_long_clips_show_their_first_and_last_frame():
    sheet = np.asarray(strip(Pair("0", "a", ramp(9) / 2, None, Moments())))
    assert sheet.shape[1] == 6 * 64
    assert sheet[30, 10, 0] == 0
    assert sheet[30, -10, 0] == round(0.4 * 255)


def test_samples_during_training_come_from_the_cache_and_change_no_number(pipeline, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(WanEncoders, "encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    plain, generating = tmp_path / "plain", tmp_path / "painting"
    train(pipeline, sampled, plain)
    train(pipeline, sampled, generating, *SAMPLING, "callbacks.samples.every_n_steps=3")
    assert sorted(p.name for p in (generating / "samples").iterdir()) == [f"step-{n:06d}" for n in (0, 3, 4)]
    names = sorted(p.name for p in (generating / "samples" / "step-000003").glob("[!.]*"))
    assert names == ["0_a_red_box.png", "1_a_cat.png"]
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
    assert [file.name for file in files] == ["0_a_red_box.png", "1_a_cat.png"]
    sheet = np.asarray(Image.open(files[1]).convert("RGB")).astype(int)[16:]
    assert sheet.shape == (48, 128, 3)
    base, lora = sheet[:, :64], sheet[:, 64:]
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
            architecture=architecture, transformer=None, device="cpu", evaluated_adapter=nullcontext
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mpp.training.callbacks.generate", lambda *_, name, **__: name)
            patch.setattr("mpp.training.callbacks.save", lambda name, folder, rank=rank: names.append((rank, name)))
            callback._generate_own(trainer, module, tmp_path)
    assert names == [(0, "0_a"), (0, "2_c"), (1, "1_b")]


def test_the_vae_decodes_in_its_own_precision_under_autocast(architecture):
    vae = architecture.load_encoders("cpu").vae()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert vae.decode(torch.randn(1, 16, 1, 4, 4)).sample.dtype == torch.float32
