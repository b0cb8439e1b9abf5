"""The rows as a table on the terminal, and as docs/measurements.md."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

_ASIDE = ("row", "kind", "status", "seconds", "good", "reason", "size", "shape", "base", "activations", "tiny")
_COLUMNS = {  # of the page, by kind: heading and field
    "time": {
        "plain, s": "plain_s",
        "prior / plain": "prior_ratio",
        "by FLOPs": "prior_flops",
        "time over FLOPs": "over_flops",
        "half of the samples / plain": "half_ratio",
        "by FLOPs ": "half_flops",
        "plain again / plain": "control",
        "verdict": "verdict",
        "attention": "attention",
    },
    "memory": {
        "base": "base",
        "activations": "activations",
        "resident, GiB": "resident_gib",
        "peak plain, GiB": "plain_peak_gib",
        "peak prior, GiB": "prior_peak_gib",
        "reserved, GiB": "reserved_gib",
        "plain, s": "plain_s",
        "prior, s": "prior_s",
    },
    "stream": {
        "base": "base",
        "resident blocks": "resident",
        "counted, GiB": "forecast_gib",
        "GB/s": "gb_per_s",
        **{
            f"{teacher}{heading}": f"{teacher}_{field}"
            for teacher in ("apart", "lockstep")
            for heading, field in {
                ", s": "s",
                " peak, GiB": "peak_gib",
                " loads of a block": "loads",
                " arithmetic alone, s": "compute_s",
                " copies alone, s": "transfer_s",
                " overlap": "overlap",
            }.items()
        },
    },
    "fits": {
        "card, GiB": "card",
        "base": "base",
        "activations": "activations",
        "resident blocks": "resident",
        "counted, GiB": "forecast_gib",
        "peak plain, GiB": "plain_peak_gib",
        "peak prior, GiB": "prior_peak_gib",
        "reserved, GiB": "reserved_gib",
        "plain, s": "plain_s",
        "prior, s": "prior_s",
    },
}
_TITLES = {
    "correct": "Teacher and student on the device",
    "gradients": "Gradients through quantised layers",
    "syncs": "Waits for the device in a step",
    "time": "Time of a step of two samples",
    "compile": "Compiled blocks",
    "stream": "Blocks that wait in the CPU's memory",
    "fits": "Steps in the memory of smaller cards",
    "memory": "Memory and time of a step of one sample",
    "train": "A run of mpp.train",
}


def shown(value: object) -> str:
    """A field's value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(row: Line) -> str:
    """One line of the terminal's table."""
    found = row.get("reason") or ", ".join(f"{name} {shown(v)}" for name, v in row.items() if name not in _ASIDE)
    seconds = f"{row['seconds']:5.0f} s" if "seconds" in row else " " * 7
    return f"{row['row']:26s} {seconds}  {row['status']:12s} {found}".rstrip()


def table(rows: Sequence[Line]) -> str:
    """All rows, and how many there are of each status."""
    states = [str(row["status"]).partition(":")[0] for row in rows]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    tiny = ["tiny sizes: the numbers say nothing about the models of the rows' names"] * any(
        r.get("tiny") for r in rows
    )
    return "\n".join([*map(line, rows), counted, *tiny])


def page(rows: Sequence[Line]) -> str:
    """docs/measurements.md.

    Raises:
        ValueError: The rows were not measured on a GPU, or at tiny sizes.
    """
    (where,) = (row for row in rows if row["kind"] == "environment")
    if not where.get("cuda") or where.get("tiny"):
        raise ValueError("--write-docs: what was measured without a GPU, or with --tiny, does not go into the docs")
    parts = [
        "# Measurements on a GPU",
        f"Written by `{where['command']}` on {where['date']} at commit {where['commit']}: {where['card']} with "
        f"{where['memory_gib']:.0f} GiB, driver {where['driver']}, torch {where['torch']}, Python {where['python']}. "
        f"Attention in bfloat16: {where['attention']}. Models at their real shapes with random weights, LoRA of rank "
        "16 on all layers, text of 512 tokens (Qwen-Image: 1024), AdamW, bf16-mixed, activations recomputed. `image` "
        "is one frame of 832 x 480 pixels, `480p49` and `480p81` 49 and 81 of them, `720p81` 81 of 1280 x 720, `1024` "
        "an image of 1024 x 1024. A ratio is inconclusive where equal steps differ by more than 3 %. An overlap of 1 "
        "hides the shorter of copies and arithmetic wholly behind the other.",
    ]
    for kind, title in _TITLES.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            parts += [f"## {title}", _section(kind, of_kind)]
    return "\n\n".join(parts) + "\n"


def _section(kind: str, rows: Sequence[Line]) -> str:
    measured = [row for row in rows if row["status"] in ("ok", "wrong")]
    names = dict.fromkeys(name for row in measured for name in row if name not in _ASIDE)
    columns = _COLUMNS.get(kind) or {name.replace("_", " "): name for name in names}
    lines = ["| row | " + " | ".join(name.strip() for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in measured:
        name = row["row"] + (" (WRONG)" if row["status"] == "wrong" else "")
        lines.append(f"| {name} | " + " | ".join(shown(row.get(field, "")) for field in columns.values()) + " |")
    left = [f"{row['row']}: {row.get('reason') or row['status']}" for row in rows if row not in measured]
    return "\n".join([*(lines if measured else ()), *(("", *left) if measured and left else left)])
