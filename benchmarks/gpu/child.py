"""One row in a process of its own: `python -m benchmarks.gpu.child ROW ANSWER [--tiny]`."""

import argparse
import json
import logging
import traceback
from pathlib import Path

import torch

from benchmarks.gpu import measure, streams, training
from benchmarks.gpu.case import GIB, Case, Found
from benchmarks.gpu.rows import ROWS

KINDS = {
    "environment": measure.environment,
    "correct": measure.correct,
    "gradients": measure.gradients,
    "syncs": measure.syncs,
    "time": measure.timing,
    "train": training.train,
    "memory": measure.memory,
    "compile": measure.compiled,
    "stream": streams.streams,
    "fits": streams.fits,
}


def answer(name: str, *, tiny: bool) -> Found:
    """What a row's line says: `status` is `ok`, `wrong` (a check failed), `does not fit` or `failed`."""
    (row,) = (row for row in ROWS if row.name == name)
    case = Case(row, "cuda" if torch.cuda.is_available() else "cpu", tiny)
    try:
        found = KINDS[row.kind](case)
    except torch.OutOfMemoryError:
        return {"status": "does not fit", "peak_gib": torch.cuda.max_memory_allocated() / GIB}
    except Exception as error:  # noqa: BLE001 (the other rows go on; the log has the traceback)
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return {"status": "ok" if found.get("good", True) else "wrong", **found}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("answer", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    arguments.answer.write_text(json.dumps(answer(arguments.row, tiny=arguments.tiny)))


if __name__ == "__main__":
    main()
