"""How a run ends before its time: asked to by a signal, or because its numbers are not finite."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import subprocess_script

from mpp.training.module import MaskedPriorModule

log = logging.getLogger("mpp")

_END = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
_SAVE = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))  # SLURM's, ahead of its end
_EXIT = 128  # a shell's code of a process that a signal ended, less the signal's number
_SAVE_ONLY = 1
_LOOK_EVERY, _GRACE = 1.0, 10.0  # seconds


class Endings(Callback):
    """Ends a run after the step at hand, saved, when a signal asks for it or the loss is not finite.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run with 128 + the signal's number, as a shell would say; a second one
    ends it at once. SIGUSR1 saves and goes on. A signal to any process is for all of them: handlers set a flag and
    talk to nobody, and the flags meet where a step has ended. The first process gives the exit code, the others leave
    with 0 once it has saved.

    Args:
        save: Saves the step at hand unless it is saved; False where nothing can be saved.
        folder: The run's output folder.
    """

    def __init__(self, save: Callable[[Trainer, MaskedPriorModule], bool], folder: Path) -> None:
        self.save, self.folder = save, folder
        self._asked = self._leaving = 0  # by this process's signals; by all of them together
        self._saved = False
        self._training = self._between = False  # past the start; between two steps
        self._step = 0
        self._good = 0

    @property
    def asked_to_end(self) -> bool:
        """Whether this process was asked to."""
        return self._asked > _EXIT

    @contextmanager
    def handling(self, trainer: Trainer) -> Iterator[None]:
        """Handle signals inside, in place of Lightning.

        Lightning's handler broadcasts inside the handler, so that a signal to one process hangs all of them; it takes
        SLURM's signal to requeue the job and prefers a checkpoint of its own later.
        """
        connector = trainer._signal_connector  # noqa: SLF001
        connector.register_signal_handlers = connector.teardown = lambda: None
        observer, subprocess_script._launch_process_observer = subprocess_script._launch_process_observer, watch  # noqa: SLF001
        # Python hands signals to the main thread alone. What is ignored on purpose, as under nohup, stays ignored.
        handled = (*_END, *_SAVE) if threading.current_thread() is threading.main_thread() else ()
        numbers = [number for number in handled if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            subprocess_script._launch_process_observer = observer  # noqa: SLF001
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number in _SAVE:
            self._asked = self._asked or _SAVE_ONLY
        elif not self._training:
            sys.stderr.write("stopped; there is nothing new to save\n")
            sys.exit(_EXIT + number)
        elif self.asked_to_end:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            self._asked = _EXIT + number

    # ---------------------------------------------------------------- where a run may end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        del pl_module
        self._training = self._between = True
        self._step = self._good = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A step begins or goes on."""
        self._leave(trainer)
        self._between = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A step has ended, unless more batches belong to it."""
        if trainer.global_step != self._step:
            self._step, self._between = trainer.global_step, True
            self.attend(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation that is due is made up for after a resume."""
        self._leave(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """A validation is begun anew after a resume, so it need not be waited for."""
        if self._between:  # within an accumulation window its gradients would be lost
            self.attend(trainer, pl_module, saving=False)
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples of the last step are made up for after a resume."""
        self._leave(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """They were broken off."""
        self._leave(trainer)

    def attend(self, trainer: Trainer, module: MaskedPriorModule, *, saving: bool = True) -> None:
        """Save if any process was asked to; all processes come here together.

        The run ends at the next hook, when what was measured in this step is logged.

        Args:
            trainer: The run's.
            module: Its module.
            saving: Whether the step can be saved and the run go on from here.

        Raises:
            ValueError: The loss of a step was not finite.
        """
        where = module.not_finite(newest=trainer.world_size > 1)
        asked, failed = self._of_all(trainer, self._asked, int(where is not None))
        if failed:
            raise ValueError(self._not_finite(trainer, where))
        if asked > _EXIT:
            module.train_on()
            self._leaving, self._saved = asked, self.save(trainer, module)
            trainer.strategy.barrier("saved")
        elif asked and saving:
            self._asked = 0
            if self.save(trainer, module) and trainer.is_global_zero:
                log.info("saved at step %d, as a signal asked for", trainer.global_step)

    def check_adapter(self, trainer: Trainer, module: MaskedPriorModule) -> None:
        """Refuse to save what is not finite; all processes come here together.

        Raises:
            ValueError: The adapter, or the loss of a step, is not finite.
        """
        where = module.not_finite(newest=True)
        if where is None and not module.adapter_is_finite():
            where = trainer.global_step, ()
        (failed,) = self._of_all(trainer, int(where is not None))
        if failed:
            raise ValueError(self._not_finite(trainer, where))
        self._good = trainer.global_step

    def _leave(self, trainer: Trainer) -> None:
        """End the run if that was decided.

        Raises:
            SystemExit: It was.
        """
        if not self._leaving:
            return
        trainer.lightning_module.report_rest()
        if not trainer.is_global_zero:
            sys.exit(0)
        if self._saved:
            log.info("saved at step %d; go on with: %s", trainer.global_step, self.resume())
        else:
            log.info("stopped at step %d; nothing is saved", trainer.global_step)
        sys.exit(self._leaving)

    def resume(self) -> str:
        """The command that goes on with the run."""
        return shlex.join(["python", "-m", "mpp.train", f"resume={self.folder}"])

    def _not_finite(self, trainer: Trainer, where: tuple[int, tuple[str, ...]] | None) -> str:
        """What is said of a loss or adapter that is not finite; the processes tell each other what they saw."""
        seen = [where]
        if trainer.world_size > 1:
            seen = [None] * trainer.world_size
            torch.distributed.all_gather_object(seen, where)
        step, keys = min(found for found in seen if found is not None)
        what = f"the loss of step {step} is not finite (samples: {', '.join(keys)})" if keys else (
            f"the adapter is not finite after step {step}"
        )  # fmt: skip
        last = self.folder / "checkpoints" / "last.ckpt"
        good = f"{last} is of step {self._good} and good" if last.is_file() else "no checkpoint was written"
        return (
            f"{what}; nothing of it was saved, {good}. Going on from there would meet it again: lower optimizer.lr, "
            "look at these samples (mpp.report), or train in another precision"
        )

    def _of_all(self, trainer: Trainer, *values: int) -> list[int]:
        """The largest of each over all processes."""
        if trainer.world_size == 1:
            return list(values)
        mine = torch.tensor(values, device=trainer.strategy.root_device)
        return trainer.strategy.reduce(mine, reduce_op="max").tolist()


def watch(processes: Sequence[subprocess.Popen]) -> None:
    """End this process, with a message, when one of those that it started has failed, in place of Lightning's SIGKILL.

    It may wait for the lost one in a reduction for ever; where it meets the loss by itself, it says so itself.
    """

    def look() -> None:
        while (codes := [process.poll() for process in processes]) and not any(codes):
            if all(code == 0 for code in codes):
                return
            time.sleep(_LOOK_EVERY)
        time.sleep(_GRACE)
        number, code = next((number, code) for number, code in enumerate(codes, 1) if code)
        sys.stderr.write(f"error: another process of this run has ended (rank {number}, exit code {code})\n")
        for process in processes:
            process.kill()
        os._exit(1)

    threading.Thread(target=look, name="watch", daemon=True).start()


def endings_of(trainer: Trainer) -> Endings | None:
    """The run's, where it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Endings)), None)
