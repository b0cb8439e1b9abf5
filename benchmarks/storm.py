"""Whether runs that are killed at any moment end as those that are not, to the last bit.

    python -m benchmarks.storm [--kills 100] [--chains 2] [--seed 0]

Each setting of `SETTINGS` is trained once without interruption. Then chains of the same run are killed by SIGKILL at
random moments, resumed, and killed again; the last of a chain is left to end. Compared are the adapter and the
optimizer's state in the last checkpoint, every LoRA file, every generated image, and the validations in the logs; and
after each kill that no file is broken. Chains of five runs that are ended by SIGTERM in an epoch's last step come on
top. The exit code is 1 where anything differs.

Processes are forked from one that has imported all there is to import: a kill every second or two on one core.
"""

import argparse
import csv
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import load_file

from benchmarks.trace import SIZES, draw

STEPS = 24
PROMPTS = ["sampling.prompts=[red circle,blue square]", "sampling.width=64", "sampling.height=64", "sampling.steps=2"]
SETTINGS: dict[str, list[str]] = {
    "accumulation": ["data.batch_size=1", "trainer.accumulate_grad_batches=2", "schedule=cosine"],
    "workers": ["data.batch_size=2", "data.num_workers=2", "data.unmasked_probability=0.3", "data.caption_dropout=0.3"],
    "prodigy": ["optimizer=prodigy", "optimizer.lr=1.0", "loss=continuous"],
    "schedule-free with validation": [
        "optimizer=schedulefree",
        "data.val_fraction=0.3",
        "trainer.val_check_interval=3",
    ],
    "average of the adapter": ["callbacks.ema.decay=0.9", "callbacks.ema.warmup=true", "lora=dora"],
    "samples and preservation": [
        *PROMPTS,
        "callbacks.samples.every_n_steps=4",
        "data.preservation.rate=0.25",
        "data.preservation.replace={red: blue}",
    ],
}
PREPARING = ["data.empty_caption=true", "data.preservation.replace={red: blue}", *PROMPTS]
_ENDED = 128 + signal.SIGTERM


def settings_of(name: str, folder: Path, out: Path) -> list[str]:
    """What is typed behind `python -m mpp.train`."""
    return [
        "model=tiny_wan",
        f"model.pretrained.folder={folder / 'tiny_wan'}",
        f"data.cache_dir={folder / 'cache'}",
        f"output_dir={out}",
        "lora.rank=4",
        "data.num_workers=0",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.checkpoints.every_n_steps=2",
        "logger=csv",
        f"logger.csv.version=csv/{time.time_ns()}",
        *([] if "optimizer" in SETTINGS[name][0] else ["optimizer.lr=1e-3"]),
        *SETTINGS[name],
    ]


def command(module: str, words: Sequence[str], log: str) -> None:
    """`python -m MODULE WORDS`, as a process's whole life, all it says going to a file."""
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for readers, as Linux' default for a command of its own
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


class Storm:
    """Runs of one folder.

    Args:
        folder: Where data and runs go.
        seed: Of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["mpp.train", "mpp.prepare", "mpp.models.families.wan", "prodigyopt"])

    def start(self, module: str, words: Sequence[str], log: Path) -> Any:  # noqa: ANN401
        """A process of a command."""
        process = self.context.Process(target=command, args=(module, list(words), str(log)))
        process.start()
        return process

    def prepare(self) -> None:
        """Images, masks and captions, and their cache."""
        draw(self.folder, SIZES, count=10)
        words = [
            "model=tiny_wan",
            f"model.pretrained.folder={self.folder / 'tiny_wan'}",
            f"data.image_dir={self.folder / 'images'}",
            f"data.mask_dir={self.folder / 'masks'}",
            f"data.cache_dir={self.folder / 'cache'}",
            "data.resolution=64",
            "device=cpu",
            "prepare.workers=0",
            *PREPARING,
        ]
        self.run("mpp.prepare", words, self.folder / "prepare.log")

    def run(self, module: str, words: Sequence[str], log: Path, code: int = 0) -> float:
        """Run a command to its end; returns its seconds.

        Raises:
            RuntimeError: Another exit code, with the end of what it said.
        """
        began = time.monotonic()
        process = self.start(module, words, log)
        process.join(300)
        if process.exitcode != code:
            process.kill()
            raise RuntimeError(f"exit code {process.exitcode} instead of {code}: {log.read_text()[-3000:]}")
        return time.monotonic() - began

    def train(self, name: str, out: Path, *more: str, code: int = 0) -> float:
        """Train to the end, or on from what is there."""
        return self.run("mpp.train", [*settings_of(name, self.folder, out), *resume(out), *more], log_of(out), code)

    def kill(self, name: str, out: Path, longest: float) -> None:
        """Start a run, or go on with it, and kill it with all its readers at a moment within so many seconds."""
        process = self.start("mpp.train", [*settings_of(name, self.folder, out), *resume(out)], log_of(out))
        process.join(self.random.uniform(0, longest))
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # before it had a group of its own, or after its end
            process.kill()
        process.join()

    def chain(self, name: str, straight: Path, kills: int, longest: float) -> Iterator[str]:
        """Kill one run so many times, then let it end; yields what is wrong."""
        out = self.folder / f"{straight.name}-killed-{self.random.getrandbits(32)}"
        for number in range(kills):
            self.kill(name, out, longest)
            yield from (f"after kill {number + 1}: {problem}" for problem in broken(out))
        try:
            self.train(name, out)
        except RuntimeError as error:
            yield f"does not go on: {error}"
            return
        yield from differences(straight, out)

    def epochs(self, name: str, steps: int) -> Iterator[str]:
        """End a run of six epochs of so many steps at the last step of each; yields what is wrong."""
        straight, out = (self.folder / f"{steps}-epochs-{kind}" for kind in (f"straight-{name}", f"ended-{name}"))
        longer = f"trainer.max_steps={6 * steps}"
        self.train(name, straight, longer)
        for epoch in range(1, 6):
            at = ["+callbacks.stop._target_=benchmarks.storm.signal_at", f"+callbacks.stop.step={epoch * steps}"]
            try:
                self.train(name, out, longer, *at, code=_ENDED)
            except RuntimeError as error:
                yield f"epoch {epoch}: {error}"
                return
        self.train(name, out, longer)
        yield from differences(straight, out)


def signal_at(step: int) -> Any:  # noqa: ANN401
    """A callback that sends SIGTERM to its process in the midst of a step."""

    def send(trainer: Any, *_: object) -> None:  # noqa: ANN401
        if trainer.global_step == step - 1 and step not in sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    sent: list[int] = []
    return LambdaCallback(on_train_batch_start=send)


def resume(out: Path) -> list[str]:
    """What goes on with a run where there is something to go on with."""
    return ["ckpt_path=last"] if (out / "checkpoints" / "last.ckpt").exists() else []


def log_of(out: Path) -> Path:
    """Where a run's words go."""
    return out.with_name(f"{out.name}.log")


