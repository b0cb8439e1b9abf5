"""When a run saves, what it keeps, and which step it calls the best."""

import random
import re
import shutil

import pytest
from safetensors.torch import load_file

from mpp.lora.writing import step_of_lora
from tests.helpers import logged, train, train_config

ALPHA = "lora.alpha=4"  # no scale is folded into the files


def kept(out):
    return sorted({int(re.match(r"step-(\d+)", file.name)[1]) for file in (out / "lora").glob("step-*.safetensors")})


@pytest.mark.slow
def test_saves_come_after_epochs_as_well(pipeline, prepared, tmp_path):
    settings = ["callbacks.checkpoints.every_n_steps=null", "callbacks.checkpoints.every_n_epochs=2"]
    trainer, _ = train(pipeline, prepared, tmp_path, *settings, "trainer.max_steps=19", "validate_first=false")
    epoch = trainer.num_training_batches
    assert kept(tmp_path) == sorted({*range(2 * epoch, 20, 2 * epoch), 19})


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_steps_are_kept_across_a_resume_and_a_move(pipeline, prepared, tmp_path, seed):
    draw = random.Random(seed)
    every, most, steps, stop = draw.randint(1, 2), draw.randint(1, 3), draw.randint(6, 9), draw.randint(2, 5)
    settings = [
        f"callbacks.checkpoints.every_n_steps={every}", f"callbacks.checkpoints.keep_last={most}",
        "callbacks.checkpoints.keep_all=true", ALPHA, "validate_first=false",
    ]  # fmt: skip
    was, now = tmp_path / "was", tmp_path / "now"
    train(pipeline, prepared, was, *settings, f"trainer.max_steps={stop}")
    shutil.move(was, now)
    train(pipeline, prepared, now, *settings, f"trainer.max_steps={steps}", f"resume={now}", "logger.csv.version=two")
    saved = sorted({*range(every, steps + 1, every), stop, steps})
    assert kept(now) == saved[-most:]
    checkpoints = sorted(int(file.stem[5:]) for file in (now / "checkpoints").glob("step-*.ckpt"))
    assert checkpoints == saved[-most:]
    assert step_of_lora(now / "lora.safetensors") == steps
    whole = tmp_path / "whole"
    train(pipeline, prepared, whole, ALPHA, "validate_first=false", f"trainer.max_steps={steps}")
    same, other = load_file(now / "lora.safetensors"), load_file(whole / "lora.safetensors")
    assert all(tensor.equal(other[name]) for name, tensor in same.items())


@pytest.mark.parametrize("monitor", ["val/loss", pytest.param("val/drift", marks=pytest.mark.slow)])
def test_the_best_lora_is_that_of_the_lowest_validation_also_after_a_resume(pipeline, prepared, tmp_path, monitor):
    settings = [
        "data.val_fraction=0.25", "trainer.val_check_interval=1", f"callbacks.checkpoints.monitor={monitor}", ALPHA,
        "callbacks.checkpoints.every_n_steps=1", "optimizer.lr=0.05", "callbacks.report=null",
    ]  # fmt: skip
    was, now = tmp_path / "was", tmp_path / "now"
    train(pipeline, prepared, was, *settings, "trainer.max_steps=3")
    shutil.move(was, now)
    train(pipeline, prepared, now, *settings, "trainer.max_steps=6", f"resume={now}", "logger.csv.version=csv/z")
    values = {}
    for path in sorted(now.glob("csv/*/metrics.csv")):
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        shutil.copytree(path.parent, tmp_path / "one" / "csv" / "x")
        values |= {int(row["step"]) + 1: row[monitor] for row in logged(tmp_path / "one") if monitor in row}
    trained = {step: value for step, value in values.items() if 1 <= step <= 6 and step != 0}
    best = min(trained, key=trained.get)
    assert step_of_lora(now / "lora_best.safetensors") == best
    same, other = load_file(now / "lora_best.safetensors"), load_file(now / "lora" / f"step-{best:06d}.safetensors")
    assert all(tensor.equal(other[name]) for name, tensor in same.items())
    assert (now / "lora_best_comfyui.safetensors").is_file()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("monitor=val/los", "callbacks.checkpoints.monitor must be one of val/loss, val/target_loss"),
        ("monitor=val/loss", "there are no validation samples, or trainer.limit_val_batches=0 leaves them out"),
        ("keep_last=0", "callbacks.checkpoints.keep_last must be at least 1, got 0"),
        ("every_n_epochs=0", "callbacks.checkpoints.every_n_epochs must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_kept_or_measured_is_refused(pipeline, prepared, tmp_path, setting, said):
    import mpp.train

    with pytest.raises(ValueError, match=re.escape(said)):
        mpp.train.run(train_config(pipeline, prepared, tmp_path, f"callbacks.checkpoints.{setting}"))
