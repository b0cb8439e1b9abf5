"""Which flags of Lightning's Trainer a run may set: each does what it says, or is refused with a way that works.

A flag that stands in no table here is refused by the tests, so that a new version of Lightning brings none unseen.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
DDP_SETTINGS = (  # of DDPStrategy, where it is given as a class
    "find_unused_parameters",
    "process_group_backend",
    "timeout",
    "gradient_as_bucket_view",
    "bucket_cap_mb",
)
PRECISIONS = (None, "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
CALLBACKS = (  # Lightning's own; others save, resume, accumulate or change weights in ways that a run does not
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateMonitor",
    "RichProgressBar",
    "TQDMProgressBar",
)


class Flag(NamedTuple):
    """What a flag may be.

    Args:
        accepts: Whether a plain value is accepted; None stands for all that Lightning takes.
        way: Why others are refused, and how to get what they mean.
    """

    accepts: Callable[[Any], bool] | None = None
    way: str = ""


def _only(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _limit(value: Any) -> bool:  # noqa: ANN401
    """A number of batches, or a share of them."""
    return value is None or (0 < value <= 1 if isinstance(value, float) else value >= 1)


def _strategy(value: Any) -> bool:  # noqa: ANN401
    if not isinstance(value, Mapping):
        return str(value).lower() in STRATEGIES
    if value.get("_target_") not in {
        f"{DDPStrategy.__module__}.DDPStrategy",
        "lightning.pytorch.strategies.DDPStrategy",
    }:
        return False
    known = inspect.signature(DDPStrategy).parameters
    return all(
        name in DDP_SETTINGS or name.startswith("_") or (name in known and setting == known[name].default)
        for name, setting in value.items()
    )


def _time(value: Any) -> bool:  # noqa: ANN401
    parts = value.values() if isinstance(value, Mapping) else str(value).split(":")
    return value is None or any(str(part).strip("0") for part in parts)


FLAGS = {
    "accelerator": Flag(_only("auto", "cpu", "gpu", "cuda", "mps"), "must be auto, cpu, gpu, cuda or mps"),
    "strategy": Flag(
        _strategy,
        f"is not known to train right here; those that are: {', '.join(STRATEGIES)}, and DDPStrategy as _target_ with "
        f"{', '.join(DDP_SETTINGS)}. A model that is too large for one GPU has no strategy yet",
    ),
    "devices": Flag(),
    "num_nodes": Flag(lambda value: value >= 1, "must be at least 1"),
    "precision": Flag(
        lambda value: (None if value is None else str(value)) in PRECISIONS,
        "must be 32-true, bf16-mixed or 16-mixed: the others would round the float32 adapter, or need float64 weights; "
        "the base model's own precision is model.dtype",
    ),
    "fast_dev_run": Flag(
        _only(False, 0),
        "would leave a LoRA and a checkpoint of a few steps like a finished run's; set trainer.max_steps=2 and an "
        "output_dir to throw away",
    ),
    "max_epochs": Flag(
        lambda value: value is None or value == -1 or value >= 1, "must be at least 1, or -1 for no end"
    ),
    "min_epochs": Flag(),
    "max_steps": Flag(lambda value: value == -1 or value >= 1, "must be at least 1, or -1 for no end"),
    "min_steps": Flag(),
    "max_time": Flag(_time, "would end before the first step"),
    "limit_train_batches": Flag(_limit, "must be a number of batches, at least 1, or a share in (0, 1.0]"),
    "limit_val_batches": Flag(
        lambda value: value == 0 or _limit(value),
        "must be a number of batches or a share in [0, 1.0]; 0 switches it off",
    ),
    "limit_test_batches": Flag(
        _only(None), "has no effect: a run tests nothing; trainer.limit_val_batches is for validation"
    ),
    "limit_predict_batches": Flag(
        _only(None), "has no effect: a run predicts nothing; sampling.prompts says what is generated"
    ),
    "overfit_batches": Flag(
        _only(0, 0.0), "would take other batches in each epoch; prepare a cache of the few images that are meant"
    ),
    "val_check_interval": Flag(),
    "check_val_every_n_epoch": Flag(lambda value: value is None or value >= 1, "must be at least 1"),
    "num_sanity_val_steps": Flag(),
    "log_every_n_steps": Flag(lambda value: value is None or value >= 1, "must be at least 1; ~logger logs nothing"),
    "enable_checkpointing": Flag(
        _only(None, True), "is what callbacks.checkpoints says; callbacks.checkpoints=null saves nothing"
    ),
    "enable_progress_bar": Flag(),
    "enable_model_summary": Flag(),
    "accumulate_grad_batches": Flag(lambda value: value >= 1, "must be at least 1"),
    "gradient_clip_val": Flag(lambda value: value is None or value >= 0, "must be at least 0; 0 or null: no clipping"),
    "gradient_clip_algorithm": Flag(_only(None, "norm", "value"), "must be norm or value"),
    "deterministic": Flag(),
    "benchmark": Flag(),
    "inference_mode": Flag(),
    "use_distributed_sampler": Flag(_only(False), "has no effect: batches are divided among processes by mpp itself"),
    "profiler": Flag(
        lambda value: isinstance(value, Mapping) or value in (None, "simple", "advanced", "pytorch"),
        "must be simple, advanced or pytorch",
    ),
    "detect_anomaly": Flag(),
    "barebones": Flag(
        _only(False),
        "would save no LoRA; what takes time is switched off by itself: validate_first=false callbacks.report=null "
        "callbacks.samples=null trainer.enable_progress_bar=false",
    ),
    "sync_batchnorm": Flag(_only(False), "has no effect: no model has batch normalisation"),
    "reload_dataloaders_every_n_epochs": Flag(_only(0), "has no effect: a cache does not change while a run reads it"),
    "enable_autolog_hparams": Flag(
        _only(True), "has no effect: checkpoint, LoRA and .hydra/config.yaml hold the settings"
    ),
    "model_registry": Flag(_only(None), "has no effect: nothing is uploaded"),
}


def check_flags(trainer: Mapping[str, Any], callbacks: Mapping[str, Any]) -> None:
    """Refuse flags and callbacks of Lightning that would do nothing, or something else than they say.

    Args:
        trainer: The flags as plain values.
        callbacks: The configured callbacks by their names in the configuration.

    Raises:
        ValueError: Names each of them, with the way to what is meant.
    """
    problems = [
        f"trainer.{name}={trainer[name]} {flag.way}"
        for name, flag in FLAGS.items()
        if name in trainer and flag.accepts is not None and not flag.accepts(trainer[name])
    ]
    kinds = {name: str(node["_target_"]) for name, node in callbacks.items() if node}
    problems += [
        f"callbacks.{name}: {kind} does not go with how a run saves, resumes and accumulates; those of Lightning "
        f"that do: {', '.join(CALLBACKS)}"
        for name, kind in kinds.items()
        if kind.startswith(("lightning.", "pytorch_lightning.")) and kind.rpartition(".")[2] not in CALLBACKS
    ]
    if not problems:  # values of the right kind alone can be compared with each other
        stops = trainer.get("max_time") is not None or any(kind.endswith(".EarlyStopping") for kind in kinds.values())
        problems = list(_contradictions(trainer, stops=stops))
    if problems:
        raise ValueError("\n".join(problems))


def _contradictions(trainer: Mapping[str, Any], *, stops: bool) -> Iterator[str]:
    """Flags that make sense together only, and are not.

    Args:
        trainer: The flags.
        stops: Whether something may end the run before its last step.
    """
    steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    if steps == -1 and epochs in (None, -1) and trainer.get("max_time") is None:
        yield "the run has no end; set trainer.max_steps, trainer.max_epochs or trainer.max_time"
    for name, most in (("min_steps", steps), ("min_epochs", -1 if epochs is None else epochs)):
        least = trainer.get(name)
        if least is not None and not stops:
            yield (
                f"trainer.{name}={least} has no effect where nothing stops the run early; set trainer.max_steps or "
                "trainer.max_epochs, or trainer.max_time with it"
            )
        elif least is not None and -1 < most < least:
            yield f"trainer.{name}={least} is more than trainer.{name.replace('min', 'max')}={most}"
    if trainer.get("gradient_clip_algorithm") is not None and not trainer.get("gradient_clip_val"):
        yield "trainer.gradient_clip_algorithm has no effect without trainer.gradient_clip_val; set it too"
    if trainer.get("deterministic") and trainer.get("benchmark"):
        yield "trainer.benchmark=true chooses kernels by their speed, which trainer.deterministic rules out; set one"
    if trainer.get("check_val_every_n_epoch") is None and isinstance(trainer.get("val_check_interval"), float):
        yield (
            f"trainer.val_check_interval={trainer['val_check_interval']} is a share of an epoch and needs "
            "trainer.check_val_every_n_epoch=1; a whole number counts batches across epochs"
        )


def check_validation(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse settings of a validation that does not take place.

    Args:
        settings: All of a run's settings as plain values.
        usual: Those that nobody has asked for: the defaults; of a run that goes on, the recorded ones.

    Raises:
        ValueError: Names each of them, with what makes a validation.
    """
    flags = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "num_sanity_val_steps")
    set_here = {f"trainer.{name}": (settings["trainer"].get(name), usual["trainer"].get(name)) for name in flags}
    set_here["val_sigmas"] = settings["val_sigmas"], usual.get("val_sigmas")
    off = settings["trainer"].get("limit_val_batches") == 0
    useless = [
        f"{name}={value}"
        for name, (value, default) in set_here.items()
        if value != default and not (off and name.endswith("limit_val_batches"))
    ]
    if useless:
        raise ValueError(
            f"{', '.join(useless)}: without effect, since "
            + ("trainer.limit_val_batches=0 switches validation off" if off else "there are no validation samples")
            + "; set data.val_fraction=0.1, say, or prepare some with data.val_image_dir, or leave this out"
        )