def broken(out: Path) -> Iterator[str]:
    """Files of a killed run that cannot be read to their end."""
    for path in [*out.rglob("*.safetensors"), *out.rglob("*.ckpt")]:
        try:
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001 (whatever the reader meets in a broken file)
            yield f"{path}: {error}"


def differences(straight: Path, out: Path) -> Iterator[str]:
    """What differs between two runs that should be equal."""
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, out))
    averages = [end["callbacks"].get("AdapterEma") for end in (one, two)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        if not equal(one[part], two[part]):
            yield f"{part} of the last checkpoint differ"
    if not equal(*averages):
        yield "averages of the adapter in the last checkpoint differ"
    for pattern in ("lora*.safetensors", "lora/*.safetensors", "samples/*/*"):
        files = [{str(path.relative_to(run)) for path in run.glob(pattern)} for run in (straight, out)]
        if files[0] - files[1]:
            yield f"{', '.join(sorted(files[0] - files[1]))} missing"
        for name in sorted(files[0] & files[1]):
            a, b = straight / name, out / name
            same = equal(load_file(a), load_file(b)) if a.suffix == ".safetensors" else a.read_bytes() == b.read_bytes()
            if not same:
                yield f"{name} differs"
    one, two = validations(straight), validations(out)
    wrong = sorted(step for step in one.keys() | two.keys() if one.get(step) != two.get(step))
    if wrong:
        pairs = ", ".join(f"step {step}: {one.get(step)} and {two.get(step)}" for step in wrong)
        yield f"validations differ: {pairs}"


def validations(out: Path) -> dict[int, str]:
    """Validation losses by step, over all parts of a run; the first one is of no step."""
    rows = [row for path in sorted(out.glob("csv/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return {int(row["step"]): row["val/loss"] for row in rows if row.get("val/loss") and int(row["step"]) > 0}


def equal(one: Any, two: Any) -> bool:  # noqa: ANN401
    """Whether two nested records are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over all settings")
    parser.add_argument("--chains", type=int, default=2, help="of each setting")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        storm = Storm(Path(temporary), options.seed)
        storm.prepare()
        for number, name in enumerate(SETTINGS):
            straight = storm.folder / f"run{number}"
            seconds = storm.train(name, straight)
            each = -(-options.kills // (len(SETTINGS) * options.chains))
            found = [list(storm.chain(name, straight, each, seconds)) for _ in range(options.chains)]
            found.append(list(storm.epochs(name, epoch_steps(straight))))
            counts[name] = {"kills": each * options.chains, "chains": len(found), "unequal": sum(map(bool, found))}
            print(f"{name}: {counts[name]} ({seconds:.1f} s uninterrupted)", flush=True)
            for problem in (problem for chain in found for problem in chain):
                print(f"  {problem}", flush=True)
    sys.exit(any(count["unequal"] for count in counts.values()))


def epoch_steps(straight: Path) -> int:
    """Optimizer steps of one epoch, from where the run ended."""
    loops = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    place = loops["state_dict"]["combined_loader"][0]
    seen = loops["epoch_loop.batch_progress"]["total"]["ready"]
    batches = (seen - place["position"]) // place["epoch"]
    return round(batches * STEPS / seen)


if __name__ == "__main__":
    main()
