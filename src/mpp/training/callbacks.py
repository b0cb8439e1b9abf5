"""What a run saves and shows on its way: checkpoints, the LoRA, samples, the losses."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image

from mpp.batching.datamodule import LatentDataModule
from mpp.files import remove_leftovers
from mpp.lora.adapters import part_state
from mpp.lora.export import export_path, write_beside
from mpp.lora.exports import Exports
from mpp.lora.metadata import Facts, describe
from mpp.lora.writing import lora_files, save_lora, step_of_lora
from mpp.media.own import mark
from mpp.models.experts import parts_of
from mpp.sampling.contact import NAME as CONTACT
from mpp.sampling.contact import step_folder, write_contact
from mpp.sampling.generation import frame_image, generate, generation_name, save
from mpp.sampling.prompts import Prompts, ReadyPrompt
from mpp.training.ema import AdapterEma, ema_of
from mpp.training.endings import endings_of
from mpp.training.facts import facts_of
from mpp.training.loggers import log_image
from mpp.training.module import MaskedPriorModule
from mpp.training.retention import outdated

log = logging.getLogger("mpp")

MONITORED = ("val/loss", "val/target_loss", "val/prior_loss", "val/drift")


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` and the LoRA every so many steps or epochs and at the end.

    Args:
        folder: The run's output folder: `checkpoints/last.ckpt`, `lora.safetensors` (the newest) and
            `lora/step-000500.safetensors` (each of them). Of a run with an average of the adapter (`AdapterEma`) also
            `lora_ema.safetensors` and `lora/step-000500_ema.safetensors`.
        every_n_steps: Optimizer steps between two saves, >= 1; None: they are not counted.
        every_n_epochs: Epochs between two saves, >= 1; None: they are not counted.
        keep_all: Also keep each checkpoint as `checkpoints/step-000500.ckpt`.
        keep_last: Steps whose files are kept, >= 1; None: all. `lora.safetensors` and `last.ckpt` always are.
        monitor: What validation measures, `val/loss` say, of which the lowest is best: its LoRA is also
            `lora_best.safetensors`; None: no step is better than others.
        exports: Files for other programs, beside each LoRA.

    Raises:
        ValueError: A number is below 1, or `monitor` is nothing that validation measures.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int | None = 500,
        *,
        every_n_epochs: int | None = None,
        keep_all: bool = False,
        keep_last: int | None = None,
        monitor: str | None = None,
        exports: Exports | None = None,
    ) -> None:
        given = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "keep_last": keep_last}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoints.{name} must be at least 1, got {value}")
        if monitor is not None and monitor not in MONITORED:
            raise ValueError(f"callbacks.checkpoints.monitor must be one of {', '.join(MONITORED)}, got {monitor}")
        self.folder, self.every_n_steps, self.every_n_epochs = Path(folder), every_n_steps, every_n_epochs
        self.keep_all, self.keep_last, self.monitor = keep_all, keep_last, monitor
        self.best: float | None = None
        self.exports = Exports([]) if exports is None else exports
        self.formats: tuple[str, ...] | None = None
        self._left_out: tuple[str, ...] = ()
        self.saved_at = 0
        self._sample: Image.Image | None = None  # the newest one
        self._facts: Facts | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to be better than; no paths, so that a run may move."""
        return {} if self.monitor is None else {"monitor": self.monitor, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was when the checkpoint was saved; of another measure it says nothing."""
        if state_dict.get("monitor") == self.monitor:
            self.best = state_dict.get("best")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what there is nothing for, before the transformer is loaded.

        Raises:
            ValueError: A thumbnail of samples without prompts; the best validation without any.
        """
        del pl_module, stage
        if self.monitor is not None and trainer.limit_val_batches == 0:
            raise ValueError(
                f"callbacks.checkpoints.monitor={self.monitor}: there are no validation samples, or "
                "trainer.limit_val_batches=0 leaves them out; set data.val_fraction=0.1, say, or prepare some with "
                "data.val_image_dir"
            )
        generations = [callback for callback in trainer.callbacks if isinstance(callback, Generations)]
        if self.exports.metadata.thumbnail is True and not any(found.prompts.lines for found in generations):
            raise ValueError(
                "export.metadata.thumbnail=true shows a sample; set sampling.prompts, or name an image file"
            )

    def choose_formats(self, module: MaskedPriorModule) -> None:
        """Say for which programs files are written, before the transformer is loaded.

        Raises:
            ValueError: A format that is asked for cannot say the adapter.
        """
        self.formats, self._left_out = self.exports.chosen(module.architecture, module.adapter)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that had ended is not trained again, so what a kill left out at its end is made up for here."""
        if self.formats is None:
            self.choose_formats(pl_module)
        if is_finished(trainer, pl_module):
            if trainer.is_global_zero:
                remove_leftovers(self.folder, older_than=0)
            pl_module.restore_optimizer()
            self._complete(trainer, pl_module, pl_module.resumed["global_step"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was resumed from is saved already, all but what a kill right after it left out."""
        if trainer.is_global_zero:
            for line in self._left_out:
                log.warning(line)
        self.saved_at = trainer.global_step
        if self.saved_at:
            self._complete(trainer, pl_module, self.saved_at)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save at the chosen steps, and at the last one."""
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        ends = self.every_n_epochs is not None and trainer.is_last_batch and epoch % self.every_n_epochs == 0
        if due or ends or step == trainer.max_steps:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the LoRA of the best validation."""
        value = trainer.callback_metrics.get(self.monitor or "")
        trained = trainer.global_step > 0 and not trainer.sanity_checking
        if value is None or not trained or not (self.best is None or float(value) < self.best):
            return
        self.best = float(value)
        with pl_module.pace.pause():
            self._write(trainer, pl_module, self.folder / "lora_best.safetensors")
        if trainer.is_global_zero:
            log.info(
                "best %s so far, %.4f: lora_best.safetensors is of step %d",
                self.monitor,
                self.best,
                trainer.global_step,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save whatever has not been saved."""
        self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: MaskedPriorModule) -> bool:
        """Save the step at hand unless it is saved.

        The LoRA of the step comes first, then the checkpoint, which makes the step count, then the newest LoRA: a run
        that is killed in between resumes from a step whose LoRA is there, and makes up for the rest.

        Returns:
            Whether a step is saved.

        Raises:
            ValueError: The adapter is not finite; what was saved before is untouched.
            OSError: The disk is full or not writable.
        """
        step = trainer.global_step
        if step == self.saved_at:
            return step > 0
        with module.pace.pause():
            self._save(trainer, module, step)
        if trainer.is_global_zero:
            log.info("saved step %d: %s", step, self.folder / "lora.safetensors")
        return True

    def _save(self, trainer: Trainer, module: MaskedPriorModule, step: int) -> None:
        if (endings := endings_of(trainer)) is not None:
            endings.check_adapter(trainer, module)
        self._write(trainer, module, self._lora_of(step))
        checkpoints = self.folder / "checkpoints"
        if self.keep_all:
            trainer.save_checkpoint(checkpoints / f"step-{step:06d}.ckpt", weights_only=False)
        trainer.save_checkpoint(checkpoints / "last.ckpt", weights_only=False)
        self.saved_at = step
        self._write(trainer, module, self.folder / "lora.safetensors")
        if self.keep_last is not None and trainer.is_global_zero:
            for kept in (self.folder / "lora", checkpoints):
                for file in outdated(kept, step, self.keep_last):
                    file.unlink(missing_ok=True)

    def _lora_of(self, step: int) -> Path:
        return self.folder / "lora" / f"step-{step:06d}.safetensors"

    def _complete(self, trainer: Trainer, module: MaskedPriorModule, step: int) -> None:
        """Write the LoRA of a step that was resumed from, where it is not there or older."""
        for path in (self._lora_of(step), self.folder / "lora.safetensors"):
            averages = [] if _average_of(trainer) is None else lora_files(_ema_path(path), module.transformer)
            loras = lora_files(path, module.transformer) + averages
            written = loras + [export_path(lora, format) for lora in loras for format in self.formats]
            if trainer.is_global_zero and any((step_of_lora(file) or 0) < step for file in written):
                self._write(trainer, module, path, steps=step)

    def illustrate(self, trainer: Trainer, module: MaskedPriorModule, sample: Image.Image) -> None:
        """Show a sample in the files of the step at hand, which were saved before it was there, and in later ones."""
        self._sample = sample
        if self.exports.metadata.thumbnail is True and trainer.global_step == self.saved_at > 0:
            for path in (self._lora_of(self.saved_at), self.folder / "lora.safetensors"):
                self._write(trainer, module, path)

    def _write(self, trainer: Trainer, module: MaskedPriorModule, path: Path, steps: int | None = None) -> None:
        if trainer.is_global_zero:
            record = module.record() | ({} if steps is None else {"steps": steps})
            with module.evaluated_adapter() as state:
                self._write_lora(trainer, module, path, state, record)
            if (ema := _average_of(trainer)) is not None:
                self._write_lora(trainer, module, _ema_path(path), ema.average, record | ema.record())

    def _write_lora(
        self,
        trainer: Trainer,
        module: MaskedPriorModule,
        path: Path,
        state: Mapping[str, torch.Tensor],
        record: Mapping[str, object],
    ) -> None:
        said = self.exports.metadata
        self._facts = self._facts or facts_of(trainer, self.folder, said)
        name = f"{self._facts.name} EMA" if "ema" in record else self._facts.name
        facts = replace(self._facts, name=name, date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

        def described(part: str) -> Mapping[str, str]:
            found = describe(module.architecture, record, facts, part=part)
            return said.over(found, part=part, image=self._sample)

        loras = save_lora(path, module.transformer, state, said.record(record), described)
        for lora, (part, transformer) in zip(loras, parts_of(module.transformer), strict=True):
            tensors = {name: tensor.detach().cpu() for name, tensor in part_state(state, part).items()}
            for format in self.formats:
                write_beside(lora, format, transformer, tensors, architecture=module.architecture, said=said)


def _average_of(trainer: Trainer) -> AdapterEma | None:
    """Of a run that had ended and had none, there is none to save."""
    ema = ema_of(trainer)
    return None if ema is None or ema.average is None else ema


def _ema_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_ema")


def is_finished(trainer: Trainer, module: MaskedPriorModule) -> bool:
    """Whether a run was resumed that had trained all its steps."""
    return module.resumed is not None and 0 <= trainer.max_steps <= module.resumed["global_step"]


class Generations(Checkpoint):
    """Generates from prompts by base and LoRA from the same noise: at the start, every so many steps, and at the end.

    Nothing happens without prompts. Their embeddings come from the cache, so no text encoder is loaded. Several
    processes share the prompts. A sample that fails (out of memory, disk full) is said and does not end the run. As a
    `Checkpoint` it comes after the callbacks listed before it, so that a step is saved before it is generated.

    Args:
        folder: The run's output folder; `samples/step-000500/` holds PNG and MP4 files, as `save` writes them, and
            `samples/contact.png` shows all prompts over the steps.
        every_n_steps: Optimizer steps between two samples, >= 1.
        prompts: What is generated, as it was prepared.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: str, prompts: Prompts, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.samples.every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.prompts, self.every_n_steps = Path(folder) / "samples", prompts, every_n_steps
        self._ready: list[ReadyPrompt] = []
        self._bases: dict[str, torch.Tensor] = {}
        self._done_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse prompts that were not prepared, before the transformer is loaded."""
        del stage
        self.prompts.check(pl_module.architecture)
        data: LatentDataModule = trainer.datamodule
        self._ready = self.prompts.read(pl_module.architecture, data.cache)

    @property
    def ready(self) -> Sequence[ReadyPrompt]:
        """What is generated, with its embeddings; none without prompts."""
        return self._ready

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that had ended is not trained again, so what a kill left out at its end is made up for here."""
        if is_finished(trainer, pl_module):
            pl_module.restore_optimizer()
            self._generate(trainer, pl_module, pl_module.resumed["global_step"], missing=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The untrained adapter, which generates what the base does, or what a kill left out."""
        step = trainer.global_step
        if step % self.every_n_steps == 0:
            self._generate(trainer, pl_module, step, missing=step > 0)
        self._done_at = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._generate(trainer, pl_module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The finished adapter."""
        self._generate(trainer, pl_module, trainer.global_step)

    def _generate(self, trainer: Trainer, module: MaskedPriorModule, step: int, *, missing: bool = False) -> None:
        if not self._ready or step == self._done_at:
            return
        self._done_at = step
        with module.pace.pause():
            self._generate_step(trainer, module, step, missing=missing)

    def _generate_step(self, trainer: Trainer, module: MaskedPriorModule, step: int, *, missing: bool) -> None:
        folder = step_folder(self.folder, step)
        names = [generation_name(number, ready.prompt) for number, ready in enumerate(self._ready)]
        if missing and trainer.strategy.broadcast(all((folder / f"{name}.png").is_file() for name in names)):
            return
        try:
            self._generate_own(trainer, module, step)
        except (RuntimeError, OSError) as error:
            log.warning("the samples of step %d failed, training goes on: %s", step, error)
        trainer.strategy.barrier("samples")
        if trainer.is_global_zero:
            log.info("samples of step %d: %s", step, folder)
            self._show(trainer, folder, names, step)
        if (endings := endings_of(trainer)) is not None:
            endings.attend(trainer, module)

    def _show(self, trainer: Trainer, folder: Path, names: list[str], step: int) -> None:
        """Hand the samples of a step to the loggers, and renew the contact sheet."""
        for file in [folder / f"{name}.png" for name in names if (folder / f"{name}.png").is_file()]:
            for logger in trainer.loggers:
                log_image(logger, f"samples/{file.stem}", Image.open(file).convert("RGB"), step)
        try:
            write_contact(self.folder, self._ready)
        except OSError as error:
            log.warning("samples/%s could not be renewed, training goes on: %s", CONTACT, error)
        mark(self.folder)

    def _generate_own(self, trainer: Trainer, module: MaskedPriorModule, step: int) -> None:
        """This process's prompts."""
        endings = endings_of(trainer)
        share, first = list(enumerate(self._ready))[trainer.global_rank :: trainer.world_size], None
        encoders = module.architecture.load_encoders(module.device, module.memory.encoders)
        try:
            with module.evaluated_adapter(), trainer.precision_plugin.forward_context():
                for number, ready in share:
                    if endings is not None and endings.asked_to_end:
                        return
                    pair = generate(
                        module.architecture,
                        module.transformer,
                        encoders,
                        ready,
                        name=generation_name(number, ready.prompt),
                        device=module.device,
                        bases=self._bases,
                    )
                    save(replace(pair, step=step), step_folder(self.folder, step))
                    first = pair if number == 0 else first  # of the first process, which saves
        finally:
            encoders.release()
        for saver in [callback for callback in trainer.callbacks if first and isinstance(callback, Checkpoints)]:
            saver.illustrate(trainer, module, frame_image(first.lora[0]))
