"""What training takes on a GPU: whether it is right there, and seconds and memory of a step, in half an hour.

    python -m benchmarks.gpu [--minutes 30] [--only ROW,...] [--out FOLDER] [--write-docs]
    python -m benchmarks.gpu --tiny      # the same at tiny sizes, to try the kit without a GPU

Nothing is downloaded: WAN at the shapes of 1.3B and 14B and Qwen-Image have random weights. Each row is measured by a
process of its own, which may fail, hang or run out of memory without the others; this one never touches the GPU. FOLDER
gets `rows.jsonl`, one line of JSON as each row comes, and what the processes said in `logs/`. Rows that no longer fit
the time are left out and said; some of blocks that wait in the CPU's memory come with `--only stream` alone. The exit
code is 1 where a check failed or a row broke.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import page, table
from benchmarks.gpu.rows import Row, chosen, obstacle

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measurements.md"
BROKEN = ("wrong", "failed", "timed out", "died")


def measure(row: Row, out: Path, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """A row's line by a process of its own.

    Args:
        row: Which.
        out: Where its log goes.
        seconds: After which it is stopped.
        tiny: Whether models and latents are tiny.
    """
    answer, log = out / "logs" / f"{row.name}.json", out / "logs" / f"{row.name}.txt"
    answer.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.gpu.child", row.name, str(answer.resolve()), *(["--tiny"] * tiny)]
    start = time.monotonic()
    with log.open("w") as said:
        child = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": "timed out", "reason": f"after {seconds:.0f} s; see {log}"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the workers that it may have left
            child.wait()
    if child.returncode or not answer.is_file():
        return {"status": "died", "reason": f"exit code {child.returncode}; see {log}"}
    found = json.loads(answer.read_text())
    answer.unlink()
    return {"status": found.pop("status"), "seconds": time.monotonic() - start, **found}


def commit() -> str:
    """Of the working tree, and whether it was changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" (changed)" if git("status", "--short") else "")


def run(rows: Sequence[Row], out: Path, seconds: float, *, tiny: bool) -> list[dict[str, Any]]:
    """Measure rows one after the other; each line goes to `out/rows.jsonl` and the terminal as it comes.

    Args:
        rows: Which, the environment's first.
        out: The folder.
        seconds: That all of it may take.
        tiny: Whether models and latents are tiny.
    """
    end, cuda, found = time.monotonic() + seconds, False, []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows.jsonl").open("w") as lines:
        for row in rows:
            why = obstacle(row, end - time.monotonic(), cuda=cuda, tiny=tiny)
            result = {"status": why} if why else measure(row, out, row.seconds, tiny=tiny)
            about = {
                name: value
                for name, value in asdict(row).items()
                if name in ("kind", "size", "shape", "base", "activations")
            }
            result = {"row": row.name, **about, "tiny": tiny, **result}
            if row.kind == "environment":
                cuda = bool(result.get("cuda"))
                command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
                date = datetime.now(UTC).strftime("%Y-%m-%d")
                result |= {"date": date, "commit": commit(), "command": command}
            found.append(result)
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            print(f"{len(found)}/{len(rows)} {row.name}: {result['status']}", flush=True)
    return found


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="that all rows together may take (30)")
    parser.add_argument("--only", default="", help="names or kinds of rows, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for the results (outputs/gpu)")
    parser.add_argument("--write-docs", action="store_true", help="write docs/measurements.md from the results")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.write_docs:
        parser.error("--write-docs does not go with --tiny, whose numbers say nothing about real models")
    try:
        rows = chosen([word for word in arguments.only.split(",") if word])
    except ValueError as error:
        parser.error(str(error))
    found = run(rows, arguments.out, 60 * arguments.minutes, tiny=arguments.tiny)
    print("\n" + table(found))
    if arguments.write_docs:
        try:
            PAGE.write_text(page(found))
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"written: {PAGE}")
    sys.exit(any(row["status"] in BROKEN for row in found))


if __name__ == "__main__":
    main()
