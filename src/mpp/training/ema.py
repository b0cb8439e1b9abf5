"""A running average of the adapter over its steps, saved beside it."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from mpp.lora.adapters import adapter_state

log = logging.getLogger("mpp")


class AdapterEma(Callback):
    """Averages the adapter exponentially: `ema = decay * ema + (1 - decay) * adapter` after each optimizer step.

    It begins as the adapter at the start, is in float32, and is a part of checkpoints. Training, validation and samples
    use the adapter itself; `Checkpoints` saves the average beside it, as `lora_ema.safetensors`. All processes have the
    same adapter, and so the same average.

    Args:
        decay: In [0, 1); 0.999 remembers some thousand steps. None: no average.
        warmup: Begin with a shorter memory: after `t` updates the decay is at most (1 + t) / (10 + t), as in
            TensorFlow's `ExponentialMovingAverage` and diffusers' `EMAModel`.

    Raises:
        ValueError: `decay` is out of its range.
    """

    def __init__(self, decay: float | None = None, *, warmup: bool = False) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be at least 0 and below 1, or null for no average, got {decay}")
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] | None = None  # by the adapter's names; None: not begun
        self._updates = 0
        self._adapter: dict[str, Tensor] = {}  # the trained tensors themselves
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an optimizer that averages by itself, before the transformer is loaded.

        Raises:
            ValueError: As above: its LoRA is an average already, and what it trains is not meant to be used.
        """
        del trainer, stage
        if self.decay is not None and hasattr(pl_module.make_optimizer([nn.Parameter(torch.zeros(1))]), "eval"):
            raise ValueError(
                f"callbacks.ema.decay={self.decay}: a schedule-free optimizer averages by itself, and its LoRA is that "
                "average; leave this out, or choose another optimizer"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin from the adapter, or go on from the checkpoint's average."""
        if self.decay is None:
            return
        self._adapter, self._seen = adapter_state(pl_module.transformer), trainer.global_step
        if self.average is None:
            if self._seen and trainer.is_global_zero:
                log.info("the average begins here, at step %d, from the adapter as it is", self._seen)
            self.average = {name: tensor.float().clone() for name, tensor in self._adapter.items()}
        self.average = {name: tensor.to(self._adapter[name].device) for name, tensor in self.average.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Take in the adapter of a step that has ended, unless more batches belong to it."""
        if self.average is None or self.decay is None or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates)) if self.warmup else self.decay
        self._updates += 1
        for name, tensor in self._adapter.items():
            self.average[name].lerp_(tensor.float(), 1 - decay)

    def record(self) -> dict[str, object]:
        """What its LoRA files say of it."""
        return {"ema": {"decay": self.decay, "warmup": self.warmup, "updates": self._updates}}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; nothing without an average."""
        return {} if self.average is None else {"updates": self._updates, "average": dict(self.average)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, unless there is to be no average."""
        if self.decay is not None:
            self._updates, average = state_dict["updates"], state_dict["average"]
            self.average = {name: tensor.clone() for name, tensor in average.items()}


def ema_of(trainer: Trainer) -> AdapterEma | None:
    """The run's, where it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, AdapterEma) and c.decay is not None), None)
