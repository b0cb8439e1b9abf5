"""A run's course from its first step on, and the page that shows it."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mpp.files import write_atomically
from mpp.media.own import mark
from mpp.sampling.prompts import ReadyPrompt
from mpp.training.callbacks import Checkpoints, Generations, is_finished
from mpp.training.loggers import versions
from mpp.training.metrics import Point
from mpp.training.module import MaskedPriorModule

log = logging.getLogger("mpp")

PAGE = "run.html"
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Course:
    """A run as its page shows it.

    Attributes:
        folder: Its output folder, with `samples` and `regions.png`.
        status: `running`, `finished` or `stopped`.
        step: Optimizer steps behind it.
        total: Steps of the whole run; None: not known.
        seconds: Since this start.
        points: Of its logs, ascending.
        validations: What they measured, ascending.
        prompts: What is generated on the way.
        settings: Resolved, as plain values.
        facts: How it was made, by name.
    """

    folder: Path
    status: str
    step: int
    total: int | None
    seconds: float
    points: Sequence[Point]
    validations: Sequence[Point]
    prompts: Sequence[ReadyPrompt]
    settings: Mapping[str, Any]
    facts: Mapping[str, str]


class RunPage(Checkpoint):
    """Writes `run.html` at each save and at the end: one page, which loads nothing, of all that a run has come to.

    A run that goes on reads what was before from the page itself. As a `Checkpoint` it comes after what saves and
    generates, which are listed before it.

    Args:
        folder: The run's output folder.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / PAGE
        self.render: Callable[[Course], str] | None = None  # how the page looks
        self._points: list[Point] = []
        self._validations: list[Point] = []
        self._written_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a run goes on, what was before."""
        self._written_at = trainer.global_step
        if trainer.global_step:
            points, validations = read_course(self.path, trainer.global_step)
            self._points, self._validations = points, [*validations, *self._validations]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was measured."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        if found and not trainer.sanity_checking:
            self._validations = [old for old in self._validations if old.step < trainer.global_step]
            self._validations.append(Point(trainer.global_step, found))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Keep the point, and renew the page where the step was saved."""
        self._keep(pl_module)
        savers = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
        if any(saver.saved_at == trainer.global_step > self._written_at for saver in savers):
            self._write(trainer, pl_module, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The whole of it; a run that had ended keeps its page, unless a kill left it as that of a running one."""
        self._keep(pl_module)
        if not is_finished(trainer, pl_module):
            self._write(trainer, pl_module, "finished")
        elif _data(self.path).get("status") != "finished":
            self._points, self._validations = read_course(self.path, trainer.global_step)
            self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As far as it came, if it came anywhere."""
        self._keep(pl_module)
        if trainer.global_step > 0 and pl_module.transformer is not None:
            self._write(trainer, pl_module, "stopped")

    def _keep(self, module: MaskedPriorModule) -> None:
        if module.point.step > (self._points[-1].step if self._points else 0):
            self._points.append(module.point)

    def _write(self, trainer: Trainer, module: MaskedPriorModule, status: str) -> None:
        if self.render is None or not trainer.is_global_zero:
            return
        self._written_at = trainer.global_step
        generations = [callback for callback in trainer.callbacks if isinstance(callback, Generations)]
        record = module.record()
        facts = {"base": str(record["base"]), "family": str(record["family"]), "seed": str(record["seed"])}
        course = Course(
            folder=self.path.parent,
            status=status,
            step=trainer.global_step,
            total=module.planned_steps,
            seconds=module.pace.seconds,
            points=self._points,
            validations=self._validations,
            prompts=[ready for callback in generations for ready in callback.ready],
            settings=module.provenance,
            facts={**facts, "samples seen": str(record["samples_seen"]), **versions()},
        )
        try:
            with module.pace.pause():
                page = self.render(course)
                write_atomically(self.path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
                mark(self.path.parent)
        except (OSError, ValueError) as error:
            log.warning("%s could not be written, training goes on: %s", self.path, error)


def read_course(page: Path, step: int) -> tuple[list[Point], list[Point]]:
    """The points and validations up to a step that a page holds; none where there is no page, or a damaged one."""
    data = _data(page)
    try:
        points, validations = (
            [Point(int(at), values) for at, values in data.get(name, []) if at <= step]
            for name in ("points", "validations")
        )
    except (ValueError, TypeError):
        return [], []
    return points, validations


def _data(page: Path) -> dict[str, Any]:
    """What a page holds; nothing where it is not there, or damaged."""
    try:
        found = _DATA.search(page.read_text("utf-8"))
        return json.loads(found[1]) if found else {}
    except (OSError, ValueError):
        return {}
