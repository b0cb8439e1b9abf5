"""A newcomer's first hour, typed by a script: from four photos to a LoRA for kohya's tools, with mistakes and a stop.

Usage: ``python demo/newcomer.py [OUT_DIR] [--fresh]``

Prints each command and all that it says, as one would read it, and ends with exit code 1 where something is not as the
pages promise. The commands run in OUT_DIR, which is made anew and holds nothing of the repository. `--fresh` clones the
repository into it and makes a virtual environment of that clone by `make setup`, which takes minutes and a network. The
model is the tiny random one, so what it generates looks like nothing.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = "model=tiny_wan resolution=128"
SMALL = "device=cpu trainer.accelerator=cpu trainer.precision=32-true data.num_workers=0"
STOPPED_AT = 20  # steps, after which Ctrl-C is pressed


class Hour:
    """What is typed in one folder by one Python, and what was not as expected.

    Args:
        folder: Where it is typed.
        python: The interpreter that `python` stands for.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        own = python == sys.executable
        self.environment = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
        self.wrong: list[str] = []

    def type(self, line: str, *, code: int = 0, stop: bool = False) -> str:
        """Type a line and wait for its end.

        Args:
            line: The command.
            code: Its exit code if all is well.
            stop: Whether to press Ctrl-C once some steps are trained.

        Returns:
            All that it said.
        """
        print(f"\n$ {line}", flush=True)
        begun = time.monotonic()
        words = [self.python if word == "python" else word for word in shlex.split(line)]
        process = subprocess.Popen(
            words, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            start_new_session=True, env=self.environment,
        )  # fmt: skip
        assert process.stdout is not None
        said = ""
        for heard in process.stdout:
            print(heard, end="", flush=True)
            said += heard
            step = re.search(r"step (\d+)", heard)
            if stop and step and int(step[1]) >= STOPPED_AT:
                stop = False
                print("^C", flush=True)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all processes of the command
        ended = process.wait()
        print(f"(exit code {ended}, {time.monotonic() - begun:.0f} seconds)", flush=True)
        self.expect(ended == code, f"`{line}` ended with exit code {ended}, not {code}")
        self.expect("Traceback" not in said, f"`{line}` showed a traceback")
        return said

    def expect(self, holds: object, otherwise: str) -> None:
        """Note what is not as the pages promise."""
        if not holds:
            self.wrong.append(otherwise)
            print(f"NOT AS EXPECTED: {otherwise}", flush=True)

    def files(self, *patterns: str) -> None:
        """Files that must be there."""
        for pattern in patterns:
            self.expect(list(self.folder.glob(pattern)), f"{pattern} is not there")


def fresh(folder: Path) -> str:
    """Clone the repository into a folder and set it up; returns its Python."""
    clone = folder / "mpp"
    for line in (["git", "clone", "--quiet", str(REPOSITORY), str(clone)], ["make", "-C", str(clone), "setup"]):
        print(f"$ {shlex.join(line)}", flush=True)
        subprocess.run(line, check=True)
    return str(clone / ".venv" / "bin" / "python")


def spend(hour: Hour, photos: Path) -> None:
    """The hour."""
    hour.type(f"python {shlex.quote(str(photos / 'photos.py'))} photos")
    said = hour.type(f"python -m mpp.init {TINY} steps=60 images=photos masks=auto")
    hour.files("photos.yaml", "masks/photos/*.png")
    (job,) = re.findall(r"python -m mpp\.run (\S+)", said)[-1:]
    for mistake, hint in (
        ("train.steps=80", "its setting is trainer.max_steps"),
        ("optimizer.lrr=1e-3", "did you mean optimizer.lr?"),
    ):
        refused = hour.type(f"python -m mpp.run {job} {mistake}", code=1)
        hour.expect(hint in refused and refused.count("\n") == 1, f"{mistake} was not refused by one line with the way")
    hour.expect(not (hour.folder / "cache").exists(), "a command that was refused had begun")
    said = hour.type(f"python -m mpp.run {job} {SMALL}", code=130, stop=True)
    found = re.findall(r"(python -m mpp\.train resume=\S+)", said)
    hour.expect(found, "no command was said that goes on")
    if found:
        hour.type(found[-1])
    hour.files("outputs/photos/lora.safetensors", "outputs/photos/regions.png", "cache/photos_report.html")
    sizes = "sampling.width=128 sampling.height=128 sampling.steps=4 device=cpu"
    hour.type(f"python -m mpp.sample {job} sampling.prompts='a photo of a cat' {sizes}")
    hour.files("outputs/photos/generated/*.png")
    hour.type(f"python -m mpp.export {job} format=kohya")
    hour.files("outputs/photos/lora_kohya.safetensors")
    shutil.copytree(photos / "masks", hour.folder / "mymasks")
    hour.type(f"python -m mpp.init {TINY} steps=20 images=photos masks=mymasks output=outputs/mine")
    hour.type(f"python -m mpp.run mine.yaml {SMALL}")
    hour.files("outputs/mine/lora.safetensors")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description="Type a newcomer's first commands and print all that they say.")
    parser.add_argument("out_dir", type=Path, nargs="?", default=Path("outputs/newcomer"), help="folder to do it in")
    parser.add_argument("--fresh", action="store_true", help="in a clone and a virtual environment of its own")
    flags = parser.parse_args()
    shutil.rmtree(flags.out_dir, ignore_errors=True)
    flags.out_dir.mkdir(parents=True)
    folder = flags.out_dir.resolve()
    python = fresh(folder) if flags.fresh else sys.executable
    hour = Hour(folder, python)
    spend(hour, (folder / "mpp" if flags.fresh else REPOSITORY) / "demo")
    print(f"\n{len(hour.wrong)} things were not as expected{':' if hour.wrong else ''}", *hour.wrong, sep="\n  ")
    sys.exit(1 if hour.wrong else 0)


if __name__ == "__main__":
    main()
