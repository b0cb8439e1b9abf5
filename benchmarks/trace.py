"""Whether two commits train alike, to the last bit: short float32 runs of both on this machine.

    python -m benchmarks.trace OLD NEW      # commits, tags or branches of this repository; `.` is the working tree

Each side prepares the same drawn images and trains the runs of `RUNS` by its own commands, in a checkout of its own.
Compared are the logged values of every step and the tensors of the LoRA files. The exit code is 1 where any differs.
"""

import argparse
import csv
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS = 20
SIZES = [(96, 64), (64, 96), (64, 64)]  # of the drawn images, in pixels
WORDS = ("red circle", "blue square", "green triangle")
# The values that are compared step by step; those of time are the machine's.
VALUES = ("loss", "target_loss", "prior_loss", "drift", "mask_mean", "prior_mask_mean", "teacher_fraction")
RUNS = {
    "wan threshold": ("tiny_wan", ["loss=threshold", "data.batch_size=2", "trainer.accumulate_grad_batches=2"]),
    "wan masked": ("tiny_wan", ["loss=masked"]),
    "toy threshold": ("toy", ["loss=threshold", "data.batch_size=4"]),
}
Trace = dict[str, list[float | None]]


def draw(folder: Path, sizes: Sequence[tuple[int, int]], count: int = 9) -> None:
    """Images with captions, two thirds of them with masks in tiers; a function of the sizes alone."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = random.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(WORDS[number % len(WORDS)])
        if number % 3 == 2:
            continue
        mask = np.zeros((height, width), np.uint8)
        left, top = (int(random.integers(0, side // 2)) for side in (width, height))
        mask[:, left:] = 20
        mask[top : top + height // 2, left : left + width // 2] = 255
        mask[: height // 4, : width // 4] = 80
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def command(module: str, arguments: Sequence[str]) -> None:
    """`python -m MODULE ARGUMENTS` in this process."""
    before = sys.argv
    try:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = before


def record(folder: Path) -> dict[str, Trace]:
    """Train all runs by the code that this process imports; returns the logged values of each step.

    Args:
        folder: Empty; data, caches and the runs' folders (named as the runs) go there.
    """
    pretrained = {
        "tiny_wan": f"model.pretrained.folder={folder / 'tiny_wan'}",
        "toy": f"model.pretrained={ROOT / 'benchmarks' / 'phantom_limb' / 'base'}",
    }
    for model, sizes in (("tiny_wan", SIZES), ("toy", [(24, 24)])):
        data = folder / f"{model}_data"
        draw(data, sizes)
        command(
            "mpp.prepare",
            [
                f"model={model}",
                pretrained[model],
                f"data.image_dir={data / 'images'}",
                f"data.mask_dir={data / 'masks'}",
                f"data.cache_dir={data / 'cache'}",
                f"data.resolution={min(map(min, sizes))}",
                "device=cpu",
                "prepare.workers=0",
            ],
        )
    return {name: _train(folder, name, model, pretrained[model], settings) for name, (model, settings) in RUNS.items()}


def _train(folder: Path, name: str, model: str, pretrained: str, settings: Sequence[str]) -> Trace:
    out = folder / name.replace(" ", "_")
    command(
        "mpp.train",
        [
            f"model={model}",
            pretrained,
            f"data.cache_dir={folder / f'{model}_data' / 'cache'}",
            f"output_dir={out}",
            "data.num_workers=0",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            f"trainer.max_steps={STEPS}",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "optimizer.lr=1e-3",
            "lora.rank=4",
            "logger=csv",
            "validate_first=false",
            "callbacks.report.pictures=0",
            "callbacks.page=null",
            *settings,
        ],
    )
    (log,) = out.glob("csv/*/metrics.csv")
    with log.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row.get("train/loss")]
    if len(rows) != STEPS:
        raise ValueError(f"{log} has {len(rows)} steps with a loss, expected {STEPS}")
    return {value: [float(text) if (text := row.get(f"train/{value}")) else None for row in rows] for value in VALUES}


def _side(commit: str, folder: Path) -> dict[str, Trace]:
    """The traces of a commit, by a process of its own in a checkout of its own."""
    checkout = ROOT
    if commit != ".":
        checkout = folder / "checkout"
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        checkout.mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", str(checkout)], input=archive, check=True)
    out = folder / "runs"
    out.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    log = folder / "output.txt"
    with log.open("w") as output:
        child = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--record", str(out)],
            cwd=checkout,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if child.returncode:
        sys.exit(f"{commit} did not train (exit code {child.returncode}):\n{log.read_text()[-3000:]}")
    return json.loads((out / "traces.json").read_text())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("lora.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def compare(old: str, new: str) -> bool:
    """Print how many values and tensors of two commits are equal; returns whether all are."""
    with tempfile.TemporaryDirectory() as root:
        sides = [Path(root) / name for name in ("old", "new")]
        before, after = (_side(commit, folder) for commit, folder in zip((old, new), sides, strict=True))
        tensors, others = (_tensors(folder / "runs") for folder in sides)
    equal = True
    for run, trace in before.items():
        values = {name: list(zip(trace[name], after[run][name], strict=True)) for name in VALUES}
        differ = [f"{name} from step {_first(pairs)} on" for name, pairs in values.items() if _first(pairs)]
        label = run.replace(" ", "_")
        names = {name for name in tensors | others if name.startswith(f"{label}/")}
        wrong = [n for n in names if n not in tensors or n not in others or not torch.equal(tensors[n], others[n])]
        equal &= not differ and not wrong and bool(names)
        said = "; ".join(differ) or f"{STEPS} steps x {len(VALUES)} values equal"
        print(f"{run}: {said}; {len(names) - len(wrong)} of {len(names)} adapter tensors equal")
    return equal


def _first(pairs: Sequence[tuple[float | None, float | None]]) -> int | None:
    """Number of the first step, from 1, at which two traces differ."""
    return next((number for number, (a, b) in enumerate(pairs, 1) if a != b), None)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="OLD and NEW")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record is not None:
        torch.set_num_threads(1)
        traces = record(arguments.record)
        (arguments.record / "traces.json").write_text(json.dumps(traces))
        return
    if len(arguments.commits) != 2:
        parser.error("give two commits")
    sys.exit(0 if compare(*arguments.commits) else 1)


if __name__ == "__main__":
    main()
