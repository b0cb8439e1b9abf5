"""From what is typed to objects: where the configs lie, what is checked before anything runs, how errors read.

The class is the schema and the default, a YAML says only what differs. Each node is completed from its class before
overrides are applied, so that every setting can be typed, is shown by `--cfg job`, and is recorded.
"""

import argparse
import functools
import gc
import importlib.util
import logging
import os
import re
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mpp import cli, logs
from mpp.checks import (
    FROM_ELSEWHERE,
    ROLES,
    ROOTS,
    device_of,
    flattened,
    has_target,
    missing_package,
    problems,
    root_problems,
)
from mpp.files import is_out_of_space
from mpp.jobs import divide_output
from mpp.messages import Refused, nearest, no_option, plain_words, several, unknown, unreadable
from mpp.settings import default_settings, described_settings, look_up

__all__ = ["CONFIG_DIR", "build", "build_all", "check_config", "command", "complete", "compose", "device_of"]

log = logging.getLogger("mpp")

_PACKAGED = Path(__file__).parent / "configs"  # in an installed wheel
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"
_NO_SPACE = "no space left to write"
_RAISE = "HYDRA_FULL_ERROR"
_MISSPELT = 0.8  # how alike two names are of which one is meant for the other
_MAY_GO = {"logger", "experiment", "hydra"}  # of what a command has, what may be left out by ~NAME

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
            elif isinstance(value, DictConfig) and has_target(default) and "_target_" not in value:
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
        found = default_settings(look_up(target))
    except ValueError:  # no such class, which `check_config` says
        return {}
    return {name: value for name, value in found.items() if name not in FROM_ELSEWHERE.get(target, ())}


def renew(cfg: DictConfig) -> None:
    """Put settings that a YAML, or the record of a run, has by their older names to where they belong today.

    Raises:
        ValueError: It has the setting by its name of now as well, and they differ.
    """
    for older, (newer, values) in cli.OLDER["train"].items():
        value = str(OmegaConf.select(cfg, older)).lower()
        if value not in values:
            continue
        other = OmegaConf.select(cfg, newer)
        if other not in (None, values[value]):
            raise ValueError(f"{older}={value} is the older word for {newer}={values[value]}, which is {other} here")
        with open_dict(cfg):
            OmegaConf.update(cfg, newer, values[value])
            cfg[older] = None


def _override(overrides: Sequence[Override], cfg: DictConfig) -> None:
    """Complete the configuration, and apply what was typed; classes first, as the other settings are theirs.

    Raises:
        Refused: Keys are not known; names those that are, and the nearest.
    """
    typed = [replace(o, type=OverrideType.FORCE_ADD) if o.is_add() else o for o in overrides]
    classes = [o for o in typed if o.key_or_group.endswith("_target_")]
    found = list(_refused(classes, cfg))
    renew(cfg)
    for name in cfg:
        if name != "hydra" and not _is_open(cfg, name) and isinstance(cfg[name], DictConfig):
            complete(cfg[name])
    found += _refused([o for o in typed if o not in classes], cfg)
    if found:
        raise Refused(found, cfg)


def _refused(overrides: Sequence[Override], cfg: DictConfig) -> Iterator[str]:
    """Apply what was typed, and say what cannot be."""
    for override in overrides:
        try:
            _apply_overrides([override], cfg)
        except ConfigCompositionException as error:
            cause = error.__cause__
            if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
                yield _unknown_key(str(cause.full_key), override.key_or_group, cause.parent_node, cfg)
            elif override.is_delete() and OmegaConf.select(cfg, override.key_or_group) is None:
                near = nearest(override.key_or_group, _keys(cfg))
                yield f"{override.input_line}: there is nothing to leave out" + (
                    f"; did you mean ~{near}?" * bool(near)
                )
            else:
                yield f"{override.input_line}: {plain_words(error)}"


_apply_overrides = ConfigLoaderImpl._apply_overrides_to_config  # noqa: SLF001
# Hydra has no hook between reading all YAML and applying what was typed.
ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_override)  # noqa: SLF001


def _unknown_key(key: str, typed: str, parent: DictConfig, cfg: DictConfig) -> str:
    above = key.rpartition(".")[0]
    settings = typing.cast(dict[str, Any] | None, OmegaConf.to_container(parent)) or {}
    target = settings.get("_target_")
    options = [str(option) for option in settings if not str(option).startswith("_") and option != "hydra"]
    missing = missing_package(above, target) if target else None
    typed = typed.removesuffix("._target_")
    keys = flattened(_raw(cfg)) if typed.startswith("hydra.") else _keys(cfg)
    return missing or unknown(key, options, target or above or "this command", keys, typed=typed)


