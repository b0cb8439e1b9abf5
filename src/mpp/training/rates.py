"""Learning rates: of the matrices B, and of a run that goes on under another rate or schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Optimizers = Callable[[Iterable[nn.Parameter] | Iterable[dict[str, Any]]], torch.optim.Optimizer]
Schedules = Callable[[torch.optim.Optimizer], Any]
_NAMES = ("lora_A.", "lora_B.")  # in the names of parameters


def optimizer_of(
    optimizer: Optimizers, trained: Iterable[tuple[str, nn.Parameter]], ratio: float = 1
) -> torch.optim.Optimizer:
    """The optimizer of an adapter, in which the matrices B learn at `ratio` times the rate.

    LoRA+ (arXiv 2402.12354): two groups of parameters, `B` and `A`, which holds all others, with the same settings but
    for the rate. With a ratio of 1 one group, as if there were no ratio.

    Args:
        optimizer: Called with parameters or groups of them.
        trained: Parameters with their names.
        ratio: Above 0.

    Raises:
        ValueError: The optimizer finds its own rate, and so can have no second one.
    """
    trained = list(trained)
    if ratio == 1:
        return optimizer([parameter for _, parameter in trained])
    faster, others = ([p for name, p in trained if (_NAMES[1] in name) == wanted] for wanted in (True, False))
    made = optimizer([{"params": others, "name": "A"}, {"params": faster, "name": "B"}])
    first, second = made.param_groups
    if first.get("lr") is None or "d" in first:  # D-Adaptation's and Prodigy's estimate, which is of all groups at once
        raise ValueError(
            f"lora.b_lr_ratio={ratio} multiplies the learning rate, and {type(made).__name__} finds one of its own for "
            "all that is trained; choose optimizer=adamw, adamw8bit or schedulefree, or leave it out"
        )
    second["lr"] = first["lr"] * ratio
    return made


def check_ratio(optimizer: Optimizers, schedule: Schedules | None, ratio: float) -> None:
    """Refuse, before anything is loaded, an optimizer or schedule under which B would not learn at the ratio.

    Raises:
        ValueError: As `optimizer_of`; or the schedule sets rates of its own.
    """
    if ratio == 1:
        return
    made = _stand_in(optimizer, ratio)
    if schedule is not None:
        schedule(made)
    rates = [group["lr"] for group in made.param_groups]
    if not math.isclose(rates[1], rates[0] * ratio):
        raise ValueError(
            f"lora.b_lr_ratio={ratio}: this schedule sets the rates {rates[0]:g} and {rates[1]:g} instead of "
            "multiplying the optimizer's; choose schedule=constant, warmup or cosine, or leave the ratio out"
        )


def _stand_in(optimizer: Optimizers, ratio: float) -> torch.optim.Optimizer:
    names = _NAMES if ratio != 1 else _NAMES[:1]
    return optimizer_of(optimizer, [(name, nn.Parameter(torch.zeros(1))) for name in names], ratio)


def renew_rates(
    checkpoint: dict[str, Any], optimizer: Optimizers, schedule: Schedules | None, steps: int, ratio: float = 1
) -> float:
    """Put into a checkpoint what a run would have there that began with this optimizer's rate and this schedule.

    Args:
        checkpoint: As Lightning has it; states of the optimizer and of the schedule change in place.
        optimizer: Whose rate holds.
        schedule: Which multiplies it; None: it is constant.
        steps: Steps of the schedule that are behind it.
        ratio: Of the rate of the matrices B, see `optimizer_of`.

    Returns:
        The rate of the next step; of A, where B has another.
    """
    rates = [group["lr"] for group in _stand_in(optimizer, ratio).param_groups]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    stand_in = torch.optim.AdamW(groups, lr=rates[0])  # any schedule goes with it, and it is cheap
    before, states = [dict(group) for group in stand_in.param_groups], []
    if schedule is not None:
        made = schedule(stand_in)
        for _ in range(steps):
            stand_in.step()
            made.step()
        states = [made.state_dict()]
    for state in checkpoint["optimizer_states"]:
        for group, was, now in zip(state["param_groups"], before, stand_in.param_groups, strict=True):
            group.update({name: value for name, value in now.items() if name == "lr" or was.get(name) != value})
    checkpoint["lr_schedulers"] = states
    return float(stand_in.param_groups[0]["lr"])


def effective_rates(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
    """What the updates are multiplied by, as `train/lr` and, where the matrices B have another, `train/lr_b`.

    An optimizer that finds its own rate multiplies the one that is set by an estimate `d` (D-Adaptation, Prodigy);
    schedule-free ones keep what they used as `scheduled_lr`.
    """
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            name = "train/lr_b" if group.get("name") == "B" else "train/lr"
            found.setdefault(name, float(group.get("scheduled_lr") or group["lr"]) * float(group.get("d", 1)))
    return found
