"""Worker processes, real ones: by fork as the suite starts them, by spawn and forkserver through the commands."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mpp.workers import ReadAhead
from tests.helpers import draw_photos, held_by, prepare, train

REPOSITORY = Path(__file__).parents[1]
ERRORS = [ValueError, OSError, FileNotFoundError, UnicodeError]


def squares(group):
    return [number * number for number in group]


def draw_groups(random):
    return [[random.randrange(1000) for _ in range(random.randint(1, 4))] for _ in range(random.randint(1, 9))]


def failing(wrong, kind, group):
    if group == wrong:
        raise kind(f"/photos/{group[0]}.png is damaged\nin two lines")
    return squares(group)


def test_workers_give_what_one_process_gives_in_order():
    draws = random.Random(1)
    for _ in range(12):
        groups, workers = draw_groups(draws), draws.choice([0, 1, 2])
        settings = {"workers": workers, "persistent": draws.random() < 0.5, "ahead": draws.randint(1, 3)}
        reading = ReadAhead(squares, groups, "x.workers", **settings)
        assert list(reading) == [squares(group) for group in groups]
        assert list(reading) == [squares(group) for group in groups]  # and again


def test_an_error_in_a_worker_is_the_error_itself_and_nothing_more():
    draws = random.Random(2)
    for _ in range(12):
        groups, workers, kind = draw_groups(draws), draws.choice([0, 1, 2]), draws.choice(ERRORS)
        wrong = draws.choice(groups)
        reading = iter(ReadAhead(partial(failing, wrong, kind), groups, "x.workers", workers=workers))
        for group in groups[: groups.index(wrong)]:
            assert next(reading) == squares(group)
        with pytest.raises(kind) as caught:
            next(reading)
        assert str(caught.value) == f"/photos/{wrong[0]}.png is damaged\nin two lines"
        assert "in failing" in caught.value.__notes__[0]  # for whoever asks for the traceback
        assert not multiprocessing.active_children()  # they end with the iteration, not when somebody drops the error


def test_a_mistake_of_ours_in_a_worker_comes_with_its_traceback():
    with pytest.raises(KeyError, match="in failing"):
        list(ReadAhead(partial(failing, [1], KeyError), [[1]], "x.workers", workers=1))


def die(group):
    if group == [3]:
        os.kill(os.getpid(), signal.SIGKILL)
    return group


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_in_one_clear_message():
    with pytest.raises(ValueError, match=r"process that reads ahead has died .*lower x.workers, now 2"):
        list(ReadAhead(die, [[1], [2], [3], [4]], "x.workers", workers=2))


# ---------------------------------------------------------------- signals, to real processes

READER = """
import os, signal, sys, time
from multiprocessing import set_start_method
from mpp.workers import ReadAhead
def read(group):
    time.sleep(0.3)
    return os.getpid()
if __name__ == "__main__":
    set_start_method(sys.argv[1])
    met = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, frame: met.append(number))
    reading = ReadAhead(read, [[n] for n in range(int(sys.argv[2]))], "x.workers", workers=2, persistent=True)
    pids = []
    for pid in reading:
        pids.append(pid)
        print(pid, flush=True)
    print("whole", len(pids), len(set(pids)), sorted(map(int, met)), flush=True)
    again = iter(reading)
    if len(sys.argv) > 3:
        raise KeyError  # the traceback keeps the loader, so that the interpreter ends before the workers do
"""


def reader(folder, *arguments):
    (folder / "reader.py").write_text(READER)
    return subprocess.Popen(
        [sys.executable, "reader.py", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="a SIGTERM to all processes ends workers here")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_signals_to_all_processes_leave_the_workers_at_work(tmp_path, method):
    draws = random.Random(method)
    process = reader(tmp_path, method, "12")
    process.stdout.readline()
    sent = [draws.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]) for _ in "123"]
    for number in sent:
        os.killpg(process.pid, number)
        process.stdout.readline()
    out, errors = process.communicate(timeout=60)
    assert f"whole 12 2 {sorted(map(int, sent))}" in out, errors
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_end_with_the_main_process_however_it_ends(tmp_path, method):
    started = time.monotonic()
    failed = reader(tmp_path, method, "4", "fails")
    out, errors = failed.communicate(timeout=60)
    assert "KeyError" in errors
    assert all(gone(int(pid)) for pid in out.split("whole")[0].split())
    assert time.monotonic() - started < 40
    killed = reader(tmp_path, method, "1000")
    pids = {int(killed.stdout.readline()) for _ in range(6)}
    assert len(pids) == 2
    killed.kill()
    killed.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert all(map(gone, pids))


# ---------------------------------------------------------------- the commands where processes are spawned

AS_MODULE = """
import multiprocessing, runpy, sys
method, module, *words = sys.argv[1:]
multiprocessing.set_start_method(method)
sys.argv = [module, *words]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def command(method, module, *words, cwd):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    done = subprocess.run(
        [sys.executable, "-c", AS_MODULE, method, module, *words],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_training_is_bit_equal_where_processes_are_not_forked(pipeline, prepared, tmp_path, method):
    draws = random.Random(method)
    settings = ["trainer.max_steps=5", "lora.rank=4", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    settings += ["optimizer.lr=1e-3", f"seed={draws.randrange(100)}", f"data.batch_size={draws.randint(1, 3)}"]
    train(pipeline, prepared, tmp_path / "own", *settings)
    done = command(
        method, "mpp.train", "model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={prepared}",
        "output_dir=spawned", "data.num_workers=2", *settings, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spawned, own = (load_file(tmp_path / folder / "lora.safetensors") for folder in ("spawned", "own"))
    assert all(spawned[name].equal(own[name]) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_preparing_gives_the_same_files_where_processes_are_not_forked(pipeline, tmp_path, method):
    draws = random.Random(method)
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=draws.randint(3, 9))
    together = f"prepare.batch_size={draws.randint(1, 3)}"
    prepare(pipeline, tmp_path, together)
    done = command(
        method, "mpp.prepare", "model=tiny_wan", f"model.pretrained={pipeline}", f"data.image_dir={tmp_path}/photos",
        f"data.mask_dir={tmp_path}/masks", "data.cache_dir=c", "data.resolution=64", "device=cpu", together,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spawned, own = held_by(tmp_path / "c"), held_by(tmp_path / "cache")
    notes = [json.loads(held.pop("notes.json")) for held in (spawned, own)]
    assert [note["sources"].pop("cache_dir") for note in notes] == [str(tmp_path / name) for name in ("c", "cache")]
    assert notes[0] == notes[1]
    assert spawned == own


@pytest.mark.slow
def test_a_damaged_file_met_by_a_worker_is_one_message(pipeline, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "c")
    path = random.Random(3).choice(sorted((tmp_path / "c" / "latents").iterdir()))
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\xff" * 8)  # NaN, which no header tells
    done = command(
        "fork", "mpp.train", "model=tiny_wan", f"model.pretrained={pipeline}", "data.cache_dir=c", "output_dir=out",
        "trainer.accelerator=cpu", "trainer.max_steps=20", "data.num_workers=2", "trainer.enable_progress_bar=false",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {path.stem}: its latents hold NaN or infinity (c/latents/")
