"""What an answer costs: CPU seconds and imported modules of each command's help, configuration and misspelt setting.

    python -m benchmarks.start [--repeat 3]

The least of the repetitions counts, as others share the machine.
"""

import argparse
import json
import subprocess
import sys

COMMANDS = {  # a misspelt setting of each
    "train": ["model=toy", "optimizer.lrr=1"],
    "prepare": ["data.clips.fsp=24"],
    "sample": ["sampling.promts=x"],
    "export": ["export.fromat=kohya"],
    "report": ["loss.prior_wieght=1"],
    "masks": ["tool=invert", "tool.sigma=3"],
}
CODE = """
import atexit, json, os, runpy, sys
def say():
    spent = os.times()
    sys.stderr.write("\\n" + json.dumps([spent.user + spent.system, len(sys.modules), "torch" in sys.modules]))
atexit.register(say)
del sys.argv[0]
runpy.run_module(f"mpp.{sys.argv[0]}", run_name="__main__", alter_sys=True)
"""


def measure(command: str, words: list[str]) -> tuple[float, int, bool]:
    """CPU seconds, imported modules, and whether torch is one of them."""
    done = subprocess.run([sys.executable, "-c", CODE, command, *words], capture_output=True, text=True, check=False)
    return tuple(json.loads(done.stderr.splitlines()[-1]))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    for command, misspelt in COMMANDS.items():
        needed = ["tool=invert"] if command == "masks" else ["output_dir=o"] if command in ("train", "sample") else []
        for words in (["--help"], ["--cfg", "job", *needed], misspelt):
            seconds, modules, torch = min(measure(command, words) for _ in range(repeat))
            print(f"{seconds:5.2f} s {modules:5d} modules{', torch' * torch}  mpp.{command} {' '.join(words)}")


if __name__ == "__main__":
    main()