def check_trainer(trainer: Trainer, precision: Any) -> None:  # noqa: ANN401
    """Refuse what Lightning chose by itself, where it is not what was asked for, or not known to train right.

    Args:
        trainer: As built; no process was started yet.
        precision: `trainer.precision` as it was asked for.

    Raises:
        ValueError: As above, with the way.
    """
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__} on this machine, which {FLAGS['strategy'].way}"
        )
    if strategy.launcher is not None and strategy.launcher.is_interactive_compatible:
        raise ValueError(
            "Lightning would start several processes by fork here, in a notebook; set trainer.devices=1, or start "
            "`python -m mpp.train` by itself"
        )
    if str(precision) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise ValueError(f"trainer.precision={precision} needs a GPU; on this machine bf16-mixed or 32-true work")
    started, meant = int(os.environ.get("WORLD_SIZE", "1")), trainer.num_devices * trainer.num_nodes
    outside = "TORCHELASTIC_RUN_ID" in os.environ
    if outside and started != meant:
        raise ValueError(
            f"{started} processes were started for a run of {meant}; set trainer.strategy=ddp, and trainer.devices and "
            "trainer.num_nodes to what torchrun was given"
        )
    if trainer.num_nodes > 1 and not outside and not {"MASTER_ADDR", "SLURM_NTASKS"} & os.environ.keys():
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} waits for processes that nobody starts; start the command on each "
            "node by torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there"
        )