def _keys(cfg: DictConfig) -> list[str]:
    return [key for key in flattened(_raw(cfg)) if key.partition(".")[0] != "hydra"]


def _raw(cfg: DictConfig) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


# ---------------------------------------------------------------- what Hydra would say, or pass over


def _load(
    self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], run_mode: RunMode, **settings: bool
) -> DictConfig:
    """Hydra's composition; all that is wrong is said at once.

    Raises:
        Refused: Words that cannot be read, groups and options that there are not, settings that nobody reads.
    """
    parser, typed, found = OverridesParser.create(config_loader=self), list[Override](), list[str]()
    for word in overrides:
        try:
            (override,) = parser.parse_overrides([word])
        except HydraException:
            override = None
        if override is not None and override.key_or_group:
            typed.append(override)
        else:
            found.append(unreadable(word))
    repository = CachingConfigRepository(self.repository)
    self._process_config_searchpath(config_name, typed, repository)
    groups = [o for o in typed if repository.group_exists(o.key_or_group) and _chosen(o) is not None]
    ranges = run_mode is RunMode.RUN and settings.get("validate_sweep_overrides", True)
    wrong = {
        o.key_or_group if o.package is None else o.package: problem
        for o in typed
        for problem in (
            [several(str(o.input_line), group=o in groups)]
            if ranges and o.is_sweep_override()
            else _no_option(o, repository, groups)
        )
    }
    found += wrong.values()
    roots = _roots(config_name, repository) | {_short(o) for o in groups}
    plain = [o for o in groups if o.package is None and o.key_or_group in roots]  # a plus before them changes nothing
    lines = {id(o): str(o.input_line).lstrip("+") if o in plain else str(o.input_line) for o in typed}
    words = [lines[id(o)] for o in typed if _short(o) not in wrong]
    cfg = None
    try:
        cfg = _compose(self, config_name, words, run_mode, **settings)
        if config_name is not None and run_mode is RunMode.RUN:
            found += _unread(cfg, roots)
    except Refused as error:
        found += [*error.problems, *_unread(error.cfg, roots)]
        cfg = error.cfg
    except ConfigCompositionException as error:
        if not found:
            raise
        if not any(plain_words(error).startswith(f"{name}=") for name in wrong):
            found.append(plain_words(error))
    if found:
        more = problems(_without_hydra(cfg)) if isinstance(cfg, DictConfig) and _resolves(cfg) else []
        unsure = tuple(f"{name}{end}" for name in wrong for end in (".", " ", "="))
        raise Refused([*found, *(problem for problem in more if not problem.startswith(unsure))], cfg)
    assert cfg is not None
    return cfg


_compose = ConfigLoaderImpl.load_configuration
ConfigLoaderImpl.load_configuration = _load


def _short(override: Override) -> str:
    return override.package or override.key_or_group


def _chosen(override: Override) -> list[Any] | None:
    """The options that a word chooses of a group; None where it chooses none."""
    if override.is_sweep_override():
        return [str(option) for option in override.sweep_string_iterator()] if override.is_choice_sweep() else None
    value = override.value()
    if override.is_delete() or isinstance(value, dict):
        return None
    return value if isinstance(value, list) else [value]


def _no_option(override: Override, repository: CachingConfigRepository, groups: Sequence[Override]) -> Iterator[str]:
    if override not in groups:
        if override.key_or_group == "experiment" and not repository.group_exists("experiment"):  # a wheel has none
            yield no_option("experiment", str(override.value()), ())
        return
    options = repository.get_group_options(override.key_or_group, ObjectType.CONFIG)
    for option in _chosen(override) or ():
        there = isinstance(option, str) and option and repository.config_exists(f"{override.key_or_group}/{option}")
        if not there and option != "???":
            yield no_option(_short(override), "null" if option is None else str(option), options)


