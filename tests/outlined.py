"""What a process knows of classes, as plain values: one that has imported them compares it with one that has not."""

import inspect
import typing

from omegaconf import OmegaConf

from mpp.checks import problems
from mpp.config import compose
from mpp.settings import default_settings, reasons, written_kinds


def described(function):
    """All that is asked of a class or function, in the order in which it is said."""
    defaults = default_settings(function)
    parameters = inspect.signature(function).parameters.values()
    classes = inspect.getmro(function) if inspect.isclass(function) else ()
    return {
        "defaults": [[name, value, type(value).__name__] for name, value in defaults.items()],
        "reasons": list(reasons(function).items()),
        "kinds": list(written_kinds(function).items()),
        "parameters": [[p.name, str(p.kind), p.default is p.empty] for p in parameters],
        "class": [f"{kind.__module__}.{kind.__qualname__}" for kind in classes[:1]],
        "bases": [f"{kind.__module__}.{kind.__qualname__}" for kind in classes[1:]],
        "hints": _hints(function),
    }


def _hints(function):
    try:
        found = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # of what is imported for type checkers alone
        return None
    return {name: inspect.formatannotation(hint, "").replace("lightning.", "") for name, hint in found.items()}


def composed(command, words):
    """The configuration that words make, and what is wrong with it; or the error."""
    try:
        cfg = compose(command, words)
        return [OmegaConf.to_yaml(cfg), problems(cfg)]
    except Exception as error:  # noqa: BLE001 (whatever it is, it must be the same)
        return [f"{type(error).__name__}: {error}"]
