"""The configuration of a run that goes on: the recorded one, and what is typed on top.

A checkpoint holds the resolved configuration of its run, and which settings followed from others. Hydra composes from
its YAML; where a start asks to go on, the recorded settings take their place before what is typed is applied.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mpp.config import complete, plain_values, renew
from mpp.messages import is_readable
from mpp.training.resuming import SWITCHES, Decisions, Reached, Switches, decide, rule_of

if TYPE_CHECKING:
    from mpp.batching.training_set import TrainingSet

log = logging.getLogger("mpp")

FOLLOWING = {  # what followed from other settings in 0.1.0, whose checkpoints do not say it
    "data.seed": "${seed}",
    "callbacks.report.folder": "${output_dir}",
    "callbacks.checkpoints.folder": "${output_dir}",
    "callbacks.checkpoints.exports": "${export}",
    "callbacks.samples.folder": "${output_dir}",
    "callbacks.samples.prompts": "${sampling}",
    "logger.csv.save_dir": "${output_dir}",
    "logger.csv.version": "csv/${now:%Y-%m-%d_%H-%M-%S}",
    "logger.tensorboard.save_dir": "${output_dir}",
    "logger.wandb.save_dir": "${output_dir}",
}
_PROGRESS = "mpp.training.progress.Progress"
MOVED = {  # classes by their names in 0.1.0
    "mpp.callbacks.Checkpoints": "mpp.training.callbacks.Checkpoints",
    "mpp.callbacks.LossBar": _PROGRESS,
    "mpp.training.callbacks.LossBar": _PROGRESS,
    "mpp.callbacks.RunReport": "mpp.training.start_report.RunReport",
    "mpp.callbacks.Samples": "mpp.training.callbacks.Generations",
    "mpp.data.datamodule.LatentDataModule": "mpp.batching.datamodule.LatentDataModule",
    "mpp.data.preservation.Preservation": "mpp.batching.preservation.Preservation",
    "mpp.data.prompts.Prompts": "mpp.sampling.prompts.Prompts",
    "mpp.models.adapters.Adapter": "mpp.lora.adapters.Adapter",
    "mpp.models.base.LatentSpec": "mpp.models.contract.LatentSpec",
    "mpp.teacher.Teacher": "mpp.training.teacher.Teacher",
}
_START = ("resume", "ckpt_path", "output_dir", *SWITCHES)  # what each start says for itself
_LENGTH = "schedule.num_training_steps"

# ---------------------------------------------------------------- composing


def _load(
    self: ConfigLoaderImpl,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    **settings: bool,
) -> DictConfig:
    """Hydra's composition; of a start that asks to go on, with the recorded settings under what is typed.

    What is wrong with the checkpoint is not said here, since Hydra would make a traceback of it: `going_on` says it.
    """

    def composed(words: list[str]) -> DictConfig:
        return _compose(self, config_name, words, run_mode, **settings)

    asked = any(word.lstrip("+").startswith(("resume=", "ckpt_path=")) for word in overrides)
    if config_name != "train" or run_mode is RunMode.MULTIRUN or not asked or not all(map(is_readable, overrides)):
        return composed(overrides)
    from mpp.training.checkpoint import read_checkpoint
    from mpp.training.runs import asked_checkpoint, folder_of

    typed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
    groups = _keys(typed) & set(self.list_groups(""))
    late = [o for o in typed if o.key_or_group not in {*groups, *_START} and not o.is_hydra_override()]
    cfg = composed([str(o.input_line) for o in typed if o not in late])
    # A typed folder may follow from settings that are typed as well.
    follows = any(o.key_or_group == "output_dir" and "${" in str(o.input_line) for o in typed)
    folder = Path((composed(overrides) if follows else cfg).output_dir)
    try:
        checkpoint = asked_checkpoint(cfg.resume, cfg.ckpt_path, folder)
        base = None if checkpoint is None else recorded_settings(read_checkpoint(checkpoint).get("mpp"))
    except ValueError:
        return composed(overrides)
    if checkpoint is None or base is None:
        return composed(overrides)
    with open_dict(cfg):
        if "output_dir" not in _keys(typed):
            cfg.output_dir = str(folder_of(checkpoint) or cfg.output_dir)
        _lay_under(cfg, base, {str(name) for name in cfg} if "experiment" in groups else groups)
    present = [o for o in late if not o.is_delete() or OmegaConf.select(cfg, o.key_or_group) is not None]
    ConfigLoaderImpl._apply_overrides_to_config(present, cfg)  # noqa: SLF001
    cfg.hydra.overrides.task = [o.input_line for o in typed if not o.is_hydra_override()]
    return cfg


_compose = ConfigLoaderImpl.load_configuration
ConfigLoaderImpl.load_configuration = _load


def _keys(typed: Sequence[Override]) -> set[str]:
    return {override.key_or_group for override in typed}


def _lay_under(cfg: DictConfig, base: DictConfig, groups: set[str]) -> None:
    """Put recorded values in place of composed ones; where a group was typed, only in place of what is missing."""
    for name, value in _raw(base).items():
        if name in _START or name not in cfg:
            continue
        if name not in groups:
            cfg[name] = value
        elif isinstance(value, Mapping) and isinstance(cfg[name], DictConfig):
            for key in [key for key in cfg[name] if OmegaConf.is_missing(cfg[name], key) and key in value]:
                cfg[name][key] = value[key]


# ---------------------------------------------------------------- what is recorded


def followers(cfg: DictConfig) -> dict[str, str]:
    """Settings that follow from others, by key, as the configuration says it."""
    found: dict[str, str] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for name, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{path}{name}.")
            elif isinstance(value, str) and "${" in value:
                found[f"{path}{name}"] = value

    walk(_raw(cfg), "")
    return found


def recorded_settings(record: Mapping[str, Any] | None, *, follow: bool = True) -> DictConfig | None:
    """The configuration that a checkpoint's record holds, by today's names and complete; None where it holds none.

    Args:
        record: The checkpoint's own part.
        follow: Let settings follow from others as they did; otherwise all are as they were.
    """
    if not record or not record.get("config"):
        return None
    base = OmegaConf.create(_renamed(record["config"]))
    if "resuming" not in record and OmegaConf.select(base, _LENGTH) == OmegaConf.select(base, "trainer.max_steps"):
        OmegaConf.update(base, _LENGTH, None)  # the run's own, which 0.1.0 wrote as a number
    if "resuming" not in record and base.get("callbacks") is not None:
        base.callbacks.setdefault("ema", {"_target_": "mpp.training.ema.AdapterEma"})  # which 0.1.0 did not have
    base.setdefault("memory", {"_target_": "mpp.memory.settings.Memory"})  # which older versions did not have
    renew(base)
    for name in base:
        if isinstance(base[name], DictConfig):
            complete(base[name])
    if follow:
        for key, value in record.get("resuming", {}).get("followers", FOLLOWING).items():
            was, rule = OmegaConf.select(base, key, default=base), rule_of(key)
            own = rule is not None and rule.verdict == "new"
            if was is not base and (own or "resuming" in record or was == OmegaConf.select(base, value[2:-1])):
                OmegaConf.update(base, key, value)
    return base


def _renamed(node: Any) -> Any:  # noqa: ANN401
    """Plain values with classes by their names of today."""
    if isinstance(node, Mapping) and MOVED.get(str(node.get("_target_"))) == _PROGRESS:  # was a bar of Lightning's
        return {"_target_": _PROGRESS, "bar": "${trainer.enable_progress_bar}"}
    if isinstance(node, Mapping):
        return {
            name: _class_of(value) if name == "_target_" and isinstance(value, str) else _renamed(value)
            for name, value in node.items()
        }
    return [_renamed(value) for value in node] if isinstance(node, list | tuple) else node


def _class_of(target: str) -> str:
    module, _, name = target.rpartition(".")
    if module.startswith("mpp.models.") and target not in MOVED and importlib.util.find_spec(module) is None:
        return f"{module.replace('mpp.models.', 'mpp.models.families.')}.{name}"  # where those of families have gone
    return MOVED.get(target, target)


def _raw(cfg: DictConfig) -> dict[str, Any]:
    return {
        str(name): value for name, value in dict(OmegaConf.to_container(cfg, resolve=False)).items() if name != "hydra"
    }


# ---------------------------------------------------------------- going on


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from, and how; nothing in here holds the checkpoint's file open, which will be replaced.

    Attributes:
        checkpoint: The file.
        record: Its own part: how it was made.
        tensors: Names of the adapter's tensors in it.
        at: Where the run is.
        decisions: What has changed.
        held_after: Optimizer steps after which the learning rate stays, since its schedule is kept; None: it does not.
    """

    checkpoint: Path
    record: Mapping[str, Any]
    tensors: tuple[str, ...]
    at: Reached
    decisions: Decisions
    held_after: int | None

    def check_base(self, base: str | None) -> None:
        """Refuse another base model, by its fingerprint; None: it is not known yet.

        Raises:
            ValueError: As above.
        """
        from mpp.training.checkpoint import check_checkpoint

        check_checkpoint({"mpp": self.record, "state_dict": self.tensors}, base=base, seed=self.record["seed"])

    def check_samples(self, now: "TrainingSet") -> None:
        """Refuse other samples than those the run began with; older checkpoints do not say which.

        Raises:
            ValueError: As above.
        """
        was = self.record.get("resuming", {}).get("samples")
        for remark in [] if was is None else type(now).from_record(was).check(now):
            log.warning("going on: %s", remark)

    def check_processes(self, count: int) -> None:
        """Refuse another number of processes than the run had; older checkpoints do not say how many.

        Raises:
            ValueError: As above.
        """
        was = self.record.get("resuming", {}).get("processes", count)
        if was != count:
            raise ValueError(
                f"the run had {was} processes, and this start has {count}: each has its own place in the epoch and its "
                f"part of a batch; go on with {was}, by trainer.devices and trainer.num_nodes"
            )

    def say(self, end: int) -> None:
        """Tell the user.

        Args:
            end: Optimizer steps of the run; -1: epochs alone decide.
        """
        log.info("going on from %s at step %d", self.checkpoint, self.at.step)
        for change in self.decisions.applied:
            log.info("changed from here on: %s", change)
        if 0 <= end <= self.at.step:
            log.info("that is its end; trainer.max_steps=%d, say, makes it longer", 2 * max(end, 1))
        if self.held_after is not None:
            stays = f"its rate stays what it is there, {self.at.rate:g} now"
            log.info("the schedule was made for %d steps and is kept: after them %s", self.held_after, stays)
            if self.at.rate == 0 and self.at.step >= self.held_after:
                log.warning("with that rate nothing more is learned; resume_schedule=new makes rates for this length")


