"""What a run says at its start: what is on, with what data, at what cost, and the regions of a few samples."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import measure_coverage
from mpp.cache.index import Entry
from mpp.cache.mask_facts import MaskDoubts
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.files import write_atomically
from mpp.media.own import mark
from mpp.models.frame_axis import FrameAxis
from mpp.training.banner import banner, data_advice
from mpp.training.loggers import log_image
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
        sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
        top = 0
        for entry, row in zip(chosen, rows, strict=True):
            sheet.paste(row, (0, top))
            top += row.height
            for logger in trainer.loggers:
                log_image(logger, f"regions/{entry.key}", row, trainer.global_step)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark(self.folder)
        write_atomically(self.folder / "regions.png", lambda temporary: sheet.save(temporary, "PNG"))


def region_strip(cache: Reader, entry: Entry, loss: MaskedPriorLoss, axis: FrameAxis, given: int = 0) -> Image.Image:
    """Image, mask, target weights and prior weights of one sample side by side; layers under each other.

    Args:
        cache: The cache.
        entry: The sample.
        loss: Whose regions are shown.
        axis: What its frames are: all layers are shown, and of a clip the first frame.
        given: Leading frames that the model is given, which are not shown.
    """
    weights = loss.weights(cache.mask(entry)[None, :, given:])
    rows = []
    for number in axis.compared(entry.shape[1], given):
        image = Image.open(cache.preview(entry.key, axis.suffix(number))).convert("RGB")
        frame = max(0, number - given)
        parts = [(f"{entry.key} {axis.name(number, entry.shape[1])}".strip(), image)]
        for name, field in (("mask", weights.raw), ("learns", weights.target), ("keeps the base", weights.prior)):
            grey = Image.fromarray((field[0, 0, frame].numpy() * 255).round().astype(np.uint8))
            parts.append((name, grey.resize(image.size, Image.Resampling.NEAREST).convert("RGB")))
        rows.append(_row(parts))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * row.height))
    return sheet


def _row(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    header, (width, height) = 16, parts[0][1].size
    strip = Image.new("RGB", (width * len(parts), height + header), "white")
    draw = ImageDraw.Draw(strip)
    for column, (name, image) in enumerate(parts):
        strip.paste(image, (column * width, header))
        label = f"{name}: image" if column == 0 else f"{name} ({np.asarray(image).mean() / 255:.0%})"
        draw.text((column * width + 4, 2), label, fill="black")
    return strip
