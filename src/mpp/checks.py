"""What is wrong with a composed configuration: names, types, classes in the wrong position, packages, devices."""

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mpp.messages import unknown
from mpp.settings import look_up, reasons, type_hints

FROM_ELSEWHERE = {  # made from other groups, so nobody can set them here
    "lightning.Trainer": ("logger", "callbacks", "plugins", "default_root_dir"),
}
ROOTS: dict[str, Any] = {  # settings that belong to no class, by their types
    "seed": int,
    "output_dir": str,
    "resume": str | None,
    "resume_lr": Literal["new"] | None,
    "resume_schedule": Literal["keep", "new"] | None,
    "ckpt_path": str | None,
    "gradient_checkpointing": bool | None,
    "compile": bool,
    "val_sigmas": Sequence[float] | None,
    "validate_first": bool,
    "device": str,
    "lora_path": str | Sequence[str] | None,
    "export_dir": str | None,
}
ROLES = {  # what the class of a node must be; `*` stands for each of a group
    "model": "mpp.models.contract.Architecture",
    "optimizer": "torch.optim.Optimizer",
    "schedule": "torch.optim.lr_scheduler.LRScheduler",
    "trainer": "lightning.Trainer",
    "callbacks.*": "lightning.Callback",
    "logger.*": "lightning.pytorch.loggers.Logger",
}
_EXTRAS = {"bitsandbytes": "adamw8bit", "prodigyopt": "prodigy", "schedulefree": "schedulefree", "wandb": "wandb"}
_OF_OBJECTS = ("is_instance_of", "needs_python_object")  # what pydantic says of types that no YAML can write
_NEEDS = {"WandbLogger": "wandb"}  # packages that a class of another one needs


def problems(cfg: DictConfig) -> list[str]:
    """All that is wrong, one line each.

    The constructors' signatures are the schema: names are compared with them for every node with a `_target_`, and
    values with the type hints where the class is of mpp.
    """
    found = [_missing(cfg, key) for key in sorted(OmegaConf.missing_keys(cfg))]
    settings = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    wrong = root_problems(settings)
    found += wrong
    keys = flattened(settings)
    followers = [key for key in keys if _follows(cfg, key, {problem.split()[0] for problem in wrong})]
    for path, node in _targets(settings, ""):
        found += [problem for problem in _problems(path, node, keys) if problem.split()[0] not in followers]
    if settings.get("device") and isinstance(settings["device"], str):
        found += _device_problems("device", settings["device"])
    trainer = settings.get("trainer")
    if has_target(trainer) and trainer.get("accelerator") in ("gpu", "cuda") and not _has_gpu(trainer["accelerator"]):
        found.append(
            f"trainer.accelerator={trainer['accelerator']}: torch finds no GPU here; trainer.accelerator=auto takes "
            "what there is, cpu needs none"
        )
    return list(dict.fromkeys(found))