def _roots(config_name: str | None, repository: CachingConfigRepository) -> set[str]:
    """What a command's own configuration has at its top."""
    loaded = None if config_name is None else repository.load_config(config_name)
    if loaded is None or not isinstance(loaded.config, DictConfig):
        return set()
    found = {str(name) for name in loaded.config}
    for default in loaded.defaults_list or ():
        group, package = getattr(default, "group", None), default.package
        if group is not None:
            found |= {package or group} - {"hydra/job_logging"}
        elif not default.is_self():
            found |= _roots(default.path, repository)  # a configuration of the user's own, upon a command's
    return found


def _unread(cfg: Any, roots: set[str]) -> Iterator[str]:  # noqa: ANN401
    """What nobody reads, or misses: settings outside all classes, and what was left out."""
    settings = _raw(cfg)
    keys = [key for key in _keys(cfg) if key.partition(".")[0] in roots - {"experiment"}]
    for name, node in settings.items():
        if name == "experiment" or (name not in roots and not _is_meant(name, cfg, roots)):
            below = [] if has_target(node) else [key for key in flattened(node, name) if key.count(".") == 1]
            for key in below or [name]:
                yield unknown(name, sorted(roots - _MAY_GO), "this command", keys, typed=key)
        elif isinstance(node, Mapping) and "_target_" not in node and name != "hydra":
            entries = [entry for entry, child in node.items() if not (child is None or has_target(child))]
            entries = [entry for entry in entries if not OmegaConf.is_interpolation(cfg[name], entry)]
            if f"{name}.*" in ROLES:
                for entry in [entry for entry in entries if not isinstance(node[entry], Mapping)]:
                    entries.remove(entry)
                    yield f"{name}.{entry} must be null, or an object with its _target_, got {node[entry]!r}"
            for entry in entries:
                below = flattened(node[entry], f"{name}.{entry}") or [f"{name}.{entry}"]
                others = [str(other) for other in node if other not in entries]
                known = [key for key in keys if not f"{key}.".startswith(f"{name}.{entry}.")]
                yield unknown(f"{name}.{entry}", others, name, known, typed=below[0])
    for name in sorted(roots - settings.keys() - _MAY_GO - {"tool"}):
        yield f"{name}: ~{name} leaves out what the command needs"


def _is_meant(name: str, cfg: DictConfig, roots: set[str]) -> bool:
    """Whether a new setting at the top is there to be referred to, or an object of its own."""
    referred = re.search(rf"\$\{{{re.escape(name)}\b", OmegaConf.to_yaml(_without_hydra(cfg)))
    return bool(referred) or (has_target(_raw(cfg)[name]) and not get_close_matches(name, roots, 1, _MISSPELT))


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"])


def _resolves(cfg: DictConfig) -> bool:
    try:
        plain_values(_without_hydra(cfg))
    except OmegaConfBaseException:
        return False
    return True


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, for checkpoints and files."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


# ---------------------------------------------------------------- explaining


def explanation(command: str, words: Sequence[str]) -> str:
    """What `--help` prints: examples and where to read on, as the command's YAML says, then groups and settings.

    Args:
        command: Its name.
        words: What is typed besides.
    """
    flags = get_args_parser().parse_intermixed_args(list(words))
    folder = [f'hydra.searchpath=["{Path(flags.config_dir).absolute().as_uri()}"]'] if flags.config_dir else []
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        # As for a sweep: a group that must be chosen need not be, yet.
        cfg = loader.load_configuration(command, [*folder, *cli.overrides(command, flags.overrides)], RunMode.MULTIRUN)
        made = typing.cast(dict[str, Any], OmegaConf.to_container(cfg.hydra.runtime.choices))
        choices = {key: str(value) for key, value in reversed(made.items()) if "hydra/" not in key}
        options = {key: loader.get_group_options(key.partition("@")[0]) for key in choices}
    text = (CONFIG_DIR / f"{command}.yaml").read_text("utf-8")
    head = re.findall(r"^# ?(.*)\n", text[: text.index("defaults:")], re.MULTILINE)
    lines = [f"usage: python -m mpp.{command} [GROUP=OPTION ...] [SETTING=VALUE ...]", "", *head, "", "groups:"]
    for key, value in [choice for choice in choices.items() if options[choice[0]]]:
        chosen = "" if value in ("???", "None") else f" (now {value})"
        lines += textwrap.wrap(
            f"{key.rpartition('@')[2]}={'|'.join(options[key])}{chosen}", 118, subsequent_indent="  "
        )
    record = {name: value for name, value in _raw(cfg).items() if name != "hydra"}
    lines += described_settings(record, own={name: (hint, _comment(text, name)) for name, hint in ROOTS.items()})
    for key in [key for key in choices if key not in record and choices[key] == "???"]:
        for option in options[key]:
            node = typing.cast(DictConfig, OmegaConf.load(CONFIG_DIR / key / f"{option}.yaml"))
            complete(node)
            said = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
            lines += [f"\n{key}={option}", *(line.lstrip("\n") for line in described_settings(said, key))]
    return "\n".join(lines)


