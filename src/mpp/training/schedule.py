"""The learning rate's course, fitted to the length of a run."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning import Trainer
from torch.optim import Optimizer

Schedule = Callable[[Optimizer], Any]


def planned_steps(trainer: Trainer, batches: int) -> int | None:
    """How many optimizer steps a run has from its first to its last, those before it was resumed included.

    What Lightning's `estimated_stepping_batches` says, which builds the loaders to know it, and so early that a resumed
    run would forget where it was in its epoch.

    Args:
        trainer: As configured.
        batches: Batches of an epoch that run on each rank.

    Returns:
        The number; None where only the time or a callback ends the run.
    """
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if epochs == -1:
        return None if steps == -1 else steps
    whole = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    return whole if steps == -1 else min(whole, steps)


def schedule_for(schedule: Schedule, steps: int | None) -> Schedule:
    """A schedule for a run of that length.

    `num_training_steps`, where it is null, becomes the run's length, and `num_warmup_steps` may be a share of it.

    Args:
        schedule: Called with the optimizer, e.g. a partial of a function of `diffusers.optimization`.
        steps: Optimizer steps of the whole run; None: not known.

    Raises:
        ValueError: The schedule needs a length that is not known, or would begin anew before the run's end; or the
            warm-up is neither a number of steps nor a share.
    """
    known, given = inspect.signature(schedule).parameters, dict(getattr(schedule, "keywords", {}))
    length, filled = given.get("num_training_steps"), {}
    if length is not None and steps is not None and length < steps:
        raise ValueError(
            f"schedule.num_training_steps={length} is less than the run's {steps} steps: the learning rate would rise "
            "again behind its end; leave it out, and it is the run's length"
        )
    if "num_training_steps" in known and length is None:
        length = filled["num_training_steps"] = _known(steps, "this schedule falls until the end of the run")
    if isinstance(given.get("num_warmup_steps"), int | float):
        filled["num_warmup_steps"] = _warmup(given["num_warmup_steps"], length or steps)
    return partial(schedule, **filled)


def _known(steps: int | None, why: str) -> int:
    if steps is None:
        raise ValueError(
            f"schedule: {why}, which trainer.max_time alone does not tell; set trainer.max_steps or trainer.max_epochs "
            "with it, or choose schedule=constant"
        )
    return steps


def _warmup(value: int | float, length: int | None) -> int:
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return round(value * _known(length, f"num_warmup_steps={value} is a share of the run"))
    raise ValueError(
        f"schedule.num_warmup_steps must be a whole number of optimizer steps, at least 0, or a share of the run in "
        f"[0, 1), got {value}"
    )


def schedule_advice(schedule: Schedule | None, steps: int | None) -> list[str]:
    """What is to be said of a schedule that `schedule_for` made for a run of that many steps, with the remedy."""
    warmup = getattr(schedule, "keywords", {}).get("num_warmup_steps", 0)
    if steps is None or warmup < steps:
        return []
    return [
        f"schedule.num_warmup_steps={warmup} is no shorter than the run of {steps} steps: the learning rate never "
        f"gets to optimizer.lr and ends at {(steps - 1) / warmup:.0%} of it; set 0.1 for a tenth of the run"
    ]
