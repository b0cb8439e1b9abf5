"""Drawn runs of tiny variants: what is counted for them without weights, and what a real step takes."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter, inject
from mpp.lora.stack import load_base
from mpp.memory.counting import Meter, bytes_of
from mpp.memory.link import layout_bytes
from mpp.memory.settings import Memory
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Architecture, draw_sigma
from mpp.models.experts import expert_numbers, parts_of
from mpp.training.costs import Costing, Costs
from mpp.training.measuring import Elsewhere, Run
from mpp.training.passes import passes_of
from mpp.training.step import MaskedPriorStep, Position
from mpp.training.teacher import Teacher
from tests.families import variants
from tests.families.base import architecture, built

SEED, CASES = 20, 20
EXACT = ("base", "adapter", "optimizer", "gradients")


@dataclass(frozen=True)
class Case:
    """One drawn run, by plain values."""

    variant: str
    height: int
    width: int
    batch: int
    rank: int
    base: str
    activations: str
    precision: str
    prior: bool


def drawn() -> Iterator[Case]:
    """The cases: variants without repetition, all else at random."""
    random_ = random.Random(SEED)
    for variant in random_.sample(sorted(variant.name for variant in variants()), CASES):
        half = random_.random() < 0.7
        yield Case(
            variant,
            random_.randint(3, 8),
            random_.randint(3, 8),
            random_.randint(1, 3),
            random_.choice([2, 4, 16]),
            random_.choice(["bf16", "fp8", "int8", "nf4"]),
            random_.choice(["keep", "checkpoint", "offload"]),
            "bf16-mixed" if half else "32-true",
            random_.random() < 0.5,
        )


def run_of(case: Case, root: Path) -> tuple[Run, tuple[int, ...]]:
    """The run of a case, and its latent shape; the tiny pipeline is made below `root`."""
    variant = next(variant for variant in variants() if variant.name == case.variant)
    dtype = "bfloat16" if case.precision == "bf16-mixed" else "float32"
    arch = architecture(variant, built(variant, root), f"model.dtype={dtype}")
    loss = MaskedPriorLoss(1.0, 0.1, normalization="per_sample") if case.prior else MaskedPriorLoss()
    memory = Memory(base=case.base, activations=case.activations).settled
    run = Run(arch, Adapter(rank=case.rank), memory, loss, torch.optim.AdamW, case.precision)
    step = arch.latents.pixel_step
    return run, arch.latents.shape(variant.frames, case.height * step, case.width * step)


def predicted(case: Case, root: Path) -> dict[str, Any]:
    """What is counted for a case, from its configuration alone."""
    run, shape = run_of(case, root)
    return {"case": asdict(case), "bytes": _named(Costing(run).count(shape, case.batch))}


def measured(case: Case, root: Path) -> dict[str, Any]:
    """What a real step of real weights takes on the CPU, optimizer included."""
    run, shape = run_of(case, root)
    arch = run.architecture
    transformer = load_base(arch, case.base)
    inject(transformer, run.adapter, arch.lora_targets, seed=0)
    if run.memory.recomputes:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    config = next(part.config for _, part in parts_of(transformer))
    conditioning = arch.collate([arch.blank(config, shape)] * case.batch)
    meter = Meter()
    frozen = [_frozen(part) for _, part in parts_of(transformer)]
    meter.known([tensor for tensors in (*frozen, trained) for tensor in tensors])
    meter.known(conditioning.tensors().values())
    passes = passes_of(arch, transformer, Teacher(), run.memory, Elsewhere(meter))
    step = MaskedPriorStep(arch, run.loss, passes)
    optimizer = torch.optim.AdamW(trained)
    with meter:
        batch = _batch(arch, conditioning, shape, case.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16-mixed"):
            loss = run.loss.terms(step(batch, Position(0, 0)).sums).total
        loss.backward()
    for parameter in trained:  # those that a step does not reach have none
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    base = sum(bytes_of(tensors) for tensors in frozen)
    if arch.offload and arch.boundaries:  # the blocks of one expert are there, where those of the other were
        blocks = [
            sum(layout_bytes(_frozen(block)) for _, block in arch.blocks(part)) for _, part in parts_of(transformer)
        ]
        base += max(blocks) - sum(blocks)
    found = {
        "base": base,
        "adapter": bytes_of(trained),
        "optimizer": bytes_of(state),
        "gradients": bytes_of(p.grad for p in trained),
        "step": max(meter.peaks.values()),
    }
    return {"case": asdict(case), "bytes": found}


def _frozen(part: torch.nn.Module) -> list[torch.Tensor]:
    """Weights and buffers, with what bitsandbytes keeps beside the numbers."""
    frozen = [p for p in part.parameters() if not p.requires_grad]
    states = [state for p in frozen if (state := getattr(p, "quant_state", None)) is not None]
    return [*frozen, *part.buffers(), *(tensor for state in states for tensor in (state.absmax, state.code))]


def _batch(arch: Architecture, conditioning: Conditioning, shape: tuple[int, ...], count: int) -> Batch:
    channels, frames, *sides = shape
    mask = torch.ones(count, 1, frames - arch.given_frames, *sides)
    mask[..., : sides[-1] // 2] = 0
    latents = torch.randn(count, channels, frames - arch.given_frames, *sides)
    return Batch(_keys(arch, tuple(latents.shape[1:]), count), latents, mask, conditioning)


def _keys(arch: Architecture, shape: tuple[int, ...], count: int) -> tuple[str, ...]:
    """Names of samples whose sigmas one expert serves, as the loader batches them."""
    names = [f"s{n}" for n in range(20 * count)]
    numbers = expert_numbers(draw_sigma(arch, names, shape, *Position(0, 0)), arch.boundaries).tolist()
    chosen = [name for name, number in zip(names, numbers, strict=True) if number == len(arch.boundaries)]
    return tuple(chosen[:count])


def _named(costs: Costs) -> dict[str, int]:
    return {name: getattr(costs, name) for name in (*EXACT, "step")}


def compared(counted: dict[str, Any], found: dict[str, Any]) -> tuple[bool, float]:
    """Whether what rests is exact, and the peak of a prediction over that of a measurement."""
    sizes = counted["bytes"], found["bytes"]
    exact = all(sizes[0][name] == sizes[1][name] for name in EXACT)
    peaks = [sum(values[name] for name in ("base", "adapter", "optimizer", "step")) for values in sizes]
    return exact, peaks[0] / peaks[1]
