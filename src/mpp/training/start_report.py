"""What a run says at its start: what is on, with what data, at what cost, and the regions of a few samples."""

import logging
from collections.abc import Callable
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import measure_coverage
from mpp.cache.mask_facts import MaskDoubts
from mpp.core.loss import MaskedPriorLoss
from mpp.files import write_atomically
from mpp.media.own import mark
from mpp.training.banner import banner, data_advice
from mpp.training.loggers import log_image
from mpp.training.regions import region_sheet, region_strip
from mpp.training.schedule import schedule_advice

log = logging.getLogger("mpp")

_LOOKED_AT = 2000  # masks of which it is told whether they look wrong


class RunReport(Callback):
    """Says at the start what is on, with what data, and shows the regions of a few samples.

    Args:
        folder: The run's output folder; `regions.png` is written there.
        images: How many samples are shown.
    """

    def __init__(self, folder: str, pictures: int = 4) -> None:
        self.folder, self.pictures = Path(folder), pictures
        self.findings: Callable[[], str] = str  # how `mpp.report` sees the data, in words
        self.forecast: Callable[[], None] | None = None  # says what of the card the run will take
        self._said = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run without a validation before it."""
        self._say(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A run that validates the untrained adapter first."""
        self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the banner, the warnings and the images, once, on the first process only."""
        if self._said or not trainer.is_global_zero:
            return
        self._said = True
        data: LatentDataModule = trainer.datamodule
        loss = pl_module.loss
        coverage = measure_coverage(data.cache, data.train_entries, loss, pl_module.architecture.given_frames)
        for line in banner(trainer, pl_module, data, coverage):
            log.info(line)
        if self.forecast is not None:
            self.forecast()
        for line in filter(None, (self.findings(), f"output: {self.folder}")):
            log.info(line)
        given = pl_module.architecture.given_frames
        doubts = MaskDoubts.of(data.cache, data.train_entries, loss, given, most=_LOOKED_AT)
        advice = loss.advice() + data.cache.advice(loss) + data_advice(loss, data, coverage) + doubts.lines()
        for line in advice + schedule_advice(pl_module.make_schedule, pl_module.planned_steps):
            log.warning(line)
        self._show_regions(trainer, data, loss)

    def _show_regions(self, trainer: Trainer, data: LatentDataModule, loss: MaskedPriorLoss) -> None:
        model = data.architecture
        first = data.train_entries.originals()[: self.pictures]
        chosen = [entry for entry in first if data.cache.preview(entry.key)]
        rows = [region_strip(data.cache, entry, loss, model.latents.frames, model.given_frames) for entry in chosen]
        if not rows:
            return
        for entry, row in zip(chosen, rows, strict=True):
            for logger in trainer.loggers:
                log_image(logger, f"regions/{entry.key}", row, trainer.global_step)
        sheet = region_sheet(rows, loss)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark(self.folder)
        write_atomically(self.folder / "regions.png", lambda temporary: sheet.save(temporary, "PNG"))
