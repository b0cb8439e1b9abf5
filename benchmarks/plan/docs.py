"""The tables of docs/memory.md, counted at the shapes of published models."""

import re
from collections.abc import Iterator
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
from mpp.training.costs import Costing, Costs
from mpp.training.measuring import Run
from mpp.training.planning import CARDS, fits

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


def rows() -> Iterator[str]:
    """Lines of the table in Markdown; two processes count."""
    yield "| model | samples | " + " | ".join(" ".join(way) for way in WAYS) + " | step with the prior |"
    yield "|---|---|" + "---|" * (len(WAYS) + 1)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for row in pool.map(_row, *zip(*SHAPES, strict=True)):
            print(row, flush=True)
            yield row


def _row(config: str, name: str, width: int, height: int, frames: int) -> str:
    torch.set_num_threads(1)
    architecture = build(compose("plan", [f"model={config}", "plan.size=64x64"]).model)
    shape = architecture.latents.shape(frames, height, width)
    run = Run(architecture, Adapter(), Memory(), _PRIOR, torch.optim.AdamW)
    counting = {base: Costing(replace(run, memory=Memory(base=base))) for base in dict(WAYS)}
    found = [counting[base].with_activations(activations).count(shape) for base, activations in WAYS]
    prior = f"{1 + found[0].prior / found[0].plain:.2f} x"
    clip = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    return f"| {name} | {clip} | " + " | ".join(map(_cell, found)) + f" | {prior} |"


def _cell(costs: Costs) -> str:
    card = next((card for card in CARDS if fits(costs, card)), None)
    return f"{costs.peak / _GIB:.1f}: " + ("none" if card is None else f"{card} GB")


def write_docs() -> None:
    """Put the table between its marks, row by row."""
    done = []
    for row in rows():
        table = "\n".join([*done, row])
        done.append(row)
        text = re.sub(
            r"(<!-- counted: .*?-->\n).*?(<!-- end of what was counted -->)",
            lambda at, table=table: f"{at[1]}\n{table}\n\n{at[2]}",
            PAGE.read_text("utf-8"),
            flags=re.DOTALL,
        )
        write_atomically(PAGE, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
