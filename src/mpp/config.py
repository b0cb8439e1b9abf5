"""From what is typed to objects: where the configs lie, what is checked before anything runs, how errors read.

The class is the schema and the default, a YAML says only what differs. Each node is completed from its class before
overrides are applied, so that every setting can be typed, is shown by `--cfg job`, and is recorded.
"""

import difflib
import functools
import importlib.util
import inspect
import json
import logging
import os
import sys
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from mpp import cli
from mpp.files import is_out_of_space
from mpp.jobs import divide_output
from mpp.settings import default_settings, described_settings, locate

log = logging.getLogger("mpp")

_PACKAGED = Path(__file__).parent / "configs"  # in an installed wheel
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"
_NO_SPACE = "no space left to write"
_EXTRAS = {"bitsandbytes": "adamw8bit", "prodigyopt": "prodigy", "schedulefree": "schedulefree", "wandb": "wandb"}
_FROM_ELSEWHERE = {  # made from other groups, so nobody can set them here
    "lightning.Trainer": ("logger", "callbacks", "plugins", "default_root_dir"),
}

# ---------------------------------------------------------------- composing


def compose(command: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a command as its command line makes it.

    Args:
        command: Its name, e.g. `train`.
        words: What is typed after it.
    """
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose(command, cli.overrides(command, words))


def complete(node: DictConfig) -> None:
    """Add to a node, and all nodes in it, what their classes have defaults for and the YAML leaves out.

    A node with its own `_target_` is made anew from that class's defaults. One without, in the place of a setting that
    is a record by default, changes that record's values.
    """
    target = node.get("_target_")
    with open_dict(node):
        for name, default in _defaults(target).items() if isinstance(target, str) else ():
            value = node[name] if name in node.keys() and not _is_open(node, name) else None  # noqa: SIM118 (??? too)
            if name not in node.keys():  # noqa: SIM118
                node[name] = default
            elif isinstance(value, DictConfig) and _has_target(default) and "_target_" not in value:
                node[name] = OmegaConf.merge(default, value)
    for name in node:
        if not _is_open(node, name) and isinstance(node[name], DictConfig):
            complete(node[name])


def _is_open(node: DictConfig, name: Any) -> bool:  # noqa: ANN401
    """Whether a value is not there yet, or stands elsewhere."""
    return OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)


def _defaults(target: str) -> dict[str, Any]:
    package = target.split(".", maxsplit=1)[0]
    if importlib.util.find_spec(package) is None:
        return {}
    try:
        found = default_settings(locate(target))
    except ValueError:  # no such class, which `check_config` says
        return {}
    return {name: value for name, value in found.items() if name not in _FROM_ELSEWHERE.get(target, ())}


def _override(overrides: Sequence[Override], cfg: DictConfig) -> None:
    """Complete the configuration, and apply what was typed; classes first, as the other settings are theirs.

    Raises:
        ConfigCompositionException: A key is not known; names those that are, and the nearest.
    """
    typed = [replace(o, type=OverrideType.FORCE_ADD) if o.is_add() else o for o in overrides]
    classes = [o for o in typed if o.key_or_group.endswith("_target_")]
    try:
        _apply_overrides(classes, cfg)
        for name in cfg:
            if name != "hydra" and not _is_open(cfg, name) and isinstance(cfg[name], DictConfig):
                complete(cfg[name])
        _apply_overrides([o for o in typed if o not in classes], cfg)
    except ConfigCompositionException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
            raise ConfigCompositionException(_unknown_key(str(cause.full_key), cause.parent_node)) from None
        raise


_apply_overrides = ConfigLoaderImpl._apply_overrides_to_config  # noqa: SLF001
# Hydra has no hook between reading all YAML and applying what was typed.
ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_override)  # noqa: SLF001


def _unknown_key(key: str, parent: DictConfig) -> str:
    above, _, name = key.rpartition(".")
    settings = typing.cast(dict[str, Any] | None, OmegaConf.to_container(parent)) or {}
    target = settings.get("_target_")
    options = [str(option) for option in settings if not str(option).startswith("_") and option != "hydra"]
    missing = _missing_package(above, target) if target else None
    return missing or _unknown(key, name, options, target or above or "this command")


def _unknown(path: str, name: str, options: Iterable[str], owner: str) -> str:
    options = list(options)
    near = difflib.get_close_matches(name, options, 1)
    hint = f"nearest is {near[0]}; " if near else ""
    return f"{path} is not a setting of {owner}; {hint}it has {', '.join(options) or 'none'}"


def _help(_root_: DictConfig) -> str:
    """A template for Hydra's `--help`: the settings as they are now, explained by their classes."""
    record = typing.cast(dict[str, Any], OmegaConf.to_container(_root_, resolve=False))
    lines = described_settings({name: value for name, value in record.items() if name != "hydra"})
    head = "Settings are typed as KEY=VALUE, groups as GROUP=OPTION:\n\n$APP_CONFIG_GROUPS\n"
    return head + "\n".join(lines).replace("$", "$$")


OmegaConf.register_new_resolver("explained_settings", _help, replace=True)


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, for checkpoints and files."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


# ---------------------------------------------------------------- checking


def check_config(cfg: DictConfig) -> None:
    """Refuse settings that are missing, unknown or of the wrong type, and packages that are not installed, all at once.

    The constructors' signatures are the schema: names are compared with them for every node with a `_target_`, and
    values with the type hints where the class is of mpp.

    Raises:
        ValueError: Names each setting, what it must be, and what it is.
    """
    problems = [f"{key}=... is missing" for key in sorted(OmegaConf.missing_keys(cfg))]
    for path, node in _targets(plain_values(cfg), ""):
        problems += _problems(path, node)
    if problems:
        raise ValueError("\n".join(problems))


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from _targets(child, f"{path}.{name}" if path else name)


def _problems(path: str, node: dict[str, Any]) -> Iterator[str]:
    target = node["_target_"]
    missing = _missing_package(path, target)
    if missing:
        yield missing
        return
    try:
        function = locate(target)
    except ValueError as error:
        yield f"{path}: {error}"
        return
    try:
        known = inspect.signature(function).parameters
    except ValueError:  # a built-in type has none to compare with
        return
    options = [option for option in known if option not in _FROM_ELSEWHERE.get(target, ())]
    ours = target.split(".")[0] == "mpp" or target == "lightning.Trainer"
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function) if ours else {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in options and not open_ended:
            yield _unknown(f"{path}.{name}", name, options, target)
        elif ours and not _has_target(value) and value != "???":
            yield from (f"{path}.{name} {problem}" for problem in _mismatch(hints.get(name), value))


def _missing_package(path: str, target: str) -> str | None:
    package = target.split(".", maxsplit=1)[0]
    if importlib.util.find_spec(package) is not None:
        return None
    extra = f"; pip install 'mpp[{_EXTRAS[package]}]'" if package in _EXTRAS else ""
    return f"{path} needs the package {package}, which is not installed{extra}"


def _mismatch(hint: Any, value: Any) -> list[str]:  # noqa: ANN401
    try:
        adapter = TypeAdapter(hint)
    except Exception:  # noqa: BLE001 (a hint pydantic has no schema for, such as a protocol: nothing to compare)
        return []
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # JSON mode: a list may stand for a tuple
    except ValidationError as error:
        wishes = dict.fromkeys(item["msg"].removeprefix("Input ") for item in error.errors())
        return [f"{' or '.join(wishes)}, got {value!r}"]
    return []


def _has_target(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, dict) and "_target_" in value


def device_of(name: str) -> str:
    """A device's name; `auto` is the GPU where there is one, and each process of a node has its own."""
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return "cuda" if number is None else f"cuda:{int(number) % torch.cuda.device_count()}"


# ---------------------------------------------------------------- building and running


def build(node: DictConfig | None, **extra: Any) -> Any:  # noqa: ANN401
    """Instantiate a configuration node; errors of the constructor come out as they are.

    Raises:
        ValueError: As the constructor raises.
    """
    if node is None:
        return None
    complete(node)
    try:
        if extra:  # as arguments of `instantiate`, dataclasses would be taken for configuration
            return instantiate(node, _convert_="all", _partial_=True)(**extra)
        return instantiate(node, _convert_="all")
    except HydraException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def build_all(node: DictConfig | None) -> list[Any]:
    """Instantiate each entry of a group of named nodes; null entries are switched off."""
    return [build(child) for child in (node or {}).values() if child is not None]


def _said_by_main(failed: threading.ExceptHookArgs) -> None:
    """A thread of a logger that meets a full disk hands the error on to the main thread, which says it."""
    if failed.exc_value is None or not is_out_of_space(failed.exc_value):
        threading.__excepthook__(failed)


def command(name: str, task: Callable[[DictConfig], object]) -> Callable[[], None]:
    """The entry of a command: its words become a configuration, and that is what `task` gets.

    Bad input ends it with one message and exit code 1, not a traceback; `MPP_TRACEBACK=1` shows the traceback.

    Args:
        name: The command's, and its configuration's.
        task: What it does.
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> None:
        threading.excepthook = _said_by_main
        try:
            divide_output(cfg)
            task(cfg)
        except (ValueError, OSError, OmegaConfBaseException) as error:
            if os.environ.get("MPP_TRACEBACK"):
                raise
            if is_out_of_space(error) and _NO_SPACE not in str(error):  # a logger's, which names no file
                error = f"{_NO_SPACE} logs below {cfg.get('output_dir', '.')} ({error}): free space, run again"
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def main() -> None:
        """Command line entry."""
        cli.rewrite_arguments(name)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(run)()

    return main
