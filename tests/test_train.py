"""Runs through the same code as `python -m mpp.train`."""

import itertools
import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mpp.train
from mpp.core import draws
from mpp.models.families.wan import WanConditioning
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import logged, train, train_config

TRAIN_NAMES = {
    "train/loss",
    "train/target_loss",
    "train/prior_loss",
    "train/drift",
    "train/mask_mean",
    "train/prior_mask_mean",
    "train/teacher_fraction",
    "perf/samples_per_second",
}


def trace(folder, name="train/loss"):
    return [row[name] for row in logged(folder) if name in row]


def test_a_run_leaves_lora_checkpoint_and_log(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "data.val_fraction=0.25", "trainer.val_check_interval=2")
    assert (tmp_path / "lora.safetensors").is_file()
    assert (tmp_path / "lora" / "step-000004.safetensors").is_file()
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    names = set().union(*(row.keys() for row in logged(tmp_path)))
    wanted = TRAIN_NAMES | {n.replace("train/", "val/") for n in TRAIN_NAMES if n.startswith("train/")}
    assert wanted <= names
    for row in logged(tmp_path):
        if "train/loss" in row:
            assert row["train/loss"] == pytest.approx(row["train/target_loss"] + row["train/prior_loss"], rel=1e-6)
    assert len(trace(tmp_path, "val/loss")) == 3  # before training, and at steps 2 and 4


def test_the_exported_lora_in_diffusers_gives_the_trained_students_output(pipeline, prepared, tmp_path):
    _, module = train(pipeline, prepared, tmp_path, "trainer.max_steps=10", "optimizer.lr=1e-2")
    fresh = WanTransformer3DModel.from_pretrained(f"{pipeline}/transformer")
    fresh.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer")
    noisy, sigma = torch.randn(2, 16, 1, 8, 8), torch.tensor([0.3, 0.8])
    text = WanConditioning(torch.randn(2, 64, 32))
    with torch.no_grad():
        ours = module.architecture.velocity(module.transformer, noisy, sigma, text)
        theirs = fresh(noisy, sigma * 1000, text.text, return_dict=False)[0]
        base = WanTransformer3DModel.from_pretrained(f"{pipeline}/transformer")(noisy, sigma * 1000, text.text)[0]
    torch.testing.assert_close(ours, theirs)
    assert (ours - base).abs().max() > 0.01


def test_lora_and_checkpoint_say_how_they_were_made_and_hold_no_base(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path)
    with safe_open(tmp_path / "lora.safetensors", "pt") as handle:
        record = json.loads(handle.metadata()["mpp"])
    assert record["samples_seen"] == 8
    assert record["steps"] == 4
    assert record["config"]["loss"]["prior_threshold"] == 0.1
    assert record["base"]
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["mpp"]["config"]["loss"]["prior_weight"] == 1.0
    assert all("lora_" in name for name in checkpoint["state_dict"])
    size = sum(t.numel() for t in load_file(tmp_path / "lora.safetensors").values())
    assert sum(t.numel() for t in checkpoint["state_dict"].values()) == size


