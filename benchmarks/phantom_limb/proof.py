"""The comparisons: `python -m benchmarks.phantom_limb.proof [--study NAME] [--full]`, or `make proof`.

Makes the fine-tune sets, trains every variant of the protocol with every seed through `mpp.train`, measures, and
writes STUDY.json (every run), STUDY.md and STUDY.png into `--out`. Interrupted, it goes on.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.phantom_limb.fine_tune_sets import NOISE_SEEDS, make_data, prompts_of
from benchmarks.phantom_limb.sampling import grid
from benchmarks.phantom_limb.study import (
    BASE,
    KEPT,
    Job,
    damage,
    fingerprint,
    generated,
    jobs,
    protocol,
    result,
    run,
)
from benchmarks.phantom_limb.world import SUBJECTS
from mpp import __version__
from mpp.files import write_atomically, write_json

Row = dict[str, float | str]
COLUMNS = {  # measure: (heading, digits)
    "success": ("subject", 2),
    "held_out_error": ("in-mask error", 3),
    "held_out_error_low": ("at low noise", 3),
    "alone_error": ("alone", 3),
    "phantom": ("phantom px", 4),
    "bystander": ("bystander", 2),
    "ground": ("checkers", 2),
    "background": ("background", 4),
    "rim": ("rim", 4),
    "held_out_drift": ("drift", 3),
    "other_distance": ("others", 3),
    "other_malformed": ("malformed", 2),
    "area": ("area", 2),
    "seconds": ("s", 0),
}
ERRORS = ("held_out_error", "held_out_error_low", "alone_error")
FONT, HEAD, MARGIN = 13, 52, 140  # pixels: of letters, names above and prompts beside the images
LETTERS = 15  # in a line of a name
PLAIN_NAMES = {  # what the images call a variant
    "base": "base model",
    "no_mask": "no mask",
    "masked": "its mask alone",
    "masked_longer": "its mask alone, 1.4x the steps",
    "masked_floor": "its mask, with a floor of 0.05",
    "threshold_w0.5": "the prior, weight 0.5",
    "threshold_w1": "the prior, weight 1",
    "threshold_w1_longer": "the prior, 1.4x the steps",
    "threshold_w2": "the prior, weight 2",
    "threshold_w4": "the prior, weight 4",
    "threshold_above_tier_w1": "the prior, on all grey too",
    "continuous_w0.5": "continuous prior, weight 0.5",
    "continuous_w1": "continuous prior, weight 1",
    "continuous_w2": "continuous prior, weight 2",
    "continuous_w4": "continuous prior, weight 4",
    "class_word_25": "prior, a quarter under the class word",
    "class_word_50": "prior, a half under the class word",
    "empty_25": "prior, a quarter without caption",
    "pictures_25": "prior, a quarter other images",
    "pictures_25_longer": "the same, 1.33x the steps",
    "paste": "cut and pasted",
    "paste_unjudged": "cut and pasted, shorter captions",
    "paste_prior": "cut and pasted, and the prior",
    "paste_prior_pictures_25": "pasted, prior, a quarter other images",
}
STUDIES = ("main", "weights", "tiers", "preservation", "paste")


def data(args: tuple[Path, str, Path, Mapping[str, float]]) -> None:
    """One fine-tune set in a process of its own."""
    root, name, base, halo = args
    torch.set_num_threads(1)
    rules = protocol()
    recorded, source = root / name / "made_from", fingerprint(base, rules, name, halo, NOISE_SEEDS)
    if not recorded.is_file() or recorded.read_text() != source:
        shutil.rmtree(root / name, ignore_errors=True)
        make_data(root / name, name, base, rules, halo)
        recorded.write_text(source)


def run_all(found: Sequence[Job], base: Path, root: Path, out: Path, workers: int) -> list[Row]:
    """Results of all jobs, in their order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run, job, base, root, out): job for job in found}
        for number, done in enumerate(as_completed(waiting), 1):
            print(f"{number}/{len(found)} {done.result().stem}", flush=True)
    return [json.loads(result(out, job).read_text()) for job in found]


def base_rows(root: Path) -> list[Row]:
    """What the base itself scores, for each fine-tune set: the floor of every measure of images."""
    rules, rows = protocol(), []
    for name in rules.subjects:
        images = {kind: torch.load(root / name / f"base_{kind}.pt") for kind in ("subject", "others")}
        values = generated(images["subject"], images["subject"], SUBJECTS[name], name, rules)
        others = prompts_of(name, rules)["others"]
        values |= damage(images["others"], images["others"], others, SUBJECTS[name])
        rows.append({"variant": "base", "subject": name, "seed": 0, **values})
    return rows


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, int]] = COLUMNS) -> str:
    """Mean and standard deviation over runs by variant, as Markdown."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [
        "| variant | runs | " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        cells = [_cell([row[key] for row in own if key in row], digits) for key, (_, digits) in columns.items()]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 or digits == 0 else f"{mean}±{statistics.stdev(values):.{digits}f}"


def mean(rows: Sequence[Row], variant: str, key: str) -> float:
    """Mean of one measure over a variant's runs."""
    return statistics.fmean(row[key] for row in rows if row["variant"] == variant)


