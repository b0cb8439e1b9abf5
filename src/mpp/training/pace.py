"""How fast a run goes, and how much memory it takes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


class Pace:
    """The clock of a run: how long its steps take, without what lies between them.

    Args:
        clock: Seconds, from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begin(0)

    def begin(self, step: int) -> None:
        """A run begins or goes on after so many optimizer steps."""
        self._began = self._last = self._halted_at = self.clock()
        self._first = self._step = step
        self._paused, self._halts = 0.0, 0

    def halt(self) -> None:
        """What follows is no part of a step, until `go_on`; halts may lie in each other."""
        if not self._halts:
            self._halted_at = self.clock()
        self._halts += 1

    def go_on(self) -> None:
        """The end of a halt."""
        self._halts -= 1
        if not self._halts:
            self._paused += self.clock() - self._halted_at

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A halt for what happens inside."""
        self.halt()
        try:
            yield
        finally:
            self.go_on()

    def lap(self, step: int, samples: int) -> dict[str, float]:
        """Seconds per step and samples per second since the last lap.

        Args:
            step: Optimizer steps that are behind the run.
            samples: That were trained on in this lap, on all processes.
        """
        now = self.clock()
        seconds = max(now - self._last - self._paused, 1e-9)
        steps = max(self.steps(step), 1)
        self._last, self._step, self._paused = now, step, 0.0
        return {"perf/seconds_per_step": seconds / steps, "perf/samples_per_second": samples / seconds}

    def steps(self, step: int) -> int:
        """Optimizer steps since the last lap, where so many are behind the run."""
        return step - self._step

    @property
    def seconds(self) -> float:
        """Since the run began or went on, all included."""
        return self.clock() - self._began

    def left(self, step: int, end: int | None) -> float | None:
        """Seconds until the end at the pace so far, all included; None where one of them is not known."""
        if end is None or step <= self._first:
            return None
        return self.seconds / (step - self._first) * max(end - step, 0)


def peak_memory(device: torch.device) -> float | None:
    """The most memory that was in use so far, in GiB: of a GPU by torch's tensors, else of the process.

    None where the system does not say it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
