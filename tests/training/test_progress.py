"""What a run says on its way, and what its logs hold beside the losses."""

import csv
import json
import logging
import math
import random
import re
import sys
from io import StringIO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mpp.train
from mpp.cache.coverage import Coverage
from mpp.training.banner import shares
from mpp.training.metrics import BANDS
from tests.helpers import logged, train, train_config

LINE = re.compile(r"step +(\d+)/(\d+), loss (\S+), target (\S+), prior (\S+)(?:, drift (\S+))?, lr (\S+),")


def points(out):
    """Steps behind the points of a run's losses, and their rows."""
    return {int(row["step"]) + 1: row for row in logged(out) if "train/loss" in row}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_line_and_a_point_come_every_so_many_steps_and_at_the_end(pipeline, prepared, tmp_path, caplog, seed):
    caplog.set_level("INFO", logger="mpp")
    draw = random.Random(seed)
    steps, every, window = draw.randint(3, 9), draw.randint(2, 12), draw.randint(1, 2)
    train(
        pipeline, prepared, tmp_path, f"trainer.max_steps={steps}", f"trainer.log_every_n_steps={every}",
        f"trainer.accumulate_grad_batches={window}",
    )  # fmt: skip
    expected = sorted({*range(every, steps + 1, every), steps})
    found = points(tmp_path)
    assert list(found) == expected
    said = [match.groups() for match in map(LINE.search, caplog.messages) if match]
    assert [(int(step), int(total)) for step, total, *_ in said] == [(step, steps) for step in expected]
    for step, _, loss, target, prior, _, lr in said:
        row = found[int(step)]
        shown = [float(value) for value in (loss, target, prior, lr)]
        assert shown == pytest.approx(
            [row[f"train/{n}"] for n in ("loss", "target_loss", "prior_loss", "lr")], abs=1e-4
        )


@pytest.mark.slow
def test_a_point_at_the_end_is_of_the_steps_since_the_last_alone(pipeline, prepared, tmp_path):
    for every in (1, 3):
        train(pipeline, prepared, tmp_path / str(every), "trainer.max_steps=5", f"trainer.log_every_n_steps={every}",
              "loss=masked", "loss.normalization=per_sample", "data.batch_size=1")  # fmt: skip
    single, grouped = points(tmp_path / "1"), points(tmp_path / "3")
    for step, parts in ((3, (1, 2, 3)), (5, (4, 5))):
        for name in ("train/target_loss", "train/grad_norm"):
            mean = sum(single[part][name] for part in parts) / len(parts)
            assert grouped[step][name] == pytest.approx(mean, rel=1e-5)


def test_the_gradient_norm_is_that_before_clipping_over_the_whole_window(pipeline, prepared, tmp_path):
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            closure()  # clips
            norms.append(
                math.sqrt(sum(float((p.grad.double() ** 2).sum()) for g in self.param_groups for p in g["params"]))
            )

    cfg = train_config(
        pipeline, prepared, tmp_path, "trainer.accumulate_grad_batches=2", "optimizer._target_=torch.optim.SGD"
    )
    for clip, folder in ((0, "whole"), (1e-3, "clipped")):
        norms.clear()
        own = cfg.copy()
        own.output_dir, own.trainer.gradient_clip_val = str(tmp_path / folder), clip
        original, torch.optim.SGD = torch.optim.SGD, Spy
        try:
            mpp.train.run(own)
        finally:
            torch.optim.SGD = original
        found = [row["train/grad_norm"] for row in points(tmp_path / folder).values()]
        if clip:
            assert norms == pytest.approx([clip] * 4, rel=1e-3)
            assert all(norm > 10 * clip for norm in found)
        else:
            assert found == pytest.approx(norms, rel=1e-5)


def test_one_bar_covers_the_whole_run(pipeline, prepared, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="mpp")
    screen = StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    train(pipeline, prepared, tmp_path, "trainer.enable_progress_bar=true", "trainer.max_steps=7")
    text = screen.getvalue()
    assert "7/7" in text
    assert "Epoch" not in text
    assert {match[1] for match in re.finditer(r"\d+/(\d+) \[", text)} == {"7"}
    assert all(f"{name}=" in text for name in ("loss", "target_loss", "prior_loss", "drift", "lr"))
    assert not any(map(LINE.search, caplog.messages))


