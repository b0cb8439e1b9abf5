"""Teacher and student block by block: while a block's weights are there, both run it."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

from mpp.lora.adapters import adapter_layers, layers_off


class _Unwanted(BaseException):
    """Ends a teacher's pass whose answer nobody waits for any more."""


class Lockstep:
    """A teacher's pass in a thread of its own, which runs only while the student's, inside of this, waits for it.

    The teacher's waits before each block until the student's comes to it. Blocks that the teacher does not come to,
    such as another expert's, the student runs alone.

    Args:
        ask: The pass; it finds adapters off.
        transformer: With its adapter.
        blocks: At which they meet.
        device: Where they run.
    """

    def __init__(
        self, ask: Callable[[], Tensor], transformer: nn.Module, blocks: Sequence[nn.Module], device: torch.device
    ) -> None:
        self._ask, self._blocks, self._like_here = ask, blocks, _surroundings(device)
        self._inside = {block: list(adapter_layers(block)) for block in blocks}
        own = {layer for layers in self._inside.values() for layer in layers}
        self._outside = [layer for layer in adapter_layers(transformer) if layer not in own]
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)
        self._teachers_turn, self._students_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._at: nn.Module | None = None  # the block before which the teacher waits
        self._alone = self._unwanted = False
        self._answer: Tensor | None = None
        self._error: BaseException | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Lockstep":
        """Let the teacher come to its first block."""
        self._hooks = [block.register_forward_pre_hook(self._meet, prepend=True) for block in self._blocks]
        try:
            with layers_off(self._outside):
                self._thread.start()
                self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened, the teacher's pass is over."""
        self._end()

    def answer(self) -> Tensor:
        """What the teacher says, which by now has nothing left to do, or does the rest without the student."""
        if self._thread.is_alive() and self._at is not None:
            self._alone = True
            self._teach([layer for layers in self._inside.values() for layer in layers])
        return self._answer

    # ---------------------------------------------------------------- taking turns

    def _meet(self, block: nn.Module, _: object) -> None:
        if threading.current_thread() is not self._thread:
            if self._at is block:
                self._teach(self._inside[block])
        elif not self._alone:
            self._at = block
            self._students_turn.release()
            self._teachers_turn.acquire()
            if self._unwanted:
                raise _Unwanted

    def _teach(self, layers: Sequence[nn.Module]) -> None:
        with layers_off([*self._outside, *layers]):
            self._at = None
            self._teachers_turn.release()
            self._wait()

    def _wait(self) -> None:
        try:
            self._students_turn.acquire()
        except BaseException:  # Ctrl-C: adapters stay off until the teacher has stopped
            self._end()
            raise
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._unwanted = True
        self._teachers_turn.release()
        if self._thread.ident is not None:
            self._thread.join()
        self._error = None  # whose frames hold tensors

    # ---------------------------------------------------------------- the teacher's thread

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                self._like_here(stack)
                self._answer = self._ask()
        except BaseException as error:  # noqa: BLE001 (it is the student's to raise)
            self._error = error
        finally:
            self._at = None
            self._students_turn.release()


def _surroundings(device: torch.device) -> Callable[[ExitStack], None]:
    """What holds for this thread alone and has to hold for another: autocast, inference mode, modes that count."""
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in {device.type, "cpu"} - {"meta"}}
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in autocast}
    cached, inference = torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()
    modes = _get_current_dispatch_mode_stack()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(stack: ExitStack) -> None:
        torch.autocast_increment_nesting()  # and never back: the last to leave empties the cache, which is everybody's
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtypes[kind])
        torch.set_autocast_cache_enabled(cached)
        stack.enter_context(torch.inference_mode(inference))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        for mode in modes:
            stack.enter_context(mode)

    return enter
