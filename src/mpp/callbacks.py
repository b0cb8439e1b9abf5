"""What a run shows and saves: the report at its start, checkpoints, the LoRA."""

import logging
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image, ImageDraw

from mpp.core.loss import MaskedPriorLoss
from mpp.coverage import Coverage, measure_coverage, mode_of, step_cost
from mpp.data.cache import Cache, key_frames
from mpp.data.datamodule import LatentDataModule
from mpp.data.index import Entry
from mpp.data.prompts import Painted, Prompts
from mpp.models.adapters import save_lora
from mpp.module import MaskedPriorModule
from mpp.painting import paint, sample_name, save

log = logging.getLogger("mpp")


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` and the LoRA every so many steps and at the end.

    Args:
        folder: The run's output folder: `checkpoints/last.ckpt`, `lora.safetensors` (the newest) and
            `lora/step-000500.safetensors` (each of them).
        every_n_steps: Optimizer steps between two saves, >= 1.
        keep_all: Also keep each checkpoint as `checkpoints/step-000500.ckpt`.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: str, every_n_steps: int = 500, *, keep_all: bool = False) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoints.every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps, self.keep_all = Path(folder), every_n_steps, keep_all
        self._saved_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was resumed from is saved already."""
        del pl_module
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save at the chosen steps, and at the last one while its place in the epoch is still known."""
        step = trainer.global_step
        if step != self._saved_at and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save whatever has not been saved."""
        if trainer.global_step != self._saved_at:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, module: MaskedPriorModule) -> None:
        step = self._saved_at = trainer.global_step
        checkpoints = self.folder / "checkpoints"
        trainer.save_checkpoint(checkpoints / "last.ckpt", weights_only=False)
        if self.keep_all:
            trainer.save_checkpoint(checkpoints / f"step-{step:06d}.ckpt", weights_only=False)
        if not trainer.is_global_zero:
            return
        with module.evaluated_adapter() as state:
            for path in (self.folder / "lora" / f"step-{step:06d}.safetensors", self.folder / "lora.safetensors"):
                save_lora(path, module.transformer, state, module.record())


class Samples(Checkpoint):
    """Paints prompts by base and LoRA from the same noise: at the start, every so many steps, and at the end.

    Nothing happens without prompts. Their embeddings come from the cache, so no text encoder is loaded. Several
    processes share the prompts. A sample that fails (out of memory, disk full) is said and does not end the run. As a
    `Checkpoint` it comes after the callbacks listed before it, so that a step is saved before it is painted.

    Args:
        folder: The run's output folder; `samples/step-000500/` holds PNG and MP4 files.
        every_n_steps: Optimizer steps between two samples, >= 1.
        prompts: What is painted, as it was prepared.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: str, prompts: Prompts, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.samples.every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.prompts, self.every_n_steps = Path(folder) / "samples", prompts, every_n_steps
        self._painted: list[Painted] = []
        self._bases: dict[str, torch.Tensor] = {}
        self._done_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse prompts that were not prepared, before the transformer is loaded."""
        del stage
        self.prompts.check(pl_module.architecture)
        data: LatentDataModule = trainer.datamodule
        self._painted = self.prompts.read(pl_module.architecture, data.cache)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The untrained adapter, which paints what the base does; what was resumed from is painted already."""
        if trainer.global_step == 0:
            self._paint(trainer, pl_module)
        self._done_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._paint(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The finished adapter."""
        self._paint(trainer, pl_module)

    def _paint(self, trainer: Trainer, module: MaskedPriorModule) -> None:
        step = trainer.global_step
        if not self._painted or step == self._done_at:
            return
        self._done_at = step
        folder = self.folder / f"step-{step:06d}"
        try:
            self._paint_share(trainer, module, folder)
        except (RuntimeError, OSError) as error:
            log.warning("the samples of step %d failed, training goes on: %s", step, error)
        trainer.strategy.barrier("samples")
        if trainer.is_global_zero:
            for file in sorted(folder.glob("*.png")):
                for logger in trainer.loggers:
                    _log_picture(logger, f"samples/{file.stem}", Image.open(file).convert("RGB"), step)

    def _paint_share(self, trainer: Trainer, module: MaskedPriorModule, folder: Path) -> None:
        """This process's prompts."""
        share = list(enumerate(self._painted))[trainer.global_rank :: trainer.world_size]
        encoders = module.architecture.load_encoders(module.device)
        try:
            with module.evaluated_adapter(), trainer.precision_plugin.forward_context():
                for number, painted in share:
                    pair = paint(
                        module.architecture,
                        module.transformer,
                        encoders,
                        painted,
                        name=sample_name(number, painted.prompt),
                        device=module.device,
                        bases=self._bases,
                    )
                    save(pair, folder)
        finally:
            encoders.release()


class LossBar(TQDMProgressBar):
    """Progress with the losses by their short names."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Loss, target and prior of the last report."""
        found = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in found.items() if name.startswith("train/")}


class RunReport(Callback):
    """Says at the start what is on, with what data, and shows the regions of a few samples.

    Args:
        folder: The run's output folder; `regions.png` is written there.
        pictures: How many samples are shown.
    """

    def __init__(self, folder: str, pictures: int = 4) -> None:
        self.folder, self.pictures = Path(folder), pictures

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the banner, the warnings and the pictures, on the first process only."""
        if not trainer.is_global_zero:
            return
        data: LatentDataModule = trainer.datamodule
        loss = pl_module.loss
        coverage = measure_coverage(data.cache, data.train_entries, loss, pl_module.architecture.given_frames)
        for line in banner(pl_module, data, coverage):
            log.info(line)
        for line in loss.advice() + data.cache.advice(loss) + _data_advice(loss, data, coverage):
            log.warning(line)
        self._show_regions(trainer, data, loss)

    def _show_regions(self, trainer: Trainer, data: LatentDataModule, loss: MaskedPriorLoss) -> None:
        model = data.architecture
        first = data.train_entries.originals()[: self.pictures]
        chosen = [entry for entry in first if data.cache.preview_path(entry.key).is_file()]
        rows = [
            region_strip(data.cache, entry, loss, model.given_frames, layered=model.latents.layered) for entry in chosen
        ]
        if not rows:
            return
        sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
        top = 0
        for entry, row in zip(chosen, rows, strict=True):
            sheet.paste(row, (0, top))
            top += row.height
            for logger in trainer.loggers:
                _log_picture(logger, f"regions/{entry.key}", row, trainer.global_step)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / "regions.png")


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
        f"(small pictures) as long"
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
    if data.mask_changes.unchecked:
        lines.append(f"masks were not compared with their files: {data.mask_changes.unchecked}")
    if data.unchecked:
        lines.append(f"not on this machine, so not compared with the cache's: {', '.join(data.unchecked)}")
    return lines


def _data_advice(loss: MaskedPriorLoss, data: LatentDataModule, coverage: Coverage) -> list[str]:
    advice = []
    masked = bool(data.train_entries.masked.any())
    if data.mask_changes:
        advice.append(
            f"masks changed since the cache was prepared: {data.mask_changes}; this run uses the old ones: run "
            "`python -m mpp.prepare` again, which writes masks only"
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


def region_strip(
    cache: Cache, entry: Entry, loss: MaskedPriorLoss, given: int = 0, *, layered: bool = False
) -> Image.Image:
    """Picture, mask, target weights and prior weights of one sample side by side; layers under each other.

    Args:
        cache: The cache.
        entry: The sample.
        loss: Whose regions are shown.
        given: Leading frames that the model is given, which are not shown.
        layered: Frames are layers, the whole picture first; of a clip the first frame is shown.
    """
    weights = loss.weights(cache.mask(entry)[None, :, given:])
    rows = []
    for number in range(weights.raw.shape[2] if layered else 1):
        layer = number + given - 1 if layered and number + given > 0 else None
        shown = next((f for f in key_frames(entry.shape[1]) if f >= given), 0)  # of a clip
        path = cache.preview_path(entry.key, layer) if layered else cache.frame_path(entry.key, shown)
        picture, frame = Image.open(path).convert("RGB"), number if layered else max(0, shown - given)
        parts = [(entry.key if layer is None else f"{entry.key} layer {layer}", picture)]
        for name, field in (("mask", weights.raw), ("learns", weights.target), ("keeps the base", weights.prior)):
            grey = Image.fromarray((field[0, 0, frame].numpy() * 255).round().astype(np.uint8))
            parts.append((name, grey.resize(picture.size, Image.Resampling.NEAREST).convert("RGB")))
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
        label = f"{name}: picture" if column == 0 else f"{name} ({np.asarray(image).mean() / 255:.0%})"
        draw.text((column * width + 4, 2), label, fill="black")
    return strip


def _log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)
