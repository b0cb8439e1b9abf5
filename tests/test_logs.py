"""How what commands say reads, on the console, in the log file and for scripts."""

import json
import logging
import random
import re
import sys
import warnings
from io import StringIO

import pytest
from tqdm import tqdm

import mpp.export
import mpp.train
from mpp import logs
from tests.helpers import QUIET
from tests.test_command_line import TRAIN, run

NOISE = re.compile(r"CLIPImageProcessor|litlogger|TPU|GPU available|Trainer\.fit|Mismatch dtype|model shards|it/s")


@pytest.fixture
def root():
    """The root logger, as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:], logger.level = handlers, level


@pytest.mark.parametrize("seed", range(5))
def test_a_line_says_its_time_and_what_is_wrong(seed):
    draw = random.Random(seed)
    level, text = draw.choice([10, 20, 30, 40]), f"{draw.random()} %s ümläut"
    record = logging.LogRecord("mpp", level, "", 0, text.replace("%s", "%%s"), (), None)
    line = logs.FILE.format(record)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (warning: |error: )?.*", line)
    assert ("warning: " in line, "error: " in line) == (level == 30, level == 40)


def test_librarys_warnings_and_mistakes_are_lines_like_others(root, tmp_path, capsys):
    console, file = logging.StreamHandler(sys.stdout), logging.FileHandler(tmp_path / "train.log", encoding="utf-8")
    file.setFormatter(logs.FILE)
    root.handlers[:], root.level = [console, file], logging.INFO
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings(), logs.speaking():
        logs.adopt()
        warnings.simplefilter("always")
        warnings.warn("something odd", stacklevel=1)
        logging.getLogger("lightning.pytorch").info("a tip")
        logging.getLogger("lightning.pytorch").warning("not good")
        raise ZeroDivisionError
    said, kept = capsys.readouterr().out, (tmp_path / "train.log").read_text()
    for text in (said, kept):
        assert re.search(r"\d warning: something odd \(UserWarning, .*test_logs.py:\d+\)", text)
        assert "warning: not good" in text
        assert "a tip" not in text
    file.close()
    assert "Traceback" in kept
    assert "Traceback" not in said


def test_bars_of_libraries_are_for_terminals(monkeypatch):
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    monkeypatch.setattr(of_transformers, "_tqdm_active", True)
    monkeypatch.setattr(of_diffusers, "_tqdm_active", True)
    for name in logs._LIBRARIES:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        logs.adopt()
        assert of_transformers._tqdm_active == of_diffusers._tqdm_active == terminal


def test_quiet_says_warnings_alone(root, capsys):
    root.handlers[:], root.level = [logging.StreamHandler(sys.stdout)], logging.INFO
    with logs.speaking(quiet=True):
        print("a result")
        logs.log.info("on its way")
        logs.log.warning("look here")
    assert re.fullmatch(r"\S+ warning: look here\n", capsys.readouterr().out)


def test_quiet_draws_no_bar_on_a_terminal(root, monkeypatch):
    screen = StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(tqdm(range(3), disable=None, mininterval=0)) == [0, 1, 2]
    drawn = len(screen.getvalue())
    assert drawn > 0
    with logs.speaking(quiet=True):
        assert list(tqdm(range(3), disable=None, mininterval=0)) == [0, 1, 2]
        sys.stderr.write("error: seen")
    assert screen.getvalue()[drawn:] == "error: seen"


def test_the_record_is_json_also_where_numbers_are_not_finite(capsys):
    with logs.recording("train", said=True):
        logs.record(train={"loss": float("nan")}, more=[float("inf"), 1.5])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["train"], found["more"]) == ({"loss": None}, [None, 1.5])


@pytest.mark.parametrize("words", [["lora_path=none"], ["--nonsense"], ["export.formt=kohya"], ["a.yaml"]])
def test_the_last_line_is_json_whatever_is_wrong(monkeypatch, capsys, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpp.export", *words, "--json"])
    with pytest.raises(SystemExit) as ended:
        mpp.export.main()
    assert str(ended.value.code).startswith("error: ")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["command"] == "export"
    assert found["exit_code"] == 1
    assert f"error: {found['error']}" == ended.value.code


@pytest.mark.slow
def test_a_run_by_the_command_line_has_one_form_of_line_and_a_record(pipeline, prepared, tmp_path):
    words = [*TRAIN, *QUIET, f"model.pretrained={pipeline}", f"data.cache_dir={prepared}", "logger=csv"]
    done = run("mpp.train", *words, "output_dir=out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines), lines
    assert not NOISE.search(done.stdout + done.stderr)
    kept = (tmp_path / "out" / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == [line.split(" ", 1)[1] for line in lines]
    found = json.loads(last)
    assert (found["command"], found["exit_code"], found["finished"], found["steps"]) == ("train", 0, True, 2)
    assert all((tmp_path / entry["file"]).is_file() for entry in found["loras"])
    assert found["train"]["train/loss"] > 0
    quiet = run("mpp.train", *words, "output_dir=out2", "--quiet", "--json", cwd=tmp_path)
    assert [json.loads(line)["steps"] for line in quiet.stdout.splitlines()] == [2]
    assert quiet.stderr == ""
    again = run("mpp.train", *words, "output_dir=out", "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: output_dir=out holds a run already")


@pytest.mark.slow
def test_an_error_after_the_start_is_in_the_runs_log(pipeline, prepared, tmp_path):
    words = [*TRAIN, *QUIET, f"model.pretrained={pipeline}", f"data.cache_dir={prepared}", "optimizer.lr=1e30"]
    done = run("mpp.train", *words, "trainer.max_steps=50", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert "not finite" in error
    assert (tmp_path / "out" / "train.log").read_text().strip().endswith(error)
