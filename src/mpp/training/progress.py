"""What a run says on its way: one bar over the whole run on a terminal, lines elsewhere."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mpp.training.module import MaskedPriorModule
from mpp.wording import duration

log = logging.getLogger("mpp")

_TERMS = {"loss": "loss", "target_loss": "target", "prior_loss": "prior", "drift": "drift"}


class Progress(Callback):
    """Says how far a run is: with a bar, or with a line at each point of its logs; and what validation measured.

    Args:
        bar: A bar, on stderr, instead of lines; None: where that is a terminal.
    """

    def __init__(self, *, bar: bool | None = None) -> None:
        self.bar = bar
        self.first: dict[str, float] = {}  # validation of the untrained adapter, or the first one
        self.last: dict[str, float] = {}
        self._said = 0
        self._bar: tqdm | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on compares with."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was when the checkpoint was saved."""
        self.first = dict(state_dict["first"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar, from where the run is."""
        self._said = trainer.global_step
        if trainer.is_global_zero and (sys.stderr.isatty() if self.bar is None else self.bar):
            self._above = logging_redirect_tqdm([logging.getLogger()])  # lines of the log go above the bar
            self._above.__enter__()
            self._bar = tqdm(
                initial=trainer.global_step, total=pl_module.planned_steps, unit="step", dynamic_ncols=True, leave=True
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A step, unless more batches belong to it."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
        self._say(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What it measured, beside the first one."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if trainer.sanity_checking or not measured:
            return
        self.first = self.first or measured
        self.last = measured
        if trainer.is_global_zero:
            log.info("validation at step %d: %s", trainer.global_step, compared(self.first, self.last))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last point, which may be of fewer steps than others."""
        self._say(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The bar must not stand in the way of what is said of it."""
        self._close()

    def _say(self, trainer: Trainer, module: MaskedPriorModule) -> None:
        point = module.point
        if point.step <= self._said or not trainer.is_global_zero:
            return
        self._said = point.step
        if self._bar is not None:
            shown = {name: point.values.get(f"train/{name}") for name in (*_TERMS, "lr")}
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if value is not None})
            return
        log.info(
            line(point.step, point.values, module.planned_steps, module.pace.left(point.step, module.planned_steps))
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._above.__exit__(None, None, None)


def line(step: int, values: Mapping[str, float], total: int | None, left: float | None) -> str:
    """A point of the logs as a line.

    Args:
        step: Optimizer steps behind it.
        values: By their logged names.
        total: Steps of the run; None: not known.
        left: Seconds until its end; None: not known.
    """
    parts = [f"step {step}" if total is None else f"step {step:{len(str(total))}d}/{total}"]
    parts += [f"{said} {values[f'train/{name}']:.4f}" for name, said in _TERMS.items() if f"train/{name}" in values]
    if "train/lr" in values:
        parts.append(f"lr {values['train/lr']:.3g}")
    parts += [f"{values['perf/seconds_per_step']:.3g} s/step", f"{values['perf/samples_per_second']:.3g} samples/s"]
    if "perf/peak_memory_gib" in values:
        parts.append(f"{values['perf/peak_memory_gib']:.1f} GiB")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def compared(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """Two validations side by side: `loss 2.3815 -> 2.2615, ...`."""
    names = [name for name in _TERMS if f"val/{name}" in last]
    was = {name: f"{first[f'val/{name}']:.4f} -> " for name in names if first != last and f"val/{name}" in first}
    return ", ".join(f"{_TERMS[name]} {was.get(name, '')}{last[f'val/{name}']:.4f}" for name in names)