@pytest.mark.parametrize(
    "preset", ["continuous", *(pytest.param(p, marks=pytest.mark.slow) for p in ("threshold", "binary", "plain"))]
)
def test_any_preset_without_prior_traces_like_masked_bit_for_bit(pipeline, prepared, tmp_path, preset, monkeypatch):
    monkeypatch.setattr("mpp.training.teacher.adapters_off", lambda transformer: pytest.fail("the teacher ran"))
    gamma = 0.7 if preset == "continuous" else 1.0
    same = [f"loss.mask_gamma={gamma}", "loss.mask_min_weight=0.02", "loss.normalization=per_sample"]
    train(pipeline, prepared, tmp_path / "a", f"loss={preset}", "loss.prior_weight=0", *same)
    train(pipeline, prepared, tmp_path / "b", "loss=masked", *same)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    a, b = (load_file(tmp_path / run / "lora.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert trace(tmp_path / "a", "train/teacher_fraction") == [0.0] * 4


@pytest.mark.slow
def test_the_prior_lowers_drift_and_the_target_is_learned(pipeline, prepared, tmp_path):
    settings = ["trainer.max_steps=60", "optimizer.lr=3e-3", "data.val_fraction=0.25", "data.batch_size=4"]
    settings += ["trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=30", "trainer.log_every_n_steps=20"]
    final = {}
    for preset in ("threshold", "masked"):
        train(pipeline, prepared, tmp_path / preset, f"loss={preset}", *settings)
        rows = [row for row in logged(tmp_path / preset) if "val/target_loss" in row]
        assert rows[-1]["val/target_loss"] < rows[0]["val/target_loss"]
        final[preset] = rows[-1]["val/drift"]
    assert final["threshold"] < final["masked"] / 2


# ---------------------------------------------------------------- resume


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs in the training code."""


def kill_after(monkeypatch, batches):
    from mpp.training.module import MaskedPriorModule

    good, calls = MaskedPriorModule.training_step, []

    def step(self, batch, batch_idx):
        calls.append(1)
        if len(calls) > batches:
            raise Killed
        return good(self, batch, batch_idx)

    monkeypatch.setattr(MaskedPriorModule, "training_step", step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_after", "accumulate", "batch_size", "workers"),
    [
        (6, 2, 1, 0),
        (3, 1, 2, 0),
        (9, 2, 1, 0),
        (4, 1, 2, 0),
        (6, 1, 2, 2),
        (12, 3, 1, 0),
        (8, 1, 2, 0),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    pipeline, prepared, tmp_path, monkeypatch, killed_after, accumulate, batch_size, workers
):
    # Eight samples in two shapes: an epoch is 4 batches of two or 8 of one, so some of these stop at an epoch's end.
    settings = [
        "trainer.max_steps=10",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"data.batch_size={batch_size}",
        f"data.num_workers={workers}",
        "callbacks.checkpoints.every_n_steps=2",
        "schedule=cosine",
        "schedule.num_warmup_steps=3",
        "loss=continuous",
    ]
    train(pipeline, prepared, tmp_path / "straight", *settings)
    with monkeypatch.context() as patch:
        kill_after(patch, killed_after)
        with pytest.raises(Killed):
            train(pipeline, prepared, tmp_path / "killed", *settings)
    train(pipeline, prepared, tmp_path / "killed", *settings, "logger=tensorboard", "ckpt_path=last")
    straight, resumed = (load_file(tmp_path / run / "lora.safetensors") for run in ("straight", "killed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    ends = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("straight", "killed")]
    assert ends[0]["mpp"]["samples_seen"] == ends[1]["mpp"]["samples_seen"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 4, 5])
def test_a_finished_run_can_be_lengthened_bit_for_bit(pipeline, prepared, tmp_path, steps):
    train(pipeline, prepared, tmp_path / "straight", "trainer.max_steps=9")
    train(pipeline, prepared, tmp_path / "longer", f"trainer.max_steps={steps}")
    train(pipeline, prepared, tmp_path / "longer", "trainer.max_steps=9", "logger=tensorboard", "ckpt_path=last")
    straight, longer = (load_file(tmp_path / run / "lora.safetensors") for run in ("straight", "longer"))
    assert all(torch.equal(straight[name], longer[name]) for name in straight)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["prodigy", "schedulefree"])
def test_other_optimizers_train_and_resume(pipeline, prepared, tmp_path, optimizer):
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}[optimizer])
    lr = [f"optimizer={optimizer}", "optimizer.lr=1.0" if optimizer == "prodigy" else "optimizer.lr=1e-3"]
    val = ["data.val_fraction=0.25", "trainer.val_check_interval=2", "callbacks.checkpoints.every_n_steps=2"]
    train(pipeline, prepared, tmp_path / "straight", *lr, *val, "trainer.max_steps=6")
    train(pipeline, prepared, tmp_path / "parts", *lr, *val, "trainer.max_steps=4")
    train(
        pipeline, prepared, tmp_path / "parts", *lr, *val, "trainer.max_steps=6", "logger=tensorboard", "ckpt_path=last"
    )
    straight, parts = (load_file(tmp_path / run / "lora.safetensors") for run in ("straight", "parts"))
    for name in straight:
        torch.testing.assert_close(straight[name], parts[name], rtol=1e-5, atol=1e-7)


def test_what_was_resumed_from_is_not_saved_again_in_the_middle_of_a_step(pipeline, prepared, tmp_path):
    settings = ["trainer.accumulate_grad_batches=2", "callbacks.checkpoints.every_n_steps=2", "data.batch_size=1"]
    train(pipeline, prepared, tmp_path, *settings, "trainer.max_steps=2")
    file = tmp_path / "lora" / "step-000002.safetensors"
    before = file.stat().st_mtime_ns
    train(pipeline, prepared, tmp_path, *settings, "logger=tensorboard", "ckpt_path=last")
    assert file.stat().st_mtime_ns == before
    steps = (file, file.with_stem("step-000004"))
    assert {*file.parent.iterdir()} == {
        path for step in steps for path in (step, step.with_stem(f"{step.stem}_comfyui"))
    }


def test_the_lora_holds_the_weights_that_a_schedule_free_optimizer_evaluates(pipeline, prepared, tmp_path):
    words = ("optimizer=schedulefree", "optimizer.lr=1e-2", "lora.alpha=4")  # the scale 1: the adapter as it is
    trainer, module = train(pipeline, prepared, tmp_path, *words)
    trained = {f"transformer.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    trainer.optimizers[0].eval()
    for path in (tmp_path / "lora.safetensors", tmp_path / "lora" / "step-000004.safetensors"):
        saved = load_file(path)
        assert any((saved[name] - tensor).abs().max() > 1e-3 for name, tensor in trained.items())
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(saved[f"transformer.{name}"], tensor, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize(("accumulate", "once_more"), [(1, 0), (2, 4)])
def test_the_weights_of_a_batch_are_computed_once_a_step(
    pipeline, prepared, tmp_path, monkeypatch, accumulate, once_more
):
    """Again only for what all batches of an accumulation window are divided by: once for each of them."""
    from mpp.core import loss

    calls, original = [], loss.process_mask
    monkeypatch.setattr(loss, "process_mask", lambda *a, **k: calls.append(1) or original(*a, **k))
    settings = [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.max_steps={4 // accumulate}"]
    train(pipeline, prepared, tmp_path, "callbacks.report=null", *settings)
    assert len(calls) == 4 + once_more


@pytest.mark.parametrize(
    ("preset", "normalization", "sizes"),
    [
        ("threshold", "per_sample", (2, 2)),
        ("continuous", "global", (1, 3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(["threshold", "continuous"], ["global", "per_sample"], [(1, 4), (2, 2)])
            if case != ("threshold", "per_sample", (2, 2))
        ),
    ],
)
def test_accumulated_batches_have_the_gradient_of_one_big_batch(
    pipeline, prepared, tmp_path, preset, normalization, sizes, monkeypatch
):
    """One optimizer step of plain SGD moves the weights by the gradient; the masks' areas differ between samples.

    An epoch has four samples: after a window of three batches the next one holds a single batch.
    """
    # One bucket only, so that a big batch holds the same samples as the window.
    cache = tmp_path / "cache"
    shutil.copytree(prepared, cache)
    lines = (cache / "index.jsonl").read_text().splitlines()
    (cache / "index.jsonl").write_text("".join(line + "\n" for line in lines if "[16, 1, 8, 8]" in line))
    monkeypatch.setattr(draws, "order", lambda count, *_: list(range(count)))
    size, accumulate = sizes
    base = [
        f"loss={preset}",
        f"loss.normalization={normalization}",
        "trainer.max_steps=2",
        "trainer.gradient_clip_val=null",
        "optimizer._target_=torch.optim.SGD",
        "optimizer.lr=0.1",
    ]
    train(pipeline, cache, tmp_path / "big", *base, f"data.batch_size={size * accumulate}")
    train(
        pipeline,
        cache,
        tmp_path / "parts",
        *base,
        f"data.batch_size={size}",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    big, parts = (load_file(tmp_path / run / "lora.safetensors") for run in ("big", "parts"))
    for name in big:
        torch.testing.assert_close(big[name], parts[name], rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- logging


def test_tensorboard_holds_scalars_and_the_regions_as_images(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "logger=tensorboard", "callbacks.report.pictures=4")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= TRAIN_NAMES
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("regions/")]) == 4
    assert (tmp_path / "regions.png").is_file()


def test_banner_and_warnings_say_what_is_on(pipeline, prepared, tmp_path, caplog):
    caplog.set_level("INFO", logger="mpp")
    train(pipeline, prepared, tmp_path, "loss.mask_min_weight=0.1", "loss.normalization=global")
    text = caplog.text
    assert "masked prior preservation, threshold mode: prior_weight=1.0, prior_threshold=0.1" in text
    assert "8 for training (6 with masks)" in text
    assert "teacher: runs for 75% of the samples" in text
    assert text.count("weakens the prior") == 1
    assert text.count("make prior_weight uneven") == 1


def test_a_prior_that_never_applies_is_warned_of(pipeline, prepared, tmp_path, caplog):
    cache = tmp_path / "cache"
    shutil.copytree(prepared, cache)
    rows = [json.loads(line) for line in (cache / "index.jsonl").read_text().splitlines()]
    (cache / "index.jsonl").write_text("".join(json.dumps({**row, "mask": None}) + "\n" for row in rows))
    train(pipeline, cache, tmp_path / "out")
    assert "no sample has a mask: the prior never applies" in caplog.text


def test_a_floor_baked_into_the_masks_is_warned_of(pipeline, prepared, tmp_path, caplog):
    from mpp.cache.format import Cache, write_tensors

    cache = Cache(tmp_path / "cache")
    shutil.copytree(prepared, cache.folder)
    for entry in cache.entries():
        if entry.mask is not None:
            write_tensors(cache.mask_path(entry.key), {"mask": cache.mask(entry) * 0.8 + 0.2}, {})
    train(pipeline, cache.folder, tmp_path / "out")
    assert "no mask goes below loss.prior_threshold=0.1 (lowest value 0.200)" in caplog.text


# ---------------------------------------------------------------- bad input


def test_a_run_is_not_overwritten(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path)
    before = (tmp_path / "lora.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; go on with resume="):
        train(pipeline, prepared, tmp_path, "seed=3")
    assert (tmp_path / "lora.safetensors").read_bytes() == before


def test_nothing_to_resume_is_said(pipeline, prepared, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        train(pipeline, prepared, tmp_path, "logger=tensorboard", "ckpt_path=last")
    with pytest.raises(ValueError, match=r"there is no checkpoint at .*none\.ckpt"):
        train(pipeline, prepared, tmp_path, f"resume={tmp_path / 'none.ckpt'}")


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused(pipeline, prepared, tmp_path, tmp_path_factory):
    from mpp.models.tiny import tiny_wan

    train(pipeline, prepared, tmp_path / "a")
    good = tmp_path / "a" / "checkpoints" / "last.ckpt"
    content = read_checkpoint(good)

    def refused(change, message, *overrides, source=pipeline):
        torch.save({**content, **change}, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=message):
            train(source, prepared, tmp_path / "b", f"ckpt_path={tmp_path / 'bad.ckpt'}", *overrides)

    refused({"state_dict": {}}, "holds no adapter tensors")
    refused({"mpp": None}, "not a checkpoint of mpp")
    refused({"mpp": {**content["mpp"], "base": "0123"}}, "trained on another base model")
    refused({"mpp": {**content["mpp"], "format": 9}}, "format version 9")
    refused({}, "\n  seed: 0 -> 1", "seed=1")
    refused({}, "\n  lora.rank: 4 -> 8", "lora.rank=8")
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no checkpoint, or damaged"):
        train(pipeline, prepared, tmp_path / "b", f"ckpt_path={tmp_path / 'cut.ckpt'}")
    # another base with the same encoders
    other = tmp_path_factory.mktemp("other") / "wan"
    shutil.copytree(pipeline, other)
    shutil.rmtree(other / "transformer")
    shutil.copytree(f"{tiny_wan(str(tmp_path / 'seed1'), seed=1)}/transformer", other / "transformer")
    refused({}, "trained on another base model", source=other)


def test_everything_is_checked_before_the_transformer_is_loaded(pipeline, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    for overrides, message in [
        (["loss.prior_weight=-1"], "loss.prior_weight must be at least 0, got -1"),
        (["data.batch_size=100"], "larger than the training set"),
        (["model.pretrained=/nowhere"], "model.pretrained=/nowhere is not there"),
        ([f"data.cache_dir={tmp_path / 'none'}"], "no cache at"),
        (["lora.rank=eight"], "lora.rank should be a valid integer"),
        (["trainer.precision=bf16-true"], "would round the float32 adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(pipeline, prepared, tmp_path / "out", *overrides)
    cfg = train_config(pipeline, prepared, tmp_path / "out")
    cfg.lora = None  # what lora=none gives
    with pytest.raises(ValueError, match="needs an adapter"):
        mpp.train.run(cfg)


def test_a_checkpoint_of_another_base_is_refused_before_the_transformer_is_loaded(
    pipeline, prepared, tmp_path, monkeypatch
):
    train(pipeline, prepared, tmp_path / "a", "trainer.max_steps=1")
    content = read_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")
    torch.save({**content, "mpp": {**content["mpp"], "base": "0123"}}, tmp_path / "other.ckpt")
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="trained on another base model"):
        train(pipeline, prepared, tmp_path / "b", f"ckpt_path={tmp_path / 'other.ckpt'}")


def test_targets_that_match_nothing_are_refused(pipeline, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"lora.targets=.*nothing.* fit no trainable module"):
        train(pipeline, prepared, tmp_path, "lora.targets=[nothing]")


@pytest.mark.slow
def test_a_base_in_float16_under_bfloat16_is_refused_before_it_is_used(pipeline, prepared, tmp_path):
    half = ["model.dtype=float16", "trainer.precision=bf16-mixed", "data.val_fraction=0.25"]
    for first in ("true", "false"):
        with pytest.raises(ValueError, match=r"bf16-mixed does not go with model.dtype=float16"):
            train(pipeline, prepared, tmp_path / first, *half, f"validate_first={first}")


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(pipeline, prepared, tmp_path, monkeypatch):
    train(pipeline, prepared, tmp_path, "trainer.max_steps=2")
    last = tmp_path / "checkpoints" / "last.ckpt"
    before, lora = last.read_bytes(), (tmp_path / "lora.safetensors").read_bytes()

    def full(checkpoint, handle):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpp.training.checkpoint.torch.save", full)
    with pytest.raises(OSError, match=r"no space left to write .*last\.ckpt; what was there before is untouched"):
        train(pipeline, prepared, tmp_path, "logger=tensorboard", "ckpt_path=last", "trainer.max_steps=4")
    assert last.read_bytes() == before
    assert (tmp_path / "lora.safetensors").read_bytes() == lora
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "kind", ["dora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("rslora", "lokr", "loha"))]
)
def test_other_adapters_train(pipeline, prepared, tmp_path, kind):
    train(pipeline, prepared, tmp_path, f"lora={kind}")
    assert load_file(tmp_path / "lora.safetensors")


@pytest.mark.slow
def test_bf16_mixed_over_a_bf16_base_trains_float32_adapters(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "model.dtype=bfloat16", "trainer.precision=bf16-mixed", "logger=csv")
    assert {t.dtype for t in load_file(tmp_path / "lora.safetensors").values()} == {torch.float32}
    assert trace(tmp_path, "train/prior_loss")[0] == 0


def test_run_returns_what_scripts_need(pipeline, prepared, tmp_path):
    trainer, module = mpp.train.run(train_config(pipeline, prepared, tmp_path))
    assert trainer.global_step == 4
    assert module.samples_seen == 8
