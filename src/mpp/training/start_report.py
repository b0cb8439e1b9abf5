"""What a run says at its start: what is on, with what data, at what cost, and the regions of a few samples."""

import logging
from pathlib import Path

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import Coverage, measure_coverage, mode_of, step_cost
from mpp.cache.index import Entry
from mpp.cache.mask_facts import MaskDoubts, black_under
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.files import write_atomically
from mpp.media.own import mark
from mpp.models.frame_axis import FrameAxis
from mpp.training.callbacks import log_image
from mpp.training.module import MaskedPriorModule
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the banner, the warnings and the images, on the first process only."""
        if not trainer.is_global_zero:
            return
        data: LatentDataModule = trainer.datamodule
        loss = pl_module.loss
        coverage = measure_coverage(data.cache, data.train_entries, loss, pl_module.architecture.given_frames)
        for line in banner(pl_module, data, coverage):
            log.info(line)
        given = pl_module.architecture.given_frames
        doubts = MaskDoubts.of(data.cache, data.train_entries, loss, given, most=_LOOKED_AT)
        advice = loss.advice() + data.cache.advice(loss) + _data_advice(loss, data, coverage) + doubts.lines()
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


def banner(module: MaskedPriorModule, data: LatentDataModule, coverage: Coverage) -> list[str]:
    """What is on, in words: mode, settings, data, coverage, expected cost of the teacher."""
    loss = module.loss
    settings = ", ".join(f"{name}={value}" for name, value in vars(loss).items())
    visits, masks = int(data.train_entries.repeats.sum()), int(data.train_entries.masked.sum())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    picks = data.pool_picks
    rate = picks / (picks + visits)
    taught = coverage.taught * (1 - data.changes.unmasked_probability) * (1 - rate) + rate
    least, most = step_cost(taught, gradient_checkpointing=module.gradient_checkpointing)
    cost = (
        f"teacher: runs for {taught:.0%} of the samples; steps take about {least:.2f}x (long videos) to {most:.2f}x "
        f"(small images) as long"
        if loss.prior_weight > 0
        else "teacher: never runs"
    )
    lines = [
        f"{mode_of(loss)}: {settings}",
        f"samples: {len(data.train_entries)} for training ({masks} with masks), {len(data.val_entries)} for validation",
        f"coverage: learn {coverage.learn:.1%}, preserve {coverage.preserve:.1%} of the area "
        f"(from {coverage.scanned} samples)",
        cost,
        f"adapter: {module.adapter.kind}, rank {module.adapter.rank}, {trained:,} trainable parameters",
    ]
    if visits > len(data.train_entries):
        lines.append(f"repeats: {visits} visits per epoch")
    if data.changes.unmasked_probability:
        lines.append(f"mask dropout: {data.changes.unmasked_probability:.0%} of the visits train without their mask")
    if data.changes.caption_dropout:
        lines.append(f"caption dropout: {data.changes.caption_dropout:.0%} of the visits have the empty caption")
    if data.pool:
        lines.append(f"preservation: {picks} more samples per epoch ({rate:.0%}) from a pool of {len(data.pool)}")
    if data.empty_masks and data.empty_masks.skipped:
        lines.append(f"left out by data.on_empty_mask=skip: {data.empty_masks}")
    if data.source_changes.unchecked:
        lines.append(f"media, masks and captions were not all compared with the cache: {data.source_changes.unchecked}")
    if data.unchecked:
        lines.append(f"not on this machine, so not compared with the cache's: {', '.join(data.unchecked)}")
    return lines


def _data_advice(loss: MaskedPriorLoss, data: LatentDataModule, coverage: Coverage) -> list[str]:
    advice = []
    masked = bool(data.train_entries.masked.any())
    advice += [
        f"{line}; this run uses the old ones: run `python -m mpp.prepare` again, which makes what changed"
        for line in data.source_changes.lines()
    ]
    if data.empty_masks and not data.empty_masks.skipped:
        advice.append(
            f"{data.empty_masks}: {black_under(loss)}; draw them, or leave them out by data.on_empty_mask=skip"
        )
    if data.changes.unmasked_probability and not masked:
        share = data.changes.unmasked_probability
        advice.append(f"data.unmasked_probability={share} changes nothing: no sample has a mask")
    if loss.prior_weight > 0 and not masked and not data.pool:
        advice.append(
            "loss.prior_weight > 0 while no sample has a mask: the prior never applies; prepare with data.mask_dir, or "
            "choose loss=plain"
        )
    threshold = loss.prior_threshold
    if loss.prior_weight > 0 and threshold is not None and masked and coverage.lowest >= threshold:
        advice.append(
            f"no mask goes below loss.prior_threshold={threshold} (lowest value {coverage.lowest:.3f}): the prior "
            "region is empty; a floor may be baked into the masks: remove it, or raise the threshold above it"
        )
    return advice


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
