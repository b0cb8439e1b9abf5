"""Learning rates of a run that goes on under another rate or schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedules = Callable[[torch.optim.Optimizer], Any]


def renew_rates(checkpoint: dict[str, Any], optimizer: Optimizers, schedule: Schedules | None, steps: int) -> float:
    """Put into a checkpoint what a run would have there that began with this optimizer's rate and this schedule.

    Args:
        checkpoint: As Lightning has it; states of the optimizer and of the schedule change in place.
        optimizer: Whose rate holds.
        schedule: Which multiplies it; None: it is constant.
        steps: Steps of the schedule that are behind it.

    Returns:
        The rate of the next step.
    """
    rate = optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    stand_in = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)  # any schedule goes with it, and it is cheap
    before, states = dict(stand_in.param_groups[0]), []
    if schedule is not None:
        made = schedule(stand_in)
        for _ in range(steps):
            stand_in.step()
            made.step()
        states = [made.state_dict()]
    after = stand_in.param_groups[0]
    moved = {name: value for name, value in after.items() if name == "lr" or before.get(name) != value}
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group.update(moved)
    checkpoint["lr_schedulers"] = states
    return float(after["lr"])
