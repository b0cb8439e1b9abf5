"""A disk that is really full: a limit of the kernel on the size of files, and a small file system of its own."""

import os
import random
import resource
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpp.cache.format import Cache, write_tensors
from mpp.cache.index import Entry, write_index
from mpp.files import write_atomically, write_folder, write_json
from mpp.masking.pixels import Pixels
from mpp.masking.video_frames import Times
from mpp.masking.writing import write_frames, write_png, write_video
from mpp.models.frame_axis import Moments
from mpp.sampling.generation import Pair, save
from mpp.training.checkpoint import AtomicCheckpointIO
from tests.helpers import draw_photos

REPOSITORY = Path(__file__).parents[1]


@contextmanager
def at_most(size):
    """No file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pixels(draws, *shape):
    return np.frombuffer(draws.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)


def checkpoint(path, draws):
    state = {f"layer {number}": torch.rand(draws.randint(1, 9), 40) for number in range(draws.randint(1, 20))}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "loops": {"epoch": 3}}, path)


def tensors(path, draws):
    write_tensors(path, {"latents": torch.rand(16, 1, draws.randint(1, 9), 8)}, {"caption": "x"})


def lora(path, draws):
    contents = {f"{number}": torch.rand(40, draws.randint(1, 99)) for number in range(3)}
    write_atomically(path, lambda temporary: save_file(contents, temporary, metadata={"mpp": "x" * 99}))


def index(path, draws):
    row = Entry("k", "train", (16, 1, 8, 8), "t", "words " * 20, None)
    write_index(path, [row] * draws.randint(1, 90))


def record(path, draws):
    write_json(path, {"rows": [draws.random() for _ in range(draws.randint(1, 900))]})


def mask(path, draws):
    write_png(path, Pixels(pixels(draws, draws.randint(1, 40), 30, 3)), "{}")


def video(path, draws):
    frames = [Pixels(pixels(draws, 32, 48, 3)) for _ in range(draws.randint(1, 5))]
    write_video(path, iter(frames), Times(tuple(range(len(frames))), Fraction(1, 24), Fraction(24)), "{}")


def clip(path, draws):
    shown = torch.rand(draws.randint(2, 5), 3, 32, 48)
    save(Pair(path.stem, "a prompt", shown, shown, Moments(), 16.0), path.parent)


def folder(path, draws):
    sizes = [draws.randint(1, 5000) for _ in range(3)]

    def write(new):
        for number, size in enumerate(sizes):
            (new / str(number)).write_bytes(draws.randbytes(size))

    write_folder(path, write)


def frames(path, draws):
    names = tuple(f"{number}.png" for number in range(draws.randint(1, 4)))
    write_frames(path, iter(Pixels(pixels(draws, 16, 24, 3)) for _ in names), names, "{}")


WRITERS = {
    "last.ckpt": checkpoint,
    "x.safetensors": tensors,
    "lora.safetensors": lora,
    "index.jsonl": index,
    "notes.json": record,
    "mask.png": mask,
    "mask.mkv": video,
    "mask.mp4": video,
    "0_a.mp4": clip,
    "merged": folder,
    "masks": frames,
}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_clear_error_and_what_was_there_stays(tmp_path, name):
    draws, write = random.Random(name), WRITERS[name]
    whole, full = tmp_path / "whole", tmp_path / "full"
    for root in (whole, full):
        root.mkdir()
    for _ in range(6):
        write(full / name, draws)
        before, state = contents(full), draws.getstate()
        write(whole / name, draws)
        limit = draws.randrange(min(map(len, contents(whole).values())) - 1)
        draws.setstate(state)
        with at_most(limit), pytest.raises(OSError, match="no space left to write") as caught:
            write(full / name, draws)
        assert name.partition(".")[0] in str(caught.value)
        assert contents(full) == before
        assert not list(full.rglob(".*.tmp"))


# ---------------------------------------------------------------- the commands

LIMITED = """
import resource, runpy, sys
limit, module, *words = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.argv = [module, *words]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def command(*words, cwd):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # else compiled modules are cut short, and stay so
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def said(done):
    """The error, and that nothing but it was said of it."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "no space left to write" in last
    return last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "shown", "what"),  # the images of regions are larger than the LoRA
    [(30_000, 4, "logs below out"), (60_000, 0, "out/lora/step-000003"), (400_000, 0, "out/checkpoints/last.ckpt")],
)
def test_a_run_that_meets_a_full_disk_says_what_could_not_be_written(pipeline, prepared, tmp_path, limit, shown, what):
    words = ["model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={prepared}", "output_dir=out"]
    words += ["data.num_workers=0", "trainer.max_steps=3", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    words += [f"callbacks.report.pictures={shown}"]
    assert what in said(command("-c", LIMITED, limit, "mpp.train", *words, cwd=tmp_path))
    assert not list((tmp_path / "out").rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_preparing_onto_a_full_disk_is_gone_on_with_when_there_is_room(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks")
    small = tmp_path / "small"
    small.mkdir()
    words = ["model=tiny_wan", f"model.pretrained={pipeline}", "data.image_dir=photos", "data.mask_dir=masks"]
    words += ["data.resolution=64", "device=cpu", "prepare.workers=0", "data.cache_dir=small/c"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70k", "tmpfs", small], check=True)
    try:
        assert "small/c/" in said(command("-m", "mpp.prepare", *words, cwd=tmp_path))
        assert not list(small.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=2m", small], check=True)
        done = command("-m", "mpp.prepare", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "0 already current" not in done.stdout.splitlines()[0]
        assert len(Cache(small / "c").entries()) == 8
    finally:
        subprocess.run(["umount", small], check=True)
