"""Settings as their class has them: names, defaults, and the reasons in its docstring."""

import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def locate(target: str) -> Any:  # noqa: ANN401
    """The class or function of that full name.

    Raises:
        ValueError: There is none.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={target} names no class or function ({error})") from error


def default_settings(function: Callable[..., Any]) -> dict[str, Any]:
    """Settings of a class or function that have a default, as plain values.

    A default that is a dataclass becomes `{"_target_": its name, **its settings}`. Defaults that are no plain values
    are left out.
    """
    made = {}
    if is_dataclass(function):
        made = {f.name: f.default_factory() for f in fields(function) if f.default_factory is not MISSING}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = made.get(name, parameter.default)
        if default is inspect.Parameter.empty:
            continue
        try:
            found[name] = plain(default)
        except TypeError:
            continue
    return found


def plain(value: Any) -> Any:  # noqa: ANN401
    """A default as YAML would say it.

    Raises:
        TypeError: YAML cannot.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        settings = {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings}
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    raise TypeError(f"{value!r} cannot stand in a YAML")


def reasons(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstrings of a class and those it inherits from, or of a function, say of each setting."""
    found: dict[str, str] = {}
    for kind in reversed(inspect.getmro(function)) if inspect.isclass(function) else (function,):
        section = inspect.cleandoc(vars(kind).get("__doc__") or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            if not text.startswith("See "):  # the class above says it
                found[name] = " ".join(text.split())
    return found


def described_settings(node: Mapping[str, Any], path: str = "") -> list[str]:
    """Lines for people: each setting of a configuration with its value, and what its class says of it."""
    target = node.get("_target_")
    said = reasons(locate(target)) if str(target).startswith("mpp.") else {}
    lines = [f"\n{path}: {target}"] if target else []
    below = []
    for name, value in node.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and ("_target_" in value or not target):
            below += described_settings(value, here)
        elif not str(name).startswith("_"):
            lines += textwrap.wrap(f"{here}={_short(value)}  {said.get(name, '')}", 118, subsequent_indent=" " * 6)
    return lines + below


def _short(value: Any) -> str:  # noqa: ANN401
    return value if isinstance(value, str) else json.dumps(value)
