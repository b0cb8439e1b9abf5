"""The LightningModule: a frozen DiT with an adapter, taught by itself without it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpp import __version__, metrics
from mpp.core import draws, flow
from mpp.core.flow import Noisy
from mpp.core.loss import LossSums, MaskedPriorLoss
from mpp.core.masks import MaskWeights
from mpp.data.batch import Batch
from mpp.metrics import LossMetrics
from mpp.models.adapters import Adapter, adapter_state, inject, load_adapter_state
from mpp.models.base import Architecture, draw_sigma
from mpp.teacher import Teacher

CHECKPOINT_FORMAT = 1
_LOSSY_PRECISION = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


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
        gradient_checkpointing: Recompute activations in the backward pass.
        compile_blocks: `torch.compile` the transformer's repeated blocks.
        provenance: Resolved configuration, for checkpoints and LoRA files.

    Raises:
        ValueError: A prior without an adapter, or no adapter at all.
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
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        provenance: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        if adapter is None:
            why = (
                f"loss.prior_weight={loss.prior_weight} needs an adapter: the teacher is the model with its adapter off"
                if loss.prior_weight > 0
                else "there is nothing to train: mpp trains adapters on a frozen model"
            )
            raise ValueError(f"lora=none: {why}; choose lora=lora")
        if val_sigmas is not None and not all(0 <= sigma <= 1 for sigma in val_sigmas):
            raise ValueError(f"val_sigmas must lie in [0, 1], got {list(val_sigmas)}")
        self.architecture, self.adapter, self.loss, self.teacher = architecture, adapter, loss, teacher
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.seed, self.val_sigmas = seed, val_sigmas
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.provenance = dict(provenance or {})
        self.transformer: nn.Module | None = None
        self.train_metrics, self.val_metrics = LossMetrics(loss), LossMetrics(loss)
        self.samples_seen = 0
        self._base: str | None = None
        self._reported_at = 0.0
        self._warned = False
        self._window: tuple[Tensor, ...] | None = None  # the accumulation window that `_over` was measured on
        self._over: LossSums | None = None
        self._learning = 0  # samples since the last report that are meant to teach something

    def configure_model(self) -> None:
        """Load the frozen transformer and add the adapter, once.

        Raises:
            ValueError: A precision that would round the adapter, targets that match nothing, or a strategy that
            cannot train experts.
        """
        if self.transformer is not None:
            return
        if self._trainer is not None and self.trainer.precision in _LOSSY_PRECISION:
            raise ValueError(
                f"trainer.precision={self.trainer.precision} would round the float32 adapter; use bf16-mixed with "
                "model.dtype=bfloat16"
            )
        self._check_strategy()
        transformer = self.architecture.load_transformer()
        self._check_precision(transformer)
        inject(transformer, self.adapter, self.architecture.lora_targets, seed=self.seed)
        if self.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if self.compile_blocks:
            transformer.compile_repeated_blocks(fullgraph=True)
        if self.architecture.boundaries:
            # DDP wants all it looks at on one device; the frozen weights of an idle expert are elsewhere.
            frozen = [name for name, p in transformer.named_parameters(prefix="transformer") if not p.requires_grad]
            frozen += [name for name, _ in transformer.named_buffers(prefix="transformer")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)  # noqa: SLF001
        self._base = self.architecture.identity().transformer
        self.transformer = transformer.train()

    def _check_precision(self, transformer: nn.Module) -> None:
        if self._trainer is None or self.trainer.precision != "bf16-mixed":
            return
        if any(p.dtype == torch.float16 for p in transformer.parameters()):
            raise ValueError(
                "trainer.precision=bf16-mixed does not go with model.dtype=float16; use model.dtype=bfloat16, or "
                "trainer.precision=16-mixed"
            )

    def _check_strategy(self) -> None:
        """Experts: a step may use one expert alone, and DDP waits for gradients of all parameters unless told."""
        if not self.architecture.boundaries or self._trainer is None:
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):  # noqa: SLF001
            raise ValueError(
                "this model trains two experts, of which a step may use one; set "
                "trainer.strategy=ddp_find_unused_parameters_true"
            )

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own type)
        """Optimizer over the adapter, and its schedule stepped per optimizer step."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }

    # ---------------------------------------------------------------- steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, scaled so that accumulated batches and ranks add up to one big batch."""
        noisy = self.corrupt(batch)  # one draw of noise and sigma for both passes
        weights = self.weigh(batch)  # these cells learn, these are kept: computed once, on the host
        samples = rows(weights)
        prior = self.teacher_step(noisy, batch, samples)  # None where no sample has anything to preserve
        pred = self.student_step(noisy, batch)
        weights = weights.to(pred.device)
        sums = self.loss.sums(pred, noisy.target, weights, prior)
        over, parts = self.effective_batch(sums, batch, weights)
        self.train_metrics.update(sums, len(batch), len(samples), pred=pred, prior=prior, prior_weights=weights.prior)
        self.report_train(batch, batch_idx)
        return self.loss.terms(sums, over).total * parts

    def corrupt(self, batch: Batch, epoch: int | str | None = None, sigma: float | None = None) -> Noisy:
        """Noise and sigma of each sample for this visit, applied to the latents.

        Args:
            batch: Samples.
            epoch: Position of the draw; None: the current epoch.
            sigma: A fixed noise level; None: drawn from the architecture's law.
        """
        position = self.current_epoch if epoch is None else epoch
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([draws.noise(shape, self.seed, position, key) for key in batch.keys])
        if sigma is None:
            levels = draw_sigma(self.architecture, batch.keys, shape, self.seed, position)
        else:
            levels = torch.full((len(batch),), sigma)
        noise, levels = noise.to(batch.latents, non_blocking=True), levels.to(batch.latents.device, non_blocking=True)
        noisy = flow.interpolate(batch.latents, noise, levels)
        return Noisy(noisy, levels, flow.velocity(batch.latents, noise))

    def teacher_step(self, noisy: Noisy, batch: Batch, samples: Sequence[int]) -> Float[Tensor, "b c f h w"] | None:
        """The base model's prediction for the samples that have something to preserve, None if there are none."""
        return self.teacher.predict(self.architecture, self.transformer, noisy, batch.conditioning, samples)

    def student_step(self, noisy: Noisy, batch: Batch) -> Float[Tensor, "b c f h w"]:
        """The adapted model's prediction, on the same noisy latents."""
        return self.architecture.velocity(self.transformer, noisy.latents, noisy.sigma, batch.conditioning)

    def weigh(self, batch: Batch) -> MaskWeights:
        """Weights of a batch, on the host: who needs a teacher is decided there, so the device is never asked."""
        return self.loss.weights(batch.mask if batch.host_mask is None else batch.host_mask)

    def effective_batch(self, sums: LossSums, batch: Batch, weights: MaskWeights) -> tuple[LossSums, int]:
        """What the loss divides by, and how many parts it will be averaged over.

        DDP averages gradients over ranks and Lightning divides by the accumulated batches; the weights of the whole
        effective batch are known from its masks alone, so each part divides by those and is scaled back.
        """
        ranks = self.trainer.world_size if self._trainer is not None else 1
        if ranks == 1 and batch.window is None:
            return sums, 1
        if batch.window is None or batch.window is not self._window:
            every = [weights] if batch.window is None else [self.loss.weights(mask) for mask in batch.window]
            channels = batch.latents.shape[1]
            mine = torch.stack([self.loss.normalizers(one, channels).stacked() for one in every]).sum(0)
            mine = mine.to(self.device)
            self._window = batch.window
            self._over = LossSums(*(self.trainer.strategy.reduce(mine, reduce_op="sum") if ranks > 1 else mine))
        return self._over, ranks * self.trainer.accumulate_grad_batches

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Target, prior and drift at fixed sigmas and noise; the drift also where training runs no teacher."""
        del batch_idx
        weights = self.weigh(batch)
        region = self.loss.split(weights)
        samples, weights, region = rows(region), weights.to(batch.mask.device), region.to(batch.mask.device)
        for number, sigma in enumerate(self._validation_sigmas(batch)):
            noisy = self.corrupt(batch, f"validation {number}", sigma)
            prior = self.teacher.predict(self.architecture, self.transformer, noisy, batch.conditioning, samples)
            pred = self.student_step(noisy, batch)
            sums = self.loss.sums(pred, noisy.target, weights, prior)
            if batch.counted:
                self.val_metrics.update(
                    sums, len(batch), len(samples), pred=pred, prior=prior, prior_weights=region.prior
                )

    def _validation_sigmas(self, batch: Batch) -> list[float]:
        if self.val_sigmas is not None:
            return list(self.val_sigmas)
        middles = torch.tensor([0.125, 0.375, 0.625, 0.875])
        return self.architecture.sigma.quantile(middles, self.architecture.latents.tokens(batch.latents.shape)).tolist()

    # ---------------------------------------------------------------- reports

    def report_train(self, batch: Batch, batch_idx: int) -> None:
        """Log the running sums every `log_every_n_steps` optimizer steps."""
        if self._trainer is None:
            return
        trainer = self.trainer
        self._learning += len(batch) - batch.preserved
        self.samples_seen += len(batch) * trainer.world_size
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not ends_step or (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        values = self.train_metrics.compute()  # collective: every rank comes here
        now = time.monotonic()
        rate = self.train_metrics.samples * trainer.world_size / max(now - self._reported_at, 1e-9)
        self._reported_at = now
        self._warn_if_nothing_learned(self.train_metrics.sums)
        self.train_metrics.reset()
        for name, value in metrics.names("train", values).items():
            self.log(name, value, prog_bar=name.split("/")[1] in metrics.PROGRESS_BAR, batch_size=len(batch))
        self.log("perf/samples_per_second", rate, batch_size=len(batch))

    def _warn_if_nothing_learned(self, sums: Tensor) -> None:
        nothing, self._learning = float(sums[0]) == 0 and self._learning > 0, 0
        if nothing and not self._warned:
            self._warned = True
            self.print(
                "warning: nothing is learned: every mask since the last report is empty (all 0); check that masks are "
                "not inverted (1 = white = learn)"
            )

    def on_train_start(self) -> None:
        """Start the clock of the first report."""
        self._reported_at = time.monotonic()
        self._optimizer_mode("train")

    def on_validation_start(self) -> None:
        """Schedule-free optimizers evaluate other weights than they train."""
        self._optimizer_mode("eval")

    def on_validation_end(self) -> None:
        """Back to the weights that are trained."""
        self._optimizer_mode("train")

    def on_validation_epoch_end(self) -> None:
        """Log the validation breakdown over all ranks."""
        values = metrics.names("val", self.val_metrics.compute())
        self.val_metrics.reset()
        self.log_dict(values, sync_dist=True)  # equal on all ranks already

    def _optimizer_mode(self, mode: str) -> None:
        for optimizer in self.trainer.optimizers:
            switch = getattr(optimizer, mode, None)
            if callable(switch):
                switch()

    @contextmanager
    def evaluated_adapter(self) -> Iterator[dict[str, Tensor]]:
        """The adapter's tensors as they are meant to be used; training goes on bit for bit as if nothing happened.

        Schedule-free optimizers train other weights than they evaluate; for all others these are the same.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        training = self.training and bool(self.trainer.optimizers)
        if training:
            self._optimizer_mode("eval")
        try:
            yield adapter_state(self.transformer)
        finally:
            if training:
                self._optimizer_mode("train")
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

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
        checkpoint["mpp"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not this run's."""
        check_checkpoint(checkpoint, base=self._base, seed=self.seed)
        self.samples_seen = checkpoint["mpp"]["samples_seen"]

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
            "steps": self.trainer.global_step if self._trainer is not None else 0,
            "config": self.provenance,
        }


