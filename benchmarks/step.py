"""What a step costs on the CPU: exact counts for every model family, and the time that mpp adds to a bare loop.

    python -m benchmarks.step [--only NAME,...] [--json FILE]   # names of the table's rows, or `overhead`

Counted are floating point operations and the bytes that autograd keeps for the backward pass, of a plain step and of
one with a prior on all of its samples, of all variants in tests/families at tiny size: the same on any machine. The
exit code is 1 where a prior step is not a plain step plus one pass of the base model, to the integer.

The time is that of a WAN of 256 channels and 256 tokens inside the Trainer, against a loop of diffusers, PEFT and torch
alone that does the same work; see `benchmarks/overhead.py`.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

from benchmarks.counting import flops, saved_bytes
from benchmarks.overhead import ROUNDS, measure
from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.memory.settings import Memory
from mpp.models.contract import Architecture
from mpp.training.module import MaskedPriorModule
from mpp.training.step import Position
from tests import helpers
from tests.families import variants
from tests.families.base import Variant, architecture, batch, built

PLAIN = MaskedPriorLoss()
PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
TEXTS = ("a red box", "a cat on a blue chair by the sea")


@dataclass(frozen=True)
class Counts:
    """Of one step on a batch of two, both with something to preserve.

    Attributes:
        variant: Its name.
        checkpointing: Whether activations are recomputed.
        plain: FLOPs of a step without a prior, forward and backward.
        prior: FLOPs of one with a prior.
        teacher: FLOPs of one pass of the base model, without an adapter and without gradients.
        saved_plain: Bytes kept for the backward pass.
        saved_prior: The same with a prior.
        latents: Bytes of the batch's latents.
    """

    variant: str
    checkpointing: bool
    plain: int
    prior: int
    teacher: int
    saved_plain: int
    saved_prior: int
    latents: int

    @property
    def adds_up(self) -> bool:
        """Whether the prior costs one pass of the base model, to the integer."""
        return self.prior == self.plain + self.teacher

    @property
    def ratio(self) -> float:
        """FLOPs of a prior step over those of a plain one."""
        return self.prior / self.plain

    @property
    def more_saved(self) -> float:
        """What a prior keeps besides, in multiples of the batch's latents."""
        return (self.saved_prior - self.saved_plain) / self.latents


def counts(variant: Variant, folder: Path, *, checkpointing: bool) -> Counts:
    """Count a variant whose tiny pipeline lies in a folder."""
    arch = architecture(variant, folder)
    data = batch(arch, variant, arch.load_encoders("cpu"), TEXTS)
    memory = Memory(activations="checkpoint" if checkpointing else "keep")
    plain, prior = (helpers.module(arch, loss, memory=memory) for loss in (PLAIN, PRIOR))
    for module in (plain, prior):
        module.transformer.train()
    return Counts(
        variant.name,
        checkpointing,
        flops(lambda: loss(plain, data).backward()),
        flops(lambda: loss(prior, data).backward()),
        flops(lambda: base(arch, prior, data)),
        saved_bytes(lambda: loss(plain, data), plain.transformer),
        saved_bytes(lambda: loss(prior, data), prior.transformer),
        data.latents.nbytes,
    )


def loss(module: MaskedPriorModule, data: Batch) -> Tensor:
    """The loss of a batch, as training has it."""
    return helpers.loss_of(module, data)


@torch.no_grad()
def base(arch: Architecture, module: MaskedPriorModule, data: Batch) -> Tensor:
    """What the base model, which never had an adapter, predicts for the step's noisy latents."""
    noisy = module.step.corrupt(data, Position(module.seed, 0))
    return arch.velocity(arch.load_transformer(), noisy.latents, noisy.sigma, data.conditioning)


def all_counts(names: list[str]) -> Iterator[Counts]:
    """Of the variants named, or of all, without and with checkpointing."""
    with tempfile.TemporaryDirectory() as root:
        for variant in variants():
            if not names or variant.name in names:
                folder = built(variant, Path(root))
                for checkpointing in (False, True):
                    yield counts(variant, folder, checkpointing=checkpointing)


HEADER = f"{'variant':34s} {'ckpt':>4s} {'plain MF':>9s} {'teacher MF':>10s} {'prior/plain':>11s} {'saved MB':>8s} more"


def line(found: Counts) -> str:
    """One line of the table."""
    said = "" if found.adds_up else f"  NOT EQUAL: {found.prior} is not {found.plain} + {found.teacher}"
    return (
        f"{found.variant:34s} {'yes' if found.checkpointing else 'no':>4s} {found.plain / 1e6:9.1f} "
        f"{found.teacher / 1e6:10.1f} {found.ratio:11.4f} {found.saved_plain / 1e6:8.2f} "
        f"+{found.more_saved:.2f} latents{said}"
    )


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of variants, or `overhead`, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of the timing, 9 or more")
    parser.add_argument("--json", type=Path, help="write one JSON line for each row to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    for name in ("mpp", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    names = [name for name in arguments.only.split(",") if name]
    unknown = set(names) - {variant.name for variant in variants()} - {"overhead"}
    if unknown:
        parser.error(f"--only={arguments.only}: there is no row {sorted(unknown)[0]!r}")
    rows, good = [], True
    print(HEADER)
    for found in all_counts([name for name in names if name != "overhead"]) if names != ["overhead"] else ():
        print(line(found), flush=True)
        rows.append({"row": "counts", **asdict(found), "adds_up": found.adds_up})
        good &= found.adds_up
    if not names or "overhead" in names:
        for measured in measure(arguments.rounds):
            print(measured)
            rows.append({"row": "overhead", **measured.record()})
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
