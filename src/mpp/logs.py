"""What commands say: one form for all lines, on stdout and in a run's log; libraries speak when something is wrong."""

import contextlib
import importlib
import io
import json
import logging
import math
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

log = logging.getLogger("mpp")

_LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "diffusers", "peft", "accelerate")
_KNOWN = (  # what libraries warn of and is as it should be
    "Mismatch dtype between input and weight",  # float32 norms on bfloat16, as the original models have it
)


class Line(logging.Formatter):
    """`TIME message`, and `TIME warning: message`.

    Args:
        time: As `strftime` has it.
    """

    def __init__(self, time: str) -> None:
        super().__init__("%(asctime)s %(message)s", time)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the library's name)
        """The line, without a traceback."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{record.asctime} {level}{record.message}"


CONSOLE, FILE = Line("%H:%M:%S"), Line("%Y-%m-%d %H:%M:%S")


class _NoTerminal:
    """A stream that says it is no terminal, so that nobody draws bars on it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def speaking(*, quiet: bool = False) -> Iterator[None]:
    """Give what is said inside its form, libraries' warnings with it; entered before these are imported.

    A mistake of the program, whose traceback the console gets, is in the log files too.

    Args:
        quiet: On the console warnings and errors alone.
    """
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # torchvision is not missed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nor, on the CPU, a faster kernel
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
    warnings.showwarning = _warn
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(CONSOLE)
            handler.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        with contextlib.ExitStack() as silent:
            if quiet:
                silent.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silent.enter_context(contextlib.redirect_stderr(typing.cast(TextIO, _NoTerminal(sys.stderr))))
            yield
    except Exception as error:
        if not isinstance(error, ValueError | OSError):
            note(traceback.format_exc())
        raise


def adopt() -> None:
    """Bring what libraries warn of to the root logger, once they are imported, and leave out what they tell besides.

    Their bars are for terminals: in a file each step of one is a line.
    """
    for name in ("transformers", "diffusers"):  # importing them sets up their loggers
        library = importlib.import_module(f"{name}.utils.logging")
        if not sys.stderr.isatty():
            library.disable_progress_bar()
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    log.warning("%s (%s, %s:%d)", str(message).strip(), category.__name__, filename, lineno)


def note(text: str) -> None:
    """Write into the log files alone what the console gets in another way."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, text, (), None))


_record: dict[str, Any] = {}


def record(**values: Any) -> None:  # noqa: ANN401
    """Say what a command has come to, for the line that `--json` prints."""
    _record.update(values)


@contextlib.contextmanager
def recording(command: str, *, said: bool) -> Iterator[None]:
    """What is recorded inside becomes one JSON object on a line of stdout, also where it fails.

    Args:
        command: The command's name.
        said: Whether it is asked for.
    """
    _record.clear()
    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            _record.setdefault("error", code.removeprefix("error: "))
            code = 1
        raise
    except BaseException as error:
        code = 1
        _record.setdefault("error", f"{type(error).__name__}: {error}")
        raise
    finally:
        if said:
            found = _strict({"command": command, "exit_code": code, **_record})
            sys.stdout.write(f"{json.dumps(found, allow_nan=False)}\n")
            sys.stdout.flush()


def _strict(value: Any) -> Any:  # noqa: ANN401
    """Values as JSON has them, which knows no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
