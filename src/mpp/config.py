"""From configuration to objects: where the configs lie, what is checked before anything runs, how errors read."""

import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

log = logging.getLogger("mpp")

_PACKAGED = Path(__file__).parent / "configs"  # in an installed wheel
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"
_EXTRAS = {"bitsandbytes": "adamw8bit", "prodigyopt": "prodigy", "schedulefree": "schedulefree", "wandb": "wandb"}


def as_record(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, for checkpoints and files."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def check_config(cfg: DictConfig) -> None:
    """Refuse values of the wrong type and packages that are not installed, all of them at once.

    The constructors' signatures are the schema: every node with an mpp `_target_` is compared with its type hints.

    Raises:
        ValueError: Names each setting, what it must be, and what it is.
    """
    record = as_record(cfg)
    problems = []
    for path, node in _targets(record, ""):
        package = node["_target_"].split(".")[0]
        if importlib.util.find_spec(package) is None:
            extra = f"; pip install 'mpp[{_EXTRAS[package]}]'" if package in _EXTRAS else ""
            problems.append(f"{path} needs the package {package}, which is not installed{extra}")
        elif package == "mpp":
            problems += _type_problems(path, node)
    if problems:
        raise ValueError("\n".join(problems))


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from _targets(child, f"{path}.{name}" if path else name)


def _type_problems(path: str, node: dict[str, Any]) -> list[str]:
    target = node["_target_"]
    function = get_class(target) if inspect.isclass(_locate(target)) else _locate(target)
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    known = inspect.signature(function).parameters
    problems = []
    for name, value in node.items():
        if name.startswith("_") or _has_target(value):
            continue
        if name not in known:
            options = ", ".join(p for p in known if p != "self")
            problems.append(f"{path}.{name} is not a setting of {target}; it has {options}")
            continue
        problems += [f"{path}.{name} {problem}" for problem in _mismatch(hints.get(name), value)]
    return problems


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


def _locate(target: str) -> Any:  # noqa: ANN401
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def device_of(name: str) -> str:
    """A device's name; `auto` is the GPU where there is one, and each process of a node has its own."""
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return "cuda" if number is None else f"cuda:{int(number) % torch.cuda.device_count()}"


def build(node: DictConfig | None, **extra: Any) -> Any:  # noqa: ANN401
    """Instantiate a configuration node; errors of the constructor come out as they are.

    Raises:
        ValueError: As the constructor raises.
    """
    if node is None:
        return None
    try:
        return instantiate(node, _convert_="all", **extra)
    except HydraException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def build_all(node: DictConfig | None) -> list[Any]:
    """Instantiate each entry of a group of named nodes; null entries are switched off."""
    return [build(child) for child in (node or {}).values() if child is not None]


def accept_lora() -> None:
    """Let `lora=FILE` name a LoRA on the command line.

    It is a group of the training configs, so Hydra would look for a config of that name.
    """
    sys.argv[1:] = [re.sub("^lora=", "lora_path=", word) for word in sys.argv[1:]]


def entry(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """Run a task from the command line: bad input ends it with one message and exit code 1, not a traceback.

    `MPP_TRACEBACK=1` shows the traceback.
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except (ValueError, OSError, OmegaConfBaseException) as error:
            if os.environ.get("MPP_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return run
