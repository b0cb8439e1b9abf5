"""A class or function as plain values, for a process that has not imported it to tell one that has."""

import inspect
import typing

from mpp.settings import default_settings, reasons, written_kinds


def described(function):
    """All that is asked of a class or function, in the order in which it is said."""
    parameters = inspect.signature(function).parameters.values()
    return {
        "defaults": list(default_settings(function).items()),
        "types": {name: type(value).__name__ for name, value in default_settings(function).items()},
        "reasons": list(reasons(function).items()),
        "kinds": list(written_kinds(function).items()),
        "parameters": [[p.name, str(p.kind), p.default is p.empty] for p in parameters],
        "bases": [f"{kind.__module__}.{kind.__qualname__}" for kind in inspect.getmro(function)]
        if inspect.isclass(function)
        else [""],
        "hints": hints(function),
    }


def hints(function):
    try:
        found = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError as error:
        return str(error)
    return {name: inspect.formatannotation(hint, "").replace("lightning.", "") for name, hint in found.items()}
