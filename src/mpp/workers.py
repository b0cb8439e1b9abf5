"""Worker processes that read ahead: what they are given, which signals they answer, how their errors reach the user."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from threading import Thread
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

Item, Made = TypeVar("Item"), TypeVar("Made")

_OF_MAIN = [getattr(signal, f"SIG{name}") for name in ("INT", "HUP", "USR1", "USR2") if hasattr(signal, f"SIG{name}")]
_LOOK_EVERY = 5.0  # seconds


class ReadAhead(Generic[Item, Made]):
    """What `read` makes of each group of items, in order; worker processes do it ahead of its use.

    Args:
        read: From a group to what is made of it. Each worker gets a copy, pickled where the platform spawns processes.
        groups: Gone through anew at each iteration.
        setting: The setting that says how many workers there are, for errors.
        workers: How many; 0: this process reads.
        ahead: Groups that each worker reads ahead.
        persistent: Whether the workers live from one iteration to the next.
        pinned: Whether what is made goes to page-locked memory.
    """

    def __init__(
        self,
        read: Callable[[list[Item]], Made],
        groups: Iterable[list[Item]],
        setting: str,
        *,
        workers: int = 0,
        ahead: int = 2,
        persistent: bool = False,
        pinned: bool = False,
    ) -> None:
        self.setting, self.workers = setting, workers
        self._loader = DataLoader(
            _Reading(read),
            sampler=groups,
            batch_size=None,
            collate_fn=_same,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_main,
            prefetch_factor=ahead if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=pinned,
        )

    def __iter__(self) -> Iterator[Made]:
        """What is made of each group.

        Raises:
            ValueError, OSError: As `read` raises, also in a worker; or a worker died.
        """
        found = made = None
        try:
            with _held_signals() if self.workers else nullcontext():
                found = iter(self._loader)
            for made in found:
                if isinstance(made, Exception):
                    raise made
                yield made
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ValueError(
                f"a process that reads ahead has died ({str(error).splitlines()[0]}); it was killed, or memory or "
                f"shared memory ran out: go on with a lower {self.setting}, now {self.workers}"
            ) from error
        finally:
            # An error's traceback would keep the workers until the garbage collector comes, which closes their pipes
            # while torch's threads use them.
            found = made = None


class _Reading(Dataset[Made]):
    """Makes errors that are the user's part of the answer: torch would wrap them into the worker's traceback."""

    def __init__(self, read: Callable[[list[Item]], Made]) -> None:
        self.read = read

    def __getitem__(self, group: list[Item]) -> Made | Exception:
        try:
            return self.read(group)
        except (ValueError, OSError) as error:
            error.add_note(f"In a process that reads ahead:\n{traceback.format_exc()}")
            return error


def _same(made: Made) -> Made:
    return made


@contextmanager
def _held_signals() -> Iterator[None]:
    """Signals wait while processes are started: these inherit that, until `_leave_signals_to_main` runs in them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held = {*_OF_MAIN, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which lets two of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main(number: int) -> None:
    """In a worker: whatever is sent to all processes at once is the main process's to answer, which needs its workers.

    SIGTERM ends a worker where the main process itself sends it; without `sigtimedwait` (macOS, Windows) any does.
    """
    del number
    for received in _OF_MAIN:
        signal.signal(received, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_main, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_main() -> None:
    """At the main process's own SIGTERM or its end, of which torch learns nothing where a fork server is between."""
    main = multiprocessing.parent_process()
    while main is not None and main.is_alive():
        met = signal.sigtimedwait({signal.SIGTERM}, _LOOK_EVERY)
        if met is not None and met.si_pid == main.pid:
            break
    os._exit(0)