def root_problems(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the settings that belong to no class."""
    known = {name: hint for name, hint in ROOTS.items() if settings.get(name, "???") != "???"}
    return [
        *(f"{name}= is empty" for name in known if settings[name] == ""),
        *(f"{name} {problem}" for name, hint in known.items() for problem in _mismatch(hint, settings[name])),
    ]


def _missing(cfg: DictConfig, key: str) -> str:
    above, _, name = key.rpartition(".")
    target = OmegaConf.select(cfg, f"{above}._target_") if above else None
    said = reasons(look_up(target)).get(name, "") if str(target).startswith("mpp.") else ""
    meaning = f" ({said.rstrip('.')})" if said else ""
    return f"{key}=... is missing{meaning}: type it after the command, or set it in a YAML of --config-dir"


def _follows(cfg: DictConfig, key: str, roots: set[str]) -> bool:
    """Whether a setting is one of `roots` in another position, of which all is said there."""
    above, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, above) if above and roots else None
    if not isinstance(node, DictConfig) or not OmegaConf.is_interpolation(node, name):
        return False
    return str(OmegaConf.to_container(node, resolve=False)[name])[2:-1] in roots  # pyright: ignore


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from _targets(child, f"{path}.{name}" if path else name)


def flattened(node: Any, path: str = "") -> list[str]:  # noqa: ANN401
    """The full names of all settings in plain values, those of nodes among them."""
    if not isinstance(node, dict):
        return []
    named = {f"{path}.{name}" if path else str(name): child for name, child in node.items() if str(name)[:1] != "_"}
    return [key for here, child in named.items() for key in (here, *flattened(child, here))]


def _problems(path: str, node: dict[str, Any], keys: list[str]) -> Iterator[str]:
    target = node["_target_"]
    missing = missing_package(path, target)
    if missing:
        yield missing
        return
    try:
        function = look_up(target)
    except ValueError as error:
        yield f"{path}: {error}"
        return
    wrong = _wrong_role(path, target, function)
    if wrong:
        yield wrong
        return
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a built-in type has none to compare with
        return
    options = [option for option in parameters if option not in FROM_ELSEWHERE.get(target, ())]
    ours = target.split(".")[0] == "mpp" or target == "lightning.Trainer" or target.startswith("torch.optim.")
    hints = type_hints(target) if ours else {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in options and not open_ended:
            yield unknown(f"{path}.{name}", options, target, keys)
        elif name in hints and not has_target(value) and value != "???":
            try:
                found = _mismatch(hints[name], value)
            except Exception:  # noqa: BLE001 (of a record's own checks, which may need more than its outline has)
                found = _mismatch(type_hints(target, imported=True)[name], value)
            yield from (f"{path}.{name} {problem}" for problem in found)


def _wrong_role(path: str, target: str, function: Any) -> str | None:  # noqa: ANN401
    above = path.rpartition(".")[0]
    role = ROLES.get(path) or (ROLES.get(f"{above}.*") if "." not in above else None)
    if role is None:
        return None
    if inspect.isclass(function):
        fits = _full_name(look_up(role)) in map(_full_name, inspect.getmro(function))  # outlines are classes apart
    else:  # a function may make one; that of a schedule is given the optimizer
        fits = callable(function) and (path != "schedule" or "optimizer" in inspect.signature(function).parameters)
    return None if fits else f"{path}: {target} is no {role.rpartition('.')[2]}, which {path}._target_ must name"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def missing_package(path: str, target: str) -> str | None:
    """What is said where a class, or a class that it needs, is of a package that is not installed."""
    package = target.split(".", maxsplit=1)[0]
    if "." not in target:
        return None  # no full name, which `locate` says
    for needed in (package, _NEEDS.get(target.rpartition(".")[2])):
        if needed and importlib.util.find_spec(needed) is None:
            extra = f"; pip install 'mpp[{_EXTRAS[needed]}]'" if needed in _EXTRAS else ""
            return f"{path} needs the package {needed}, which is not installed{extra}"
    return None


@functools.cache
def _adapter(hint: Any, written: str) -> TypeAdapter[Any] | None:  # noqa: ANN401
    """What compares values with a type, whose parts are tried as `written`: equal unions may differ in their order."""
    del written
    for settings in ({"config": ConfigDict(arbitrary_types_allowed=True)}, {}):
        with contextlib.suppress(Exception):  # a hint pydantic has no schema for, such as a protocol
            return TypeAdapter(hint, **settings)
    return None


def _mismatch(hint: Any, value: Any) -> list[str]:  # noqa: ANN401
    adapter = _adapter(hint, repr(hint))
    if adapter is None:  # nothing to compare
        return []
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # JSON mode: a list may stand for a tuple
    except ValidationError as error:
        said = (item["msg"].removeprefix("Input ") for item in error.errors() if item["type"] not in _OF_OBJECTS)
        wishes = dict.fromkeys(said)
        return [f"{' or '.join(wishes)}, got {value!r}"] if wishes else []
    return []


def has_target(value: Any) -> typing.TypeGuard[dict[str, Any]]:  # noqa: ANN401
    """Whether a value names a class."""
    return isinstance(value, dict) and "_target_" in value


# ---------------------------------------------------------------- devices


def device_of(name: str) -> str:
    """A device's name; `auto` is the GPU where there is one, and each process of a node has its own.

    Raises:
        ValueError: There is no such device.
    """
    if name != "auto":
        for problem in _device_problems("device", name):
            raise ValueError(problem)
        return name
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return "cuda" if number is None else f"cuda:{int(number) % torch.cuda.device_count()}"


def _device_problems(key: str, name: str) -> list[str]:
    if name in ("auto", "cpu"):
        return []
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"{key}={name} is no device; it is auto, cpu, cuda, cuda:1, ..."]
    if device.type != "cuda":
        return []
    if not torch.cuda.is_available():
        return [f"{key}={name}: torch finds no GPU here; {key}=auto takes what there is, cpu needs none"]
    count = torch.cuda.device_count()
    return [f"{key}={name}: there are {count} GPUs, from cuda:0"] if (device.index or 0) >= count else []


def _has_gpu(accelerator: str) -> bool:
    import torch

    return torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())
