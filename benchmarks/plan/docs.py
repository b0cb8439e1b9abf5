"""The tables of docs/memory.md, counted at the shapes of published models."""

import functools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from mpp.config import build, compose
from mpp.core.loss import MaskedPriorLoss
from mpp.files import write_atomically
from mpp.lora.adapters import Adapter
from mpp.memory.settings import Memory
from mpp.training.choosing import fastest
from mpp.training.costs import Costing
from mpp.training.measuring import Run
from mpp.training.planning import CARDS, Choice, fits

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPES = (  # model config, its name, width, height, frames
    ("wan", "WAN 1.3B", 832, 480, 1),
    ("wan", "WAN 1.3B", 832, 480, 81),
    ("wan22_5b", "WAN 2.2 5B", 1280, 704, 1),
    ("wan22_5b", "WAN 2.2 5B", 1280, 704, 121),
    ("wan_14b", "WAN 14B", 832, 480, 1),
    ("wan_14b", "WAN 14B", 832, 480, 81),
    ("wan_14b", "WAN 14B", 1280, 720, 81),
    ("hunyuan_video", "HunyuanVideo", 960, 544, 1),
    ("hunyuan_video", "HunyuanVideo", 960, 544, 129),
    ("hunyuan_video15", "HunyuanVideo 1.5", 848, 480, 121),
    ("flux2", "FLUX.2 dev", 1024, 1024, 1),
    ("qwen_image", "Qwen-Image", 1024, 1024, 1),
    ("z_image", "Z-Image", 1024, 1024, 1),
)
WAYS = (("bf16", "checkpoint"), ("fp8", "checkpoint"), ("fp8", "offload"), ("nf4", "offload"))
_GIB = 2**30
_PRIOR = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1)


def rows() -> Iterator[tuple[str, str]]:
    """Lines of both tables in Markdown; two processes count."""
    ways = " | ".join(" ".join(way) for way in WAYS)
    cards = " | ".join(f"{card} GB" for card in CARDS)
    yield f"| model | samples | {ways} | step with the prior |", f"| model | samples | {cards} |"
    yield "|---|---|" + "---|" * (len(WAYS) + 1), "|---|---|" + "---|" * len(CARDS)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for row in pool.map(_row, *zip(*SHAPES, strict=True)):
            print(*row, sep="\n", flush=True)
            yield row


def _row(config: str, name: str, width: int, height: int, frames: int) -> tuple[str, str]:
    torch.set_num_threads(1)
    architecture = build(compose("plan", [f"model={config}", "plan.size=64x64"]).model)
    shape = architecture.latents.shape(frames, height, width)
    run = Run(architecture, Adapter(), Memory(), _PRIOR, torch.optim.AdamW)
    counting = {base: Costing(replace(run, memory=Memory(base=base))) for base in dict(WAYS)}

    @functools.cache
    def counted(memory: Memory) -> Choice:
        each = counting[memory.base]
        return Choice(memory, each.with_memory(memory).count(shape), each.weights)

    found = [counted(replace(Memory(base=b).settled, activations=activations)) for b, activations in WAYS]
    prior = f"{1 + found[0].costs.prior / found[0].costs.plain:.2f} x"
    clip = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    taken, chosen = map(_cell, found), (_chosen(counted, card) for card in CARDS)
    return f"| {name} | {clip} | {' | '.join(taken)} | {prior} |", f"| {name} | {clip} | {' | '.join(chosen)} |"


def _cell(choice: Choice) -> str:
    """Peaks with all blocks on the card and with two, and the least cards."""
    ways = (choice, choice.least)
    cards = (next((str(card) for card in CARDS if fits(way.costs, card)), "none") for way in ways)
    return f"{' / '.join(f'{way.costs.peak / _GIB:.1f}' for way in ways)}: {' / '.join(cards)}"


def _chosen(counted: Callable[[Memory], Choice], card: int) -> str:
    """What `memory=auto` takes on a card, with the first base that it fits with."""
    for base in dict(WAYS):
        found = fastest(Memory(base=base), lambda memory: counted(replace(memory, card=None)), card * _GIB)
        if found.fits:
            memory, blocks = found.choice.memory, found.choice.weights.count
            there = "" if memory.resident == "all" else f", {memory.resident} of {blocks}"
            return f"{base} {memory.activations}{there}"
    return "-"


def write_docs() -> None:
    """Put the tables between their marks, row by row."""
    done: list[tuple[str, str]] = []
    for row in rows():
        done.append(row)
        text = PAGE.read_text("utf-8")
        for number, mark in enumerate(("counted", "chosen")):
            table = "\n".join(lines[number] for lines in done)
            text = re.sub(
                rf"(<!-- {mark}: .*?-->\n).*?(<!-- end of what was {mark} -->)",
                lambda at, table=table: f"{at[1]}\n{table}\n\n{at[2]}",
                text,
                flags=re.DOTALL,
            )
        write_atomically(PAGE, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
