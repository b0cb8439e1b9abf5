"""Settings as their class has them: names, defaults, and the reasons in its docstring.

A class is imported only where its source does not say enough, so that what is typed is checked in no time.
"""

import importlib
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from mpp.outline import UnreadableError, outline


def locate(target: str) -> Any:  # noqa: ANN401
    """The class or function of that full name.

    Raises:
        ValueError: There is none.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise ValueError(f"_target_={target} names no class or function: its full name is needed, as torch.optim.SGD")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={target} names no class or function ({error})") from error


def look_up(target: str) -> Any:  # noqa: ANN401
    """The class or function of that full name where its module is imported, else its outline where there is one.

    Raises:
        ValueError: There is none.
    """
    if target.rpartition(".")[0] in sys.modules:
        return locate(target)
    try:
        return outline(target)
    except UnreadableError:
        return locate(target)


def type_hints(target: str, *, imported: bool = False) -> dict[str, Any]:
    """Types of a class's or function's settings, to compare values with.

    Args:
        target: Its full name.
        imported: Whether only the imported class will do.

    Raises:
        ValueError: There is no such class or function.
    """
    for find in (locate,) if imported else (look_up, locate):
        function = find(target)
        try:
            return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
        except NameError:  # a name that only the imported module knows
            continue
    return {}


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


def written_kinds(function: Callable[..., Any]) -> dict[str, str]:
    """Types of a class's or function's settings, as people write them."""
    found = inspect.signature(function).parameters.values()
    return {p.name: written_kind(p.annotation) for p in found if p.annotation is not inspect.Parameter.empty}


def written_kind(hint: Any) -> str:  # noqa: ANN401
    """A type as people write it: `int`, `a|b`, `Sequence[str] or null`."""
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    text = re.sub(
        r"(?:Literal|typing\.Literal)\[([^]]*)\]", lambda at: re.sub(r"['\" ]", "", at[1]).replace(",", "|"), text
    )
    text = re.sub(r"Optional\[([^][]*)\]", r"\1 | None", re.sub(r"\b(?:\w+\.)+(?=\w)", "", text))
    return " or ".join(part.replace("None", "null") for part in text.split(" | "))


def described_settings(
    node: Mapping[str, Any], path: str = "", own: Mapping[str, tuple[Any, str]] | None = None
) -> list[str]:
    """Lines for people: each setting of a configuration with its value, its type, and what its class says of it.

    Args:
        node: The configuration.
        path: Where it lies in a larger one.
        own: Types and meanings of settings that belong to no class.
    """
    target = node.get("_target_")
    said = reasons(look_up(target)) if str(target).startswith("mpp.") else {}
    of = written_kinds(look_up(target)) if target and _is_there(target) else {}
    for name, (hint, meaning) in ({} if path else own or {}).items():
        said[name], of[name] = meaning, written_kind(hint)
    lines = [f"\n{path}: {target}"] if target else [] if path else [""]
    below = []
    for name, value in node.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and ("_target_" in value or not target):
            below += described_settings(value, here)
        elif not str(name).startswith("_"):
            kind = f"({of[name]}) " if name in of else ""
            lines += textwrap.wrap(
                f"{here}={_short(value)}  {kind}{said.get(name, '')}", 118, subsequent_indent=" " * 6
            )
    return lines + below


def _is_there(target: str) -> bool:
    try:
        look_up(target)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:  # noqa: ANN401
    return value if isinstance(value, str) else json.dumps(value)