def rows(weights: MaskWeights) -> tuple[int, ...]:
    """Numbers of the samples that have something to preserve."""
    return tuple(weights.needs_prior().nonzero().flatten().tolist())


def check_checkpoint(checkpoint: Mapping[str, Any], *, base: str | None, seed: int) -> None:
    """Refuse a checkpoint that cannot be resumed here.

    Raises:
        ValueError: Not made by mpp, another format version, no adapter in it, another base model, or another seed.
    """
    record = checkpoint.get("mpp")
    if not isinstance(record, Mapping) or "state_dict" not in checkpoint:
        raise ValueError("ckpt_path is not a checkpoint of mpp; give a .ckpt file from a run's checkpoints folder")
    if record.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"the checkpoint has format version {record.get('format')}, this mpp reads {CHECKPOINT_FORMAT}"
        )
    if not checkpoint["state_dict"]:
        raise ValueError(
            "the checkpoint holds no adapter tensors, so there is nothing to resume; start without ckpt_path"
        )
    if base is not None and record.get("base") not in (None, base):
        raise ValueError(
            f"the checkpoint was trained on another base model (weights {record['base']}) than model.pretrained "
            f"({base}); resume with the model it was made with"
        )
    if record.get("seed") != seed:
        raise ValueError(
            f"the checkpoint was made with seed={record.get('seed')}, this run has seed={seed}: samples would see "
            "other noise; resume with the same seed"
        )
