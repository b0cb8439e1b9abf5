"""The moment at which a run begins: all is checked and loaded, nothing is measured or trained yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from mpp.training.loggers import log_hparams, log_settings

_JUDGED_BY = ("val/target_loss", "val/drift", "train/target_loss")


class Beginning(Callback):
    """Brings the loggers in, which make their files, and calls a function, when the run begins.

    It comes before the other callbacks, which find the loggers there.

    Args:
        begin: Called once, on the first process.
        loggers: What the trainer logs to.
        settings: The run's, resolved, as plain values: for the loggers.
        prompts: Of samples: for the loggers.
    """

    def __init__(
        self,
        begin: Callable[[], None],
        loggers: Sequence[Logger],
        settings: Mapping[str, Any],
        prompts: Sequence[str] = (),
    ) -> None:
        self.begin, self.loggers, self.settings, self.prompts = begin, loggers, settings, prompts
        self.begun = self._judged = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run without a validation before it."""
        del pl_module
        self._begin(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A run that validates the untrained adapter first."""
        del pl_module
        self._begin(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is something to compare runs by."""
        self._judge(trainer, trainer.callback_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation the training itself has to do."""
        self._judge(trainer, pl_module.point.values)

    def _begin(self, trainer: Trainer) -> None:
        if self.begun:
            return
        self.begun = True
        if trainer.is_global_zero:
            self.begin()
        trainer.loggers = list(self.loggers)
        if trainer.is_global_zero:
            for logger in self.loggers:
                log_settings(logger, self.settings, self.prompts, trainer.global_step)

    def _judge(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        found = {name: float(measured[name]) for name in _JUDGED_BY if name in measured}
        if self._judged or not found or not trainer.is_global_zero:
            return
        self._judged = True
        for logger in self.loggers:
            log_hparams(logger, self.settings, found, max(trainer.global_step - 1, 0))
