"""A run of training from its configuration to its end: what `python -m mpp.train` does once the words are read."""

import logging
import warnings
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.format import Cache, evenly_spread
from mpp.config import CONFIG_DIR, build, build_all, check_config, plain_values
from mpp.core.loss import MaskedPriorLoss
from mpp.files import check_writable, remove_leftovers
from mpp.jobs import begin_record, job_number, repeat_output
from mpp.logs import adopt, record
from mpp.lora.stack import base_fingerprint, check_model
from mpp.lora.starting import Start
from mpp.memory.bases import check_device
from mpp.memory.link import check_link
from mpp.recorded import followers, going_on
from mpp.reporting.findings import find
from mpp.reporting.rows import look_at
from mpp.reporting.run_page import render_run
from mpp.training.beginning import Beginning
from mpp.training.callbacks import Checkpoints, is_finished
from mpp.training.checkpoint import AtomicCheckpointIO, validation_is_due
from mpp.training.conclusion import ending, outcome
from mpp.training.ema import AdapterEma
from mpp.training.endings import Endings
from mpp.training.flags import check_flags, check_trainer, check_validation
from mpp.training.forecast import Forecast, out_of_memory
from mpp.training.history import RunPage
from mpp.training.module import MaskedPriorModule
from mpp.training.runs import newest
from mpp.training.schedule import planned_steps
from mpp.training.start_report import RunReport

log = logging.getLogger("mpp")

_LOOKED_AT = 500  # samples in which the start looks for what mpp.report finds


def train(cfg: DictConfig) -> tuple[lightning.Trainer, MaskedPriorModule]:
    """Train as configured; everything cheap is checked before the transformer is loaded.

    Returns:
        The finished trainer and module.

    Raises:
        ValueError: Bad settings, a cache or checkpoint that does not fit, a model that is not there.
    """
    adopt()
    resumption = going_on(cfg)
    check_config(cfg)
    settings = plain_values(cfg)
    check_flags(settings["trainer"], settings["callbacks"] or {})
    folder = Path(cfg.output_dir)
    architecture = build(cfg.model)
    module = MaskedPriorModule(
        architecture=architecture,
        adapter=build(cfg.lora),
        loss=build(cfg.loss),
        teacher=build(cfg.teacher),
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.schedule),
        seed=cfg.seed,
        val_sigmas=cfg.val_sigmas,
        compile_blocks=cfg.compile,
        memory=build(cfg.memory),
        provenance=settings,
        followers=followers(cfg),
        renew_rates=resumption is not None and resumption.decisions.renew_rates,
        held_after=resumption.held_after if resumption else None,
    )
    data = build(cfg.data, architecture=architecture)
    check_model(architecture, module.memory.base, module.memory.resident)
    module.start = None if resumption else Start.read(module.adapter, architecture)
    data.setup()
    check_preservation(module.loss, data)
    if not data.val_entries or settings["trainer"].get("limit_val_batches") == 0:
        recorded = resumption.record.get("config") if resumption else None
        defaults = {"trainer": plain_values(OmegaConf.load(CONFIG_DIR / "trainer" / "default.yaml"))}
        check_validation(settings, recorded or defaults)
    if resumption is not None:
        resumption.check_base(base_fingerprint(architecture))
        resumption.check_samples(data.training_set())
    trainer, endings = build_trainer(cfg, data, module, folder)
    if resumption is not None:
        resumption.check_processes(trainer.world_size)
    order = data.order(0, trainer.num_devices * trainer.num_nodes, limit=trainer.limit_train_batches)
    module.plan(planned_steps(trainer, order.stop))
    check_writable(folder, "output_dir")
    repeat_output(folder)
    if resumption is not None and trainer.is_global_zero:
        resumption.say(cfg.trainer.max_steps)
    with endings.handling(trainer):
        try:
            fit(trainer, module, data, resumption and resumption.checkpoint, validate_first=cfg.validate_first)
        finally:
            if trainer.is_global_zero:
                record(**outcome(trainer, module, folder))
    if trainer.is_global_zero:
        for line in ending(outcome(trainer, module, folder), folder):
            log.info(line)
    return trainer, module