def _comment(text: str, name: str) -> str:
    """What a YAML says beside a setting."""
    found = re.search(rf"^{name}:[^#\n]*#(.*\n(?: +#.*\n)*)", text, re.MULTILINE)
    return " ".join(found[1].replace("#", " ").split()) if found else ""


# ---------------------------------------------------------------- checking


def check_config(cfg: DictConfig) -> None:
    """Refuse settings that are missing, unknown or of the wrong type, and packages that are not installed, all at once.

    Raises:
        ValueError: Names each setting, what it must be, and what it is.
    """
    found = problems(cfg)
    if found:
        raise ValueError("\n".join(found))


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
        if isinstance(error.__cause__, TypeError | ImportError) and not str(node.get("_target_")).startswith("mpp."):
            raise ValueError(f"{node.get('_target_')} cannot be made: {error.__cause__}") from error
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

    `--quiet` leaves on the console warnings and errors alone, and `--json` prints as the last line what the command has
    come to, or its error.

    Args:
        name: The command's, and its configuration's.
        task: What it does.
    """
    flags: set[str] = set()

    @functools.wraps(task)
    def run(cfg: DictConfig) -> None:
        threading.excepthook = _said_by_main
        try:
            divide_output(cfg)
            # before `task` imports what it works with; a run that goes on has its configuration from its record
            if not (cfg.get("resume") or cfg.get("ckpt_path")) or root_problems(plain_values(cfg)):
                check_config(cfg)
            gc.enable()
            with logs.speaking(quiet="--quiet" in flags):
                task(cfg)
        except (ValueError, OSError, OmegaConfBaseException) as error:
            if os.environ.get("MPP_TRACEBACK"):
                raise
            said = cli.in_short(name, plain_words(error))
            if is_out_of_space(error) and _NO_SPACE not in str(error):  # a logger's, which names no file
                said = f"{_NO_SPACE} logs below {cfg.get('output_dir', '.')} ({error}): free space, run again"
            logs.note(f"error: {said}")
            sys.exit(f"error: {said}")

    def main() -> None:
        """Command line entry."""
        with logs.recording(name, said="--json" in sys.argv[1:]):
            flags.clear()
            flags.update(cli.rewrite_arguments(name))
            _start(name, run)

    return main


def _start(name: str, run: Callable[[DictConfig], None]) -> None:
    """Let Hydra compose what is typed and run a command with it; or explain the command."""
    own = os.environ.get(_RAISE)
    os.environ[_RAISE] = "1"  # or Hydra would print errors in its own words, and exit
    gc.disable()  # reading classes and YAML makes a million small objects at once, which all stay: a quarter of it
    try:
        if _flags(name).help:
            print(explanation(name, sys.argv[1:]))
            return
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(run)()
    except (HydraException, OmegaConfBaseException, ValueError, OSError, yaml.YAMLError) as error:
        if os.environ.get("MPP_TRACEBACK"):
            raise
        sys.exit(f"error: {cli.in_short(name, plain_words(error))}")
    finally:
        gc.enable()
        os.environ.pop(_RAISE)
        os.environ.update({} if own is None else {_RAISE: own})


def _flags(name: str) -> argparse.Namespace:
    """What of the words is for Hydra itself; in `sys.argv` these now stand before all others, where it finds them.

    Raises:
        ValueError: There is no such flag, or it lacks its value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> typing.NoReturn:
        known = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001
        stray = [word for word in sys.argv[1:] if word in message.split() and word[:1] == "-"]
        near = get_close_matches(stray[0], known, 1) if stray else []
        hint = f"did you mean {near[0]}?" if near else f"python -m mpp.{name} --help explains what can be typed"
        raise ValueError(f"{message}; {hint}")

    parser.error = refuse
    flags = parser.parse_intermixed_args(sys.argv[1:])
    others = [word for word in sys.argv[1:] if word not in flags.overrides]
    sys.argv[1:] = [word for word in others if word != "--"] + flags.overrides
    return flags