def against(rows: Sequence[Row], reference: str) -> str:
    """Every variant against one of them, the ratios that the claims are about, as Markdown."""
    lines = [
        f"| {reference}'s over the variant's | phantom px | background | drift | others | subject, points "
        "| in-mask error | at low noise | alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        if name in ("base", reference):
            continue
        lower = [
            mean(rows, reference, key) / max(mean(rows, name, key), 1e-9)
            for key in ("phantom", "background", "held_out_drift", "other_distance")
        ]
        points = 100 * (mean(rows, name, "success") - mean(rows, reference, "success"))
        errors = [100 * (mean(rows, name, key) / mean(rows, reference, key) - 1) for key in ERRORS]
        cells = [f"{value:.1f}x" for value in lower] + [f"{points:+.1f}"] + [f"{e:+.1f} %" for e in errors]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def side_by_side(columns: Mapping[str, Tensor], prompts: Mapping[str, Sequence[str]], rows: int = 6) -> Image.Image:
    """Images of several models with their names above and prompts beside: each row one noise and one prompt.

    Args:
        columns: By name as in the protocol, `KEPT` images with the trigger word and as many without.
        prompts: What they were generated from, as `prompts_of` gives it.
        rows: How many, the last two without the word.
    """
    chosen = [*range(rows - 2), KEPT, KEPT + 1]
    sheet = grid(torch.stack([column[chosen] for column in columns.values()], 1).flatten(0, 1), len(columns), 4)
    font, height, width = ImageFont.load_default(FONT), sheet.height // rows, sheet.width // len(columns)
    head = Image.new("RGB", (MARGIN + sheet.width, HEAD + sheet.height), "white")
    head.paste(sheet, (MARGIN, HEAD))
    draw = ImageDraw.Draw(head)
    for number, name in enumerate(columns):
        middle = (MARGIN + (number + 0.5) * width, HEAD / 2)
        draw.text(middle, textwrap.fill(PLAIN_NAMES[name], LETTERS), "black", font, anchor="mm", align="center")
    spoken = [*prompts["subject"][:KEPT], *prompts["others"][:KEPT]]
    for number, index in enumerate(chosen):
        left = (FONT // 2, HEAD + (number + 0.5) * height)
        draw.text(left, textwrap.fill(spoken[index], 18), "black", font, anchor="lm")
    return head


def kept(folder: Path, root: Path, subject: str, variants: Iterable[str]) -> dict[str, Tensor]:
    """The images that the base and the first seed of each variant left."""
    found = {
        "base": torch.cat([torch.load(root / subject / f"base_{kind}.pt")[:KEPT] for kind in ("subject", "others")])
    }
    for variant in variants:
        found[variant] = torch.load(folder / "training" / f"{variant}-{subject}-0" / "kept.pt").float() / 255
    return found


def study(name: str, args: argparse.Namespace) -> None:
    """Run one study of the protocol, and write its results."""
    rules, started = protocol(), time.time()
    part = rules[name]
    folder = (args.work / part.get("folder", name)).resolve()
    base, root = args.base.resolve(), folder / "data"
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(data, [(root, subject, base, dict(part.halo)) for subject in rules.subjects]))
    found = jobs(rules, root, part.variants, rules.full_seeds if args.full else rules.seeds)
    fresh = sum(not result(folder, job).is_file() for job in found)
    rows = [*base_rows(root), *run_all(found, base, root, folder, args.workers)]
    minutes = math.ceil((time.time() - started) / 60)
    text = table(rows) + "\n" + against(rows, part.reference)
    print(f"\n{text}\n{name}: {fresh} of {len(found)} runs made in {minutes} minutes", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    made_with = {"mpp": __version__, "torch": torch.__version__}
    write_json(args.out / f"{name}.json", {"minutes": minutes, "fresh_runs": fresh, **made_with, "runs": rows})
    write_atomically(args.out / f"{name}.md", lambda path: path.write_text(text))
    shown = kept(folder, root, rules.subjects[0], part.get("shown", part.variants))
    side_by_side(shown, prompts_of(rules.subjects[0], rules)).save(args.out / f"{name}.png")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="main")
    parser.add_argument("--full", action="store_true", help="every study, with twice the seeds")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--work", type=Path, default=Path("outputs/proof"), help="folder for data and runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/proof/results"), help="tables and images")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for name in STUDIES if args.full else (args.study,):
        study(name, args)


if __name__ == "__main__":
    main()
