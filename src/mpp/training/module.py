"""The LightningModule: a frozen DiT with an adapter, taught by itself without it."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpp import __version__
from mpp.batching.batch import Batch
from mpp.batching.datamodule import LatentDataModule
from mpp.core.loss import LossSums, MaskedPriorLoss
from mpp.lora.adapters import Adapter, adapter_state, check_kind, inject, load_adapter_state
from mpp.lora.stack import base_fingerprint, load_base
from mpp.lora.starting import Start
from mpp.memory.settings import Memory
from mpp.models.contract import Architecture
from mpp.models.streamed import check_turns, compile_blocks, stream
from mpp.training import metrics
from mpp.training.checkpoint import CHECKPOINT_FORMAT, check_checkpoint, settled
from mpp.training.metrics import LossMetrics, Point
from mpp.training.pace import Pace, peak_memory
from mpp.training.passes import passes_of
from mpp.training.rates import check_ratio, effective_rates, optimizer_of, renew_rates
from mpp.training.schedule import schedule_for
from mpp.training.step import MaskedPriorStep, Position, StepOutput
from mpp.training.teacher import Teacher

log = logging.getLogger("mpp")


class MaskedPriorModule(LightningModule):
    """Holds the frozen transformer plus adapter and runs teacher and student in each step.

    Args:
        architecture: The DiT family.
        adapter: What is trained.
        loss: Masked prior loss.
        teacher: Who answers for the prior.
        optimizer: Called with the trainable parameters, e.g. a partial of `torch.optim.AdamW`.
        schedule: Called with the optimizer, stepped after each optimizer step; None: constant.
        seed: Seed of adapter, noise and sigma.
        val_sigmas: Noise levels of validation; None: four quantiles of the architecture's law.
        compile_blocks: `torch.compile` the transformer's repeated blocks.
        memory: How it fits; None: an unquantised base whose blocks are computed again in the backward pass.
        provenance: Resolved configuration, for checkpoints and LoRA files.
        followers: Settings of it that followed from others, by key, for runs that go on from its checkpoints.
        renew_rates: When going on, begin with the learning rate of `optimizer` and `schedule`, not the checkpoint's.
        held_after: Optimizer steps after which the learning rate stays what it is; None: the schedule alone decides.
        start: What the adapter is filled with where a run begins; None: it starts without effect.

    Raises:
        ValueError: A prior without an adapter, no adapter at all, or one that cannot be compiled.
    """

    def __init__(
        self,
        *,
        architecture: Architecture,
        adapter: Adapter | None,
        loss: MaskedPriorLoss,
        teacher: Teacher,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        seed: int = 0,
        val_sigmas: Sequence[float] | None = None,
        compile_blocks: bool = False,
        memory: Memory | None = None,
        provenance: Mapping[str, object] | None = None,
        followers: Mapping[str, str] | None = None,
        renew_rates: bool = False,
        held_after: int | None = None,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        if adapter is None:
            why = (
                f"loss.prior_weight={loss.prior_weight} needs an adapter: the teacher is the model with its adapter off"
                if loss.prior_weight > 0
                else "there is nothing to train: mpp trains adapters on a frozen model"
            )
            raise ValueError(f"lora=none: {why}; choose lora=lora")
        if compile_blocks and adapter.draws_layers:
            raise ValueError(
                f"compile=true does not go with lora.dropout={adapter.dropout} of lora={adapter.kind}, which drops "
                "whole updates; set lora.dropout=0"
            )
        self.memory = _memory_of(memory or Memory(), architecture, teacher)
        architecture.load_encoders("cpu", self.memory.encoders)  # loads nothing, refuses what the family cannot do
        check_kind(adapter.kind, self.memory.base, f"lora={adapter.kind}")
        if self.memory.base == "gguf" and compile_blocks:
            raise ValueError(
                "compile=true does not go with memory.base=gguf, whose weights diffusers unpacks in a way that cannot "
                "be compiled; leave compile=false, or take memory.base=fp8 or int8"
            )
        if val_sigmas is not None and not all(0 <= sigma <= 1 for sigma in val_sigmas):
            raise ValueError(f"val_sigmas must lie in [0, 1], got {list(val_sigmas)}")
        self.architecture, self.adapter, self.loss, self.teacher = architecture, adapter, loss, teacher
        self.make_optimizer, self.schedule, self.make_schedule = optimizer, schedule, schedule
        self.planned_steps: int | None = None  # that the schedule is made for
        self.seed, self.val_sigmas = seed, val_sigmas
        self.compile_blocks = compile_blocks
        self.provenance, self.followers = dict(provenance or {}), dict(followers or {})
        self.renew_rates, self.held_after, self.start = renew_rates, held_after, start
        self.transformer: nn.Module | None = None
        self.step: MaskedPriorStep | None = None  # with the transformer
        self.train_metrics, self.val_metrics = LossMetrics(loss), LossMetrics(loss)
        self.samples_seen = 0
        self.shape: tuple[int, ...] | None = None  # of the latents of the batch at hand
        self._base: str | None = None
        self.pace, self.point = Pace(), Point()
        self._norms: list[Tensor] = []  # of the gradients since the last report
        self._warned = False
        self._window: tuple[Tensor, ...] | None = None  # the accumulation window that `_over` was measured on
        self._over: LossSums | None = None
        self._learning = 0  # samples since the last report that are meant to teach something
        self._losses: list[tuple[Tensor, int, tuple[str, ...]]] = []  # not yet looked at, with step and keys
        self._trained: list[Tensor] | None = None  # the weights that are trained, while others are evaluated
        self.resumed: Mapping[str, Any] | None = None  # the checkpoint, until its optimizer is restored

    def setup(self, stage: str) -> None:
        """Refuse a strategy that cannot train experts, before the transformer is loaded.

        Raises:
            ValueError: As above.
        """
        del stage
        strategy = self.trainer.strategy
        # A step may use one expert alone, and DDP waits for gradients of all parameters unless told.
        alone = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")  # noqa: SLF001
        if self.architecture.boundaries and alone:
            raise ValueError(
                "this model trains two experts, of which a step may use one; set "
                "trainer.strategy=ddp_find_unused_parameters_true"
            )

    def configure_model(self) -> None:
        """Load the frozen transformer and add the adapter, once.

        Raises:
            ValueError: Targets that match nothing.
        """
        if self.transformer is not None:
            return
        memory = self.memory = self.memory.settled
        transformer = load_base(self.architecture, memory.base)
        inject(transformer, self.adapter, self.architecture.lora_targets, seed=self.seed)
        if self.start is not None:
            self.start.fill(transformer)
        if memory.recomputes:
            transformer.enable_gradient_checkpointing()
        if self.compile_blocks:
            compile_blocks(transformer)
        if stream(self.architecture, transformer, memory.resident):
            # DDP wants all it looks at on one device; the frozen weights of some blocks are elsewhere.
            frozen = [name for name, p in transformer.named_parameters(prefix="transformer") if not p.requires_grad]
            frozen += [name for name, _ in transformer.named_buffers(prefix="transformer")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)  # noqa: SLF001
        self._base = base_fingerprint(self.architecture)
        self.transformer = transformer.train()
        passes = passes_of(self.architecture, self.transformer, self.teacher, memory)
        self.step = MaskedPriorStep(self.architecture, self.loss, passes)

    def plan(self, steps: int | None) -> None:
        """Make the schedule for a run of that many optimizer steps (None: not known).

        A schedule that is kept stays made for what it was.

        Raises:
            ValueError: As `schedule_for` and `check_ratio`.
        """
        self.planned_steps = steps = self.held_after or steps
        self.make_schedule = None if self.schedule is None else schedule_for(self.schedule, steps)
        check_ratio(self.make_optimizer, self.make_schedule, self.adapter.b_lr_ratio)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own type)
        """Optimizer over the adapter, and its schedule stepped per optimizer step."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        optimizer = optimizer_of(self.make_optimizer, trained, self.adapter.b_lr_ratio)
        if self.make_schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_schedule(optimizer), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:  # noqa: ANN401 (Lightning's own types)
        """Step the schedule, up to where its rate is held."""
        if self.held_after is None or scheduler.last_epoch < self.held_after:
            super().lr_scheduler_step(scheduler, metric)

    # ---------------------------------------------------------------- steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, scaled so that accumulated batches and ranks add up to one big batch."""
        self.shape = tuple(batch.latents.shape)
        output = self.step(batch, Position(self.seed, self.current_epoch))
        over, parts = self.effective_batch(output, batch)
        self.train_metrics.update(output)
        self._learning += len(batch) - batch.preserved
        self.samples_seen += len(batch) * self.trainer.world_size
        total = self.loss.terms(output.sums, over).total * parts
        self._losses.append((total.detach(), self.trainer.global_step + 1, batch.keys))
        return total

    def on_train_batch_start(self, *_: object) -> None:
        """Count points of the logs in optimizer steps, also after a resume, where Lightning counts from the save."""
        self.log_after(self.trainer.global_step)

    def log_after(self, steps: int) -> None:
        """Put the next points of the logs behind so many optimizer steps."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = steps  # noqa: SLF001

    def not_finite(self, *, newest: bool) -> tuple[int, tuple[str, ...]] | None:
        """The first step whose loss was not finite, and the samples of that batch.

        Args:
            newest: Look at the last batch too, for which the device has to be waited for.
        """
        count = len(self._losses) - (not newest)
        looked_at, self._losses = self._losses[:count], self._losses[count:]
        if not looked_at:
            return None
        finite = torch.stack([loss for loss, *_ in looked_at]).isfinite().tolist()
        return next((where[1:] for where, good in zip(looked_at, finite, strict=True) if not good), None)

    def adapter_is_finite(self) -> bool:
        """Whether all that is trained is finite."""
        return all(torch.stack([p.detach().isfinite().all() for p in self.parameters() if p.requires_grad]).tolist())

    def effective_batch(self, output: StepOutput, batch: Batch) -> tuple[LossSums, int]:
        """What the loss divides by, and how many parts it will be averaged over.

        DDP averages gradients over ranks and Lightning divides by the accumulated batches; the weights of the whole
        effective batch are known from its masks alone, so each part divides by those and is scaled back.
        """
        ranks = self.trainer.world_size
        if ranks == 1 and batch.window is None:
            return output.sums, 1
        if batch.window is None or batch.window is not self._window:
            every = [output.weights] if batch.window is None else [self.loss.weights(mask) for mask in batch.window]
            channels = batch.latents.shape[1]
            mine = torch.stack([self.loss.normalizers(weights, channels).stacked() for weights in every]).sum(0)
            mine = mine.to(self.device)
            self._window = batch.window
            self._over = LossSums(*(self.trainer.strategy.reduce(mine, reduce_op="sum") if ranks > 1 else mine))
        return self._over, ranks * self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Target, prior and drift at fixed noise levels."""
        del batch_idx
        self.shape = tuple(batch.latents.shape)
        for output in self.step.measure(batch, self.seed, self.val_sigmas):
            if batch.counted:
                self.val_metrics.update(output)

    # ---------------------------------------------------------------- reports

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step is complete but for the optimizer: report every `log_every_n_steps` of them.

        Gradients are whole here, over accumulated batches and ranks, unscaled, and not clipped yet.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self._norms.append(nn.utils.get_total_norm(gradients))
        step = self.trainer.global_step + 1
        if step % self.trainer.log_every_n_steps == 0:
            self.point = self._measured(step)
            for name, value in self.point.values.items():
                self.log(name, value, on_step=True, on_epoch=False, prog_bar=name in metrics.PROGRESS_BAR)

    def report_rest(self) -> None:
        """A last point of the logs, for the steps since the last report; all ranks come here."""
        step = self.trainer.global_step
        if self.pace.steps(step):
            self.point = self._measured(step)
            for logger in self.trainer.loggers:
                logger.log_metrics(self.point.values, step=step - 1)
                logger.save()

    def _measured(self, step: int) -> Point:
        values = metrics.names("train", self.train_metrics.compute())  # collective: every rank comes here
        finite = [norm for norm in map(float, self._norms) if math.isfinite(norm)]
        if finite:  # of 16 bits some overflow, and their step is left out
            values["train/grad_norm"] = sum(finite) / len(finite)
        values |= effective_rates(self.trainer.optimizers)
        values |= self.pace.lap(step, self.train_metrics.samples * self.trainer.world_size)
        memory = peak_memory(self.device)
        if memory is not None:
            values["perf/peak_memory_gib"] = memory
        self._warn_if_nothing_learned(self.train_metrics.sums)
        self.train_metrics.reset()
        self._norms.clear()
        return Point(step, values)

    def _warn_if_nothing_learned(self, sums: Tensor) -> None:
        nothing, self._learning = float(sums[0]) == 0 and self._learning > 0, 0
        if nothing and not self._warned and self.trainer.is_global_zero:
            self._warned = True
            log.warning(
                "nothing is learned: every mask since the last report is empty (all 0); check that masks are "
                "not inverted (1 = white = learn)"
            )

    def on_train_start(self) -> None:
        """Start the clock of the first report."""
        self.pace.begin(self.trainer.global_step)
        self.resumed = None
        self._optimizer_mode("train")

    def on_train_end(self) -> None:
        """Nothing of what was measured is left out of the logs."""
        self.report_rest()

    def on_fit_start(self) -> None:
        """Refuse weights that do not go with the precision."""
        self._check_weights()

    def on_validation_start(self) -> None:
        """Schedule-free optimizers evaluate other weights than they train."""
        self._check_weights()
        self.pace.halt()
        self._evaluate()

    def on_validation_end(self) -> None:
        """Back to the weights that are trained."""
        self.train_on()
        self.pace.go_on()

    def on_validation_epoch_end(self) -> None:
        """Log the validation breakdown over all ranks."""
        values = metrics.names("val", self.val_metrics.compute())
        self.val_metrics.reset()
        self.log_dict(values, sync_dist=True)  # equal on all ranks already

    def _check_weights(self) -> None:
        half = any(p.dtype == torch.float16 for p in self.transformer.parameters())
        if self.trainer.precision == "bf16-mixed" and half:
            raise ValueError(
                "trainer.precision=bf16-mixed does not go with model.dtype=float16; use model.dtype=bfloat16, or "
                "trainer.precision=16-mixed"
            )

    def _optimizer_mode(self, mode: str) -> None:
        for optimizer in self.trainer.optimizers:
            switch = getattr(optimizer, mode, None)
            if callable(switch):
                switch()

    def _evaluate(self) -> None:
        """The weights that are meant to be used, where an optimizer trains others."""
        if self._trained is not None or not any(hasattr(optimizer, "eval") for optimizer in self.trainer.optimizers):
            return
        self._trained = [p.detach().clone() for p in self.parameters() if p.requires_grad]
        self._optimizer_mode("eval")

    def train_on(self) -> None:
        """The weights that are trained, bit for bit as they were: an optimizer's own way back rounds."""
        if self._trained is None:
            return
        self._optimizer_mode("train")
        with torch.no_grad():
            for parameter, value in zip((p for p in self.parameters() if p.requires_grad), self._trained, strict=True):
                parameter.copy_(value)
        self._trained = None

    @contextmanager
    def evaluated_adapter(self) -> Iterator[dict[str, Tensor]]:
        """The adapter's tensors as they are meant to be used; training goes on bit for bit as if nothing happened.

        Schedule-free optimizers train other weights than they evaluate; for all others these are the same.
        """
        evaluating = self._trained is not None
        self._evaluate()
        try:
            yield adapter_state(self.transformer)
        finally:
            if not evaluating:
                self.train_on()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """The adapter alone: the base comes from `model.pretrained`."""
        del args, kwargs
        return dict(adapter_state(self.transformer))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Load an adapter; every tensor must be there, whatever `strict` says."""
        del strict, assign
        load_adapter_state(self.transformer, state_dict, "the checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how the checkpoint was made."""
        checkpoint["mpp"] = {**self.record(), "resuming": self.needed_to_resume()}
        checkpoint["loops"] = settled(checkpoint["loops"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not this run's; take learning rates that are new."""
        check_checkpoint(checkpoint, base=self._base, seed=self.seed)
        checkpoint["loops"] = settled(checkpoint["loops"])  # of versions that saved them as they were
        if self.renew_rates:
            steps = min(checkpoint["global_step"], self.held_after or checkpoint["global_step"])
            ratio = self.adapter.b_lr_ratio
            rate = renew_rates(checkpoint, self.make_optimizer, self.make_schedule, steps, ratio)
            if self.trainer.is_global_zero:
                log.info("learning rates are made anew: that of the next step is %g", rate)
        self.samples_seen = checkpoint["mpp"]["samples_seen"]
        self.resumed = checkpoint

    def restore_optimizer(self) -> None:
        """The optimizer of the checkpoint that was resumed from, ahead of Lightning, which evaluation may depend on."""
        self.trainer.strategy.load_optimizer_state_dict(self.resumed)

    def record(self) -> dict[str, object]:
        """Provenance of checkpoints and LoRA files."""
        return {
            "format": CHECKPOINT_FORMAT,
            "mpp": __version__,
            "family": self.architecture.family,
            "base": self._base,
            "adapter": {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(self.adapter).items()},
            "seed": self.seed,
            "samples_seen": self.samples_seen,
            "steps": self.trainer.global_step,
            "config": self.provenance,
        }

    def needed_to_resume(self) -> dict[str, object]:
        """What only a run that goes on asks of a checkpoint."""
        data = getattr(self.trainer, "datamodule", None)
        made, asked = (getattr(schedule, "keywords", {}) for schedule in (self.make_schedule, self.schedule))
        fitted = any(asked.get(name) != value for name, value in made.items())
        return {
            "followers": self.followers,
            "schedule_steps": made.get("num_training_steps") or (self.planned_steps if fitted else None),
            "held_after": self.held_after,
            "processes": self.trainer.world_size,
            "samples": data.training_set().record() if isinstance(data, LatentDataModule) else None,
        }


def _memory_of(memory: Memory, architecture: Architecture, teacher: Teacher) -> Memory:
    """How a run fits, with what follows from the model and the teacher."""
    check_turns(architecture, memory.activations)
    if not teacher.eval_mode:
        return memory
    if memory.teacher == "lockstep":
        raise ValueError(
            "teacher.eval_mode=true does not go with memory.teacher=lockstep, where the student runs in between; set "
            "memory.teacher=apart"
        )
    return replace(memory, teacher="apart")
