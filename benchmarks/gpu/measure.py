"""What the rows measure. Each function takes a `Case` and returns what its line of JSON says."""

import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import MAPPING, flops
from benchmarks.gpu import model
from benchmarks.gpu.case import GIB, Case, Found, seconds_of
from benchmarks.gpu.model import PLAIN, PRIOR, Trainee
from benchmarks.gpu.streams import FEW, unchanged
from mpp.batching.batch import Batch
from mpp.lora.stack import load_base
from mpp.memory.bases import dequantise
from mpp.training.step import Position

SURE = 0.03  # how far equal steps may differ in their median


def attention(action: Callable[[], object]) -> str:
    """Names of torch's attention functions that an action calls; `math` where it is put together from others."""
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        action()
    names = {str(op).removeprefix("aten._") for op in counter.get_flop_counts()["Global"]}
    return ", ".join(sorted(n for n in names if "attention" in n and "backward" not in n)) or "math"


def environment(case: Case) -> Found:
    """Card, driver, versions, and which attention torch chooses for WAN's heads."""
    found = {
        "cuda": torch.cuda.is_available(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    query = torch.randn(1, 2, 64, case.size.head, device=case.device, dtype=torch.bfloat16, requires_grad=True)
    found["attention"] = attention(lambda: functional.scaled_dot_product_attention(query, query, query).sum())
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_gib": card.total_memory / GIB, "driver": _driver()}
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def correct(case: Case) -> Found:
    """Whether the teacher is the base model bit for bit, so the student at the start, and the prior's cost its pass.

    And whether blocks that wait in the CPU's memory change nothing, with the teacher before the student or in lockstep.
    """
    data, found = case.batch(samples=2, with_prior=2), dict(unchanged(case))
    base = case.architecture().load_transformer()
    for name in ("keep", "checkpoint", "offload"):
        trainee = case.trainee(activations=name)
        found |= {f"{key}_{name}": value for key, value in _agreement(trainee, base, data)}
    few = replace(case, layers=FEW)
    base = few.architecture().load_transformer()
    found |= {f"{key}_lockstep": value for key, value in _agreement(few.trainee(resident=2), base, data)}
    found["good"] = all(value for name, value in found.items() if isinstance(value, bool) and name != "repeats")
    return found


def _agreement(trainee: Trainee, base: nn.Module, data: Batch) -> Iterator[tuple[str, Any]]:
    output = trainee.forward(data, PRIOR)[1]
    yield "student_is_teacher", torch.equal(output.prior, output.pred)
    with torch.no_grad(), torch.autocast(data.latents.device.type, torch.bfloat16):
        noisy = trainee.module.step.corrupt(data, Position(0, 0))
        asked = (base, noisy.latents, noisy.sigma, data.conditioning)
        teacher = flops(lambda: trainee.module.architecture.velocity(*asked))
        answer = trainee.module.architecture.velocity(*asked)
        for parameter in trainee.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, model.SPREAD)
    output = trainee.forward(data, PRIOR)[1]
    yield "teacher_is_base", torch.equal(output.prior, answer)
    yield "student_has_moved", not torch.equal(output.pred, answer)
    del output
    plain, prior = (flops(lambda loss=loss: trainee.learn(data, loss)) for loss in (PLAIN, PRIOR))
    yield from {"plain_flops": plain, "teacher_flops": teacher, "adds_up": prior == plain + teacher}.items()


def gradients(case: Case) -> Found:
    """The gradient that each quantised layer hands on, against that of its own weights in bfloat16.

    Weights whose layer hands on none, or another one, would let training run and learn nothing below them.
    """
    architecture = replace(case.architecture(), size=replace(case.size, layers=1))
    transformer, random = load_base(architecture, case.row.base), torch.Generator(case.device).manual_seed(1)
    errors = {}
    for name, linear in architecture.quantisable(transformer):
        weight = dequantise(linear).to(torch.bfloat16)
        x = torch.randn(8, weight.shape[1], device=case.device, dtype=torch.bfloat16, generator=random).requires_grad_()
        y = linear(x)
        above = torch.randn(y.shape, device=case.device, dtype=y.dtype, generator=random)
        (got,) = torch.autograd.grad(y, x, above, allow_unused=True)
        want = above.float() @ weight.float()
        errors[name] = 1.0 if got is None else float((got.float() - want).norm() / want.norm())
    worst = max(errors, key=errors.get)
    return {"layers": len(errors), "worst": worst, "worst_error": errors[worst], "good": errors[worst] < 0.02}


def syncs(case: Case) -> Found:
    """How often a step, whose batch begins on the host, waits for the device, as torch's debug mode warns."""
    trainee, found = case.trainee(), {}
    for name, with_prior in (("both", 2), ("half", 1)):
        data = model.batch(case.size, case.shape, "cpu", samples=2, with_prior=with_prior).pin_memory()
        trainee.stepper(data.to(case.device), PRIOR)()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainee.stepper(data.to(case.device), PRIOR)()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        found |= {f"{name}_syncs": len(lines), f"{name}_where": ", ".join(sorted(set(lines)))}
    return found


def by_turns(actions: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each action in each round; each round begins with another one."""
    names, found = list(actions), {name: [] for name in actions}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(seconds_of(actions[name], device))
    return found


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios by rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def verdict(control: float) -> str:
    """`measured`, or `inconclusive` where equal steps are not equally long."""
    return "measured" if abs(control - 1) <= SURE else "inconclusive"


def timing(case: Case) -> Found:
    """A plain step, the same again as a control, one with a prior on both samples, and one with it on one of them."""
    trainee = case.trainee()
    both, one = (case.batch(samples=2, with_prior=count) for count in (2, 1))
    works = {"plain": (both, PLAIN), "again": (both, PLAIN), "prior": (both, PRIOR), "half": (one, PRIOR)}
    actions = {name: trainee.stepper(*work) for name, work in works.items()}
    actions["prior"]()  # warm
    counted = {name: flops(lambda work=work: trainee.learn(*work)) for name, work in works.items() if name != "again"}
    trainee.optimizer.zero_grad()
    actions["plain"]()
    spent = by_turns(actions, case.row.rounds, case.device)
    control = ratio(spent["again"], spent["plain"])
    return {
        "plain_s": statistics.median(spent["plain"] + spent["again"]),
        "prior_ratio": ratio(spent["prior"], spent["plain"]),
        "prior_flops": counted["prior"] / counted["plain"],
        "over_flops": ratio(spent["prior"], spent["plain"]) * counted["plain"] / counted["prior"],
        "half_ratio": ratio(spent["half"], spent["plain"]),
        "half_flops": counted["half"] / counted["plain"],
        "teraflops": counted["plain"] / statistics.median(spent["plain"]) / 1e12,
        "control": control,
        "verdict": verdict(control),
        "rounds": case.row.rounds,
        "attention": attention(lambda: trainee.forward(both, PLAIN)),
    }


def compiled(case: Case) -> Found:
    """`compile=true` against the same steps without."""
    data, found = case.batch(), {}
    for name, settings in (("eager", {}), ("compiled", {"compiled": True})):
        trainee = case.trainee(**settings)
        actions = {"plain": trainee.stepper(data, PLAIN), "prior": trainee.stepper(data, PRIOR)}
        start = time.monotonic()
        for action in (*actions.values(), *actions.values()):
            action()
        found[f"{name}_warm_s"] = time.monotonic() - start
        spent = by_turns(actions, case.row.rounds, case.device)
        found |= {f"{name}_{kind}_s": statistics.median(values) for kind, values in spent.items()}
    return found


def memory(case: Case) -> Found:
    """Peaks and seconds of a step of one sample, plain and with a prior, after one that warms up."""
    trainee, data = case.trainee(), case.batch()
    found = {"resident_gib": torch.cuda.memory_allocated() / GIB}
    trainee.stepper(data, PLAIN)()
    for name, loss in (("plain", PLAIN), ("prior", PRIOR)):
        torch.cuda.reset_peak_memory_stats()
        found[f"{name}_s"] = seconds_of(trainee.stepper(data, loss), case.device)
        found[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found
