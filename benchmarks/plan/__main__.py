"""Whether what `mpp.plan` counts is what there is.

    python -m benchmarks.plan predict      # 20 drawn tiny runs, counted without weights: predicted.json
    python -m benchmarks.plan measure      # real steps of the same runs on the CPU: measured.json, and how far it was
    python -m benchmarks.plan write-docs   # the table of docs/memory.md, from the shapes of published models

Predictions are committed before they are measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.plan.cases import Case, compared, drawn, measured, predicted
from benchmarks.plan.docs import write_docs
from mpp.files import write_atomically

FOLDER = Path(__file__).parent


def case_of(values: dict[str, Any]) -> Case:
    """The case that a prediction is of."""
    return Case(**values["case"])


def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    write_atomically(FOLDER / name, lambda temporary: temporary.write_text(text, "utf-8"))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["predict", "measure", "write-docs"])
    action = parser.parse_args().action
    if action == "write-docs":
        write_docs()
        return
    with TemporaryDirectory() as folder:
        if action == "predict":
            write("predicted.json", [predicted(case, Path(folder)) for case in drawn()])
            return
        counted = json.loads((FOLDER / "predicted.json").read_bytes())
        found = [measured(case_of(values), Path(folder)) for values in counted]
    write("measured.json", found)
    for before, after in zip(counted, found, strict=True):
        exact, ratio = compared(before, after)
        print(f"{before['case']['variant']:<40} {'exact' if exact else 'DIFFERS':<8} peak {ratio:.4f}")


if __name__ == "__main__":
    main()