def going_on(cfg: DictConfig) -> Resumption | None:
    """What this start goes on from; None: it begins a run. What is kept against the configuration is put into it.

    Raises:
        ValueError: There is nothing to go on from, something would be overwritten, or settings are typed that cannot
            change; names all of them.
    """
    from mpp.training.checkpoint import check_checkpoint
    from mpp.training.runs import asked_checkpoint, begun, resumed

    switches = Switches(cfg.resume_lr, cfg.resume_schedule)
    folder = Path(cfg.output_dir)
    checkpoint = asked_checkpoint(cfg.resume, cfg.ckpt_path, folder)
    if checkpoint is None:
        if switches.typed():
            raise ValueError(
                f"{' and '.join(switches.typed())} is for a run that goes on; say which, with resume=FOLDER"
            )
        begun(folder)
        return None
    content = resumed(checkpoint, folder)
    record = content.get("mpp") or {}
    check_checkpoint(content, base=None, seed=record.get("seed"))
    base, said = recorded_settings(record, follow=False), record.get("resuming", {})
    written = OmegaConf.create(record.get("config") or {})
    made_for = said.get("schedule_steps", OmegaConf.select(written, _LENGTH))
    rate = float(content["optimizer_states"][0]["param_groups"][0]["lr"])
    held = said.get("held_after")
    at = Reached(content["global_step"], rate, made_for, held)
    decisions = Decisions((), renew_rates=False, keep_schedule=False)
    if base is not None:
        if switches.resume_schedule == "new":
            held = None
            if OmegaConf.select(cfg, _LENGTH) == made_for is not None:  # it may have been kept until now
                OmegaConf.update(cfg, _LENGTH, None)
        decisions = decide(plain_values(base), plain_values(cfg), switches, followers(cfg), at)
    if decisions.keep_schedule:
        cfg.schedule, held = base.schedule, made_for or base.trainer.max_steps
    if not Path(cfg.data.cache_dir).expanduser().exists():
        raise ValueError(
            f"data.cache_dir={cfg.data.cache_dir} is not there; where the run's cache has moved, type "
            "data.cache_dir=FOLDER besides"
        )
    return Resumption(checkpoint, record, tuple(content["state_dict"]), at, decisions, held)
