"""What the data path costs: a large index, masks again, and reading the cache against a training step.

    python -m benchmarks.data [index] [masks] [reading] [stages]

Absolute times are those of the machine; what matters is their order of magnitude.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mpp.prepare
from mpp.batching.datamodule import LatentDataModule
from mpp.batching.loader import BatchOrder
from mpp.cache.format import Cache, CacheIdentity, text_name, write_tensors
from mpp.cache.index import Entry, Index, write_index
from mpp.config import build, compose
from mpp.models.contract import Identity
from mpp.models.tiny import tiny_wan
from mpp.preparing.summary import Summary

DEMO = Path(__file__).parents[1] / "demo"
STEP = 0.5  # seconds of a fast training step
SHAPES = [(16, 1, 64 + 2 * n, 64) for n in range(20)]


def memory() -> float:
    """Peak resident megabytes of this process."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure_index(folder: Path, count: int = 1_000_000) -> dict[str, float]:
    """An index of `count` samples in 20 buckets: opened, split, put in batches, in a process of its own."""
    entries = [
        Entry(
            f"set/{n // 1000:04d}/picture_{n:07d}",
            "train" if n % 50 else "val",
            SHAPES[n % 20],
            f"{n:032x}",
            f"a photo of ohwx person number {n}, standing in a park, wearing a red coat",
            "folder" if n % 10 else None,
        )
        for n in range(count)
    ]
    write_index(folder / "index.jsonl", entries)
    del entries
    command = [sys.executable, "-m", "benchmarks.data", "--open", str(folder / "index.jsonl")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def open_index(path: Path) -> dict[str, float]:
    """What a run does with its index at the start."""
    before, start = memory(), time.monotonic()
    index = Index.open(path)
    opened = time.monotonic()
    train = index.of_split("train")
    order = BatchOrder(train.signatures(), 4, seed=0, world_size=8)
    ready = time.monotonic()
    batches = order.epoch_batches()
    shuffled = time.monotonic()
    return {
        "samples": len(index),
        "file_mb": path.stat().st_size / 1e6,
        "open_s": opened - start,
        "order_s": ready - opened,
        "epoch_s": shuffled - ready,
        "peak_mb": memory() - before,
        "batches_per_rank": len(batches),
        "sampler_state_bytes": len(pickle.dumps({"epoch": order.epoch, "position": order.position})),
    }


def prepare(folder: Path, pipeline: str, *overrides: str) -> Summary:
    """Prepare `photos` and `masks` of a folder."""
    settings = [
        "model=tiny_wan", f"model.pretrained={pipeline}", f"data.image_dir={folder / 'photos'}",
        f"data.mask_dir={folder / 'masks'}", f"data.cache_dir={folder / 'cache'}", "data.resolution=64", "device=cpu",
        *overrides,
    ]  # fmt: skip
    return mpp.prepare.run(compose("prepare", settings))


def measure_masks(folder: Path, count: int = 1000) -> dict[str, float]:
    """`count` images of 512 pixels with masks: prepared, then all masks edited and prepared again."""
    random = np.random.default_rng(0)
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        small = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(small).resize((512, 512)).save(folder / "photos" / f"p{number}.jpg")
        Image.new("L", (512, 512), 255).save(folder / "masks" / f"p{number}.png")
    pipeline = tiny_wan(str(folder / "tiny"))
    first = prepare(folder, pipeline)
    again = prepare(folder, pipeline)
    for number in range(count):
        Image.new("L", (512, 512), 128).save(folder / "masks" / f"p{number}.png")
    masks = prepare(folder, pipeline)
    assert (masks.encoded, masks.masks_written) == (0, count)
    return {"pictures": count, "all_s": first.seconds, "nothing_s": again.seconds, "masks_s": masks.seconds}


def measure_reading(folder: Path, count: int = 32) -> dict[str, float]:
    """Samples per second from a cache of real shapes (832 x 480, 81 frames and 1 frame) by the DataModule's loader."""
    cfg = compose("train", ["model=wan", "data.cache_dir=x"])
    model = build(cfg.model)
    found = {}
    for name, shape in {"clips": (16, 21, 60, 104), "pictures": (16, 1, 60, 104)}.items():
        cache = Cache(folder / name)
        cache.write_identity(CacheIdentity.of(model, Identity(None, None, None)))
        write_tensors(cache.text_path(text_name("a")), {"text": torch.randn(120, 4096)}, {})
        entries = []
        for number in range(count):
            key = f"s{number}"
            write_tensors(cache.latents_path(key), {"latents": torch.randn(shape)}, {})
            write_tensors(cache.mask_path(key), {"mask": torch.rand(1, *shape[1:])}, {})
            entries.append(Entry(key, "train", shape, text_name("a"), "a", "folder"))
        cache.write_index(entries)
        for workers in (0, 2):
            data = LatentDataModule(architecture=model, cache_dir=str(cache.folder), num_workers=workers)
            data.setup()
            loader = data.train_dataloader()
            list(loader)  # starts the workers, and the files are in the page cache
            start = time.monotonic()
            rounds = 3
            for _ in range(rounds):
                list(loader)
            rate = rounds * count / (time.monotonic() - start)
            found[f"{name}_workers{workers}_per_s"] = rate
            found[f"{name}_workers{workers}_share_of_step"] = 1 / rate / STEP
    return found


def measure_stages(folder: Path) -> dict[str, float]:
    """Seconds of each stage of preparing the four photos of the demo, on a tiny random model."""
    subprocess.run([sys.executable, DEMO / "photos.py", folder / "photos"], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(DEMO / "masks", folder / "masks")
    summary = prepare(folder, tiny_wan(str(folder / "tiny")), "data.resolution=256")
    return {**summary.stages, "all": summary.seconds, "samples": summary.encoded}


PARTS = {"index": measure_index, "masks": measure_masks, "reading": measure_reading, "stages": measure_stages}


def main() -> None:
    """Measure the parts named on the command line, or all."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--open"]:
        print(json.dumps(open_index(Path(sys.argv[2]))))
        return
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](Path(folder))
        print(json.dumps({"part": name, "cores": os.cpu_count(), **{k: round(v, 4) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