def screen_of(text):
    """The lines that a terminal shows: what comes after a carriage return is written over what was there."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.replace("\x1b[A", "").split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.slow
def test_lines_of_the_log_stand_above_the_bar_whole(pipeline, prepared, tmp_path, monkeypatch):
    screen = StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    root, handler = logging.getLogger(), logging.StreamHandler(screen)
    handler.setFormatter(logging.Formatter("<%(message)s>"))
    monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
    logging.getLogger("mpp").setLevel(logging.INFO)
    every = "callbacks.checkpoints.every_n_steps=2"
    train(pipeline, prepared, tmp_path, "trainer.enable_progress_bar=true", "trainer.max_steps=5", every)
    lines = screen_of(screen.getvalue())
    said = [line for line in lines if "saved step" in line]
    assert said == [f"<saved step {step}: {tmp_path / 'lora.safetensors'}>" for step in (2, 4, 5)]
    assert root.handlers[-1] is handler


@pytest.mark.slow
def test_validation_is_said_beside_the_first_one_also_after_a_resume(pipeline, prepared, tmp_path, caplog):
    caplog.set_level("INFO", logger="mpp")
    val = ["data.val_fraction=0.25", "trainer.val_check_interval=2"]
    train(pipeline, prepared, tmp_path, *val, "trainer.max_steps=2")
    train(pipeline, prepared, tmp_path, *val, "trainer.max_steps=4", f"resume={tmp_path}", "logger.csv.version=csv2")
    said = [line for line in caplog.messages if line.startswith("validation at step")]
    assert [line.split(":")[0].split()[-1] for line in said] == ["0", "2", "2", "4"]  # one that was due is begun anew
    first = re.search(r"loss (\S+),", said[0])[1]
    assert all(f"loss {first} -> " in line for line in said[1:])


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_the_area_add_up_to_a_hundred_percent(seed):
    draw = random.Random(seed)
    learn = draw.random()
    text = shares(Coverage(3, learn, draw.choice([draw.random(), (1 - learn) * draw.random(), 1 - learn]), 1.0, 0.0))
    learned, preserved, rest = (float(number) for number in re.findall(r"(\d+\.\d)%", text))
    both = "of which both" in text
    assert learned + preserved + (-rest if both else rest) == pytest.approx(100)


@pytest.mark.slow
def test_tensorboard_has_settings_prompts_versions_and_a_row_in_the_table_of_runs(pipeline, prepared, tmp_path):
    val = ["data.val_fraction=0.25", "trainer.val_check_interval=2"]
    train(pipeline, prepared, tmp_path, "logger=tensorboard", *val)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "optimizer:" in texts["config/text_summary"]
    assert f"torch: {torch.__version__}" in texts["versions/text_summary"]
    hidden = events.summary_metadata
    assert "_hparams_/session_start_info" in hidden
    session = hidden["_hparams_/experiment"].plugin_data.content
    assert b"val/drift" in session
    assert b"val/target_loss" in session
    scalars = set(events.Tags()["scalars"])
    assert {"train/grad_norm", "train/lr", "perf/seconds_per_step", "perf/samples_per_second"} <= scalars
    assert any(name.startswith("train_sigma_") for name in scalars)
    assert sum(name.startswith("val_sigma_") and name.endswith("target_loss") for name in scalars) <= BANDS


@pytest.mark.slow
def test_the_csv_logger_keeps_the_settings_too(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path)
    (path,) = tmp_path.glob("csv/*/hparams.yaml")
    assert "batch_size: 2" in path.read_text()
    with next(tmp_path.glob("csv/*/metrics.csv")).open() as handle:
        assert "train/lr" in next(csv.reader(handle))


@pytest.mark.slow
def test_what_a_run_came_to_is_said_with_every_file(pipeline, prepared, tmp_path, caplog):
    from mpp.training.conclusion import outcome

    caplog.set_level("INFO", logger="mpp")
    trainer, module = train(pipeline, prepared, tmp_path, "callbacks.ema.decay=0.5", "lora.alpha=4")
    found = json.loads(json.dumps(outcome(trainer, module, tmp_path)))
    assert (found["finished"], found["steps"], found["planned_steps"], found["samples_seen"]) == (True, 4, 4, 8)
    assert {(entry["program"], entry["average"]) for entry in found["loras"]} == {
        (program, average) for program in ("diffusers", "ComfyUI") for average in (False, True)
    }
    for entry in found["loras"]:
        assert any(entry["file"] in line for line in caplog.messages)
    assert any(f"resume={tmp_path} trainer.max_steps=8" in line for line in caplog.messages)
