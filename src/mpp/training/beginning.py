"""The moment at which a run begins: all is checked and loaded, nothing is measured or trained yet."""

from collections.abc import Callable, Sequence

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger


class Beginning(Callback):
    """Brings the loggers in, which make their files, and calls a function, when the run begins.

    It comes before the other callbacks, which find the loggers there.

    Args:
        begin: Called once, on the first process.
        loggers: What the trainer logs to.
    """

    def __init__(self, begin: Callable[[], None], loggers: Sequence[Logger]) -> None:
        self.begin, self.loggers, self.begun = begin, loggers, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run without a validation before it."""
        del pl_module
        self._begin(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A run that validates the untrained adapter first."""
        del pl_module
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self.begun:
            return
        self.begun = True
        if trainer.is_global_zero:
            self.begin()
        trainer.loggers = list(self.loggers)