def build_trainer(
    cfg: DictConfig, data: LatentDataModule, module: MaskedPriorModule, folder: Path
) -> tuple[lightning.Trainer, Endings]:
    """The Trainer with callbacks and loggers, and how it ends; no process is started yet.

    Raises:
        ValueError: Several processes in a sweep; a place for checkpoints where nobody looks; flags that Lightning
            refuses, or what it would choose by itself and is not known to work.
    """
    loggers = build_all(cfg.get("logger"))
    useless = (
        *([] if cfg.trainer.enable_progress_bar is not False else [ProgressBar]),
        *([] if loggers else [LearningRateMonitor]),
    )
    callbacks = [callback for callback in build_all(cfg.callbacks) if not isinstance(callback, useless)]
    savers = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
    for saver in savers:
        if saver.folder.resolve() != folder.resolve():
            raise ValueError(
                f"callbacks.checkpoints.folder={saver.folder}: a run is looked for in its output_dir={folder} when it "
                "is resumed, sampled from or exported; leave this out, and set output_dir"
            )
        saver.choose_formats(module)
    endings = Endings(savers[0].save if savers else lambda *_: False, folder)
    averages = [callback for callback in callbacks if isinstance(callback, AdapterEma)]  # complete when endings save
    others = [callback for callback in callbacks if callback not in averages]
    said = [line.text for line in build(cfg.sampling).lines]
    beginning = Beginning(partial(begin, cfg, folder), loggers, plain_values(cfg), said)
    for report in [callback for callback in callbacks if isinstance(callback, RunReport)]:
        report.findings = partial(found_in, data, module.loss)
    for page in [callback for callback in callbacks if isinstance(callback, RunPage)]:
        page.render = render_run
    try:
        trainer = build(
            cfg.trainer,
            limit_val_batches=cfg.trainer.limit_val_batches if data.val_entries else 0,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),  # of the user's own
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            callbacks=[beginning, *averages, endings, *others],
            logger=False,  # until the run begins
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(folder),
        )
    except (MisconfigurationException, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"Lightning refuses the settings of trainer: {error}") from error
    check_trainer(trainer, cfg.trainer.precision)
    check_device(module.memory.base, trainer.strategy.root_device)
    check_link(module.memory.resident, trainer.strategy.root_device)
    check_card(trainer, module, data)
    if trainer.num_devices * trainer.num_nodes > 1 and job_number() is not None:
        raise ValueError(
            "--multirun with several processes: each would go through the whole sweep; set trainer.devices=1, or start "
            "each job by a command of its own"
        )
    return trainer, endings


def found_in(data: LatentDataModule, loss: MaskedPriorLoss) -> str:
    """What `mpp.report` finds in some of a run's samples, counted; "" where it cannot look."""
    if not isinstance(data.cache, Cache):
        return ""
    identity = data.cache.identity()
    rows = [look_at(data.cache, entry, loss, identity) for entry in evenly_spread(data.train_entries, _LOOKED_AT)]
    found = find(rows, loss, data.cache.notes())
    counts = "; ".join(f"{finding.title}: {finding.count}" for finding in found)
    return f"findings of mpp.report (in {len(rows)} samples): {counts}" if found else ""


def begin(cfg: DictConfig, folder: Path) -> None:
    """Prepare a run's folder, which nobody else writes to, now that all is checked."""
    remove_leftovers(folder, older_than=0)
    begin_record(cfg, folder)


def fit(
    trainer: lightning.Trainer,
    module: MaskedPriorModule,
    data: LatentDataModule,
    checkpoint: Path | None,
    *,
    validate_first: bool,
) -> None:
    """Fit, after one validation of the untrained adapter to compare with."""
    # Points in the log are counted in optimizer steps across epochs, so short epochs lose none.
    warnings.filterwarnings("ignore", message="The number of training batches")
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start")  # layers of LoKr and LoHa
    warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`")  # Lightning 2.6, torch 2.13
    try:
        if validate_first and checkpoint is None and data.val_entries:
            trainer.validate(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if is_finished(trainer, module) and data.val_entries and validation_is_due(module.resumed["loops"], trainer):
            module.log_after(trainer.global_step - 1)  # as validations between steps are logged
            trainer.validate(module, datamodule=data, verbose=False)  # the last one, which a kill may have left out
    except MisconfigurationException as error:
        raise ValueError(f"Lightning refuses the settings: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(trainer, module, data, error)) from error
    except RuntimeError as error:
        if trainer.world_size == 1 or not is_lost_process(error):
            raise
        folder = Path(trainer.default_root_dir)
        last = newest(folder)
        raise ValueError(
            f"another process of this run has ended ({str(error).splitlines()[0][:200]}); it said why, unless it was "
            "killed. "
            + (f"The run goes on from {last} with resume={folder}" if last.is_file() else "No checkpoint was written")
        ) from error


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error of the backend says that another process is gone."""
    said = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in said or "nccl" in said


def check_card(trainer: lightning.Trainer, module: MaskedPriorModule, data: LatentDataModule) -> None:
    """Count what the run will take of its card, which the banner says, and choose what is left to be chosen.

    Raises:
        ValueError: Weights, adapter and optimizer alone are larger, or what waits is larger than the CPU's memory.
    """
    forecast = Forecast.of(trainer, module, data)
    if forecast is None:
        return
    forecast.check()
    module.memory = forecast.choice.memory
    for report in [callback for callback in trainer.callbacks if isinstance(callback, RunReport)]:
        report.forecast = forecast.say


def check_preservation(loss: MaskedPriorLoss, data: LatentDataModule) -> None:
    """Refuse preservation samples under a loss that would not preserve them.

    Raises:
        ValueError: No prior, a floor that would learn the samples' own images, or an area scale over the whole batch,
            whose mean they would lower.
    """
    if data.preservation.rate == 0:
        return
    if loss.prior_weight == 0:
        raise ValueError("data.preservation needs a prior; set loss.prior_weight above 0, or choose loss=threshold")
    if loss.mask_min_weight > 0 and loss.prior_threshold is None:
        raise ValueError(
            f"loss.mask_min_weight={loss.mask_min_weight} would train on the images of the preservation samples; "
            "set loss.mask_min_weight=0"
        )
    if loss.area_scale_beta > 0 and loss.normalization == "global":
        raise ValueError(
            f"loss.area_scale_beta={loss.area_scale_beta} scales by the mask's mean over the batch, which preservation "
            "samples would lower; set loss.normalization=per_sample"
        )
