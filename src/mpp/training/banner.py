"""What a run says of itself at its start, in words."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import Trainer

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.coverage import Coverage, bucket_of, mode_of, step_cost
from mpp.cache.mask_facts import black_under
from mpp.core.loss import MaskedPriorLoss
from mpp.memory.bases import is_quantised
from mpp.models.weights import count_of
from mpp.training.module import MaskedPriorModule
from mpp.wording import few

_BUCKETS = 8  # that are named
_ACTIVATIONS = {
    "keep": "activations are kept",
    "checkpoint": "activations are recomputed",
    "offload": "activations are recomputed from the blocks' inputs, which wait on the CPU",
}


def banner(trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule, coverage: Coverage) -> list[str]:
    """What is trained on what, with which data, for how long; mode, coverage, expected cost of the teacher."""
    return [
        *_model(trainer, module),
        *_length(trainer, module, data),
        *_rate(module),
        *_loss(module, data, coverage),
        *_data(data),
    ]


def _model(trainer: Trainer, module: MaskedPriorModule) -> list[str]:
    model = module.architecture
    layers = [layer for layer in module.modules() if is_quantised(layer)]
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    count = sum(p.numel() for p in frozen) + sum(layer.out_features * layer.in_features for layer in layers)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in frozen})
    source = f" from {model.pretrained}" if isinstance(model.pretrained, str) else ""
    memory = _ACTIVATIONS[module.memory.activations]
    memory += "" if module.memory.resident == "all" else f", {module.memory.resident} blocks there at once"
    memory += ", teacher in lockstep" if module.memory.teacher == "lockstep" else ""
    return [
        f"model: {model.family}{source}, {count_of(count)} parameters, {' and '.join(kinds)}"
        + (f", linear layers of its blocks in {module.memory.base}" if layers else ""),
        f"adapter: {module.adapter.kind}, rank {module.adapter.rank}, {trained:,} trainable parameters",
        f"on {device_name(trainer.strategy.root_device)}, trainer.precision={trainer.precision}, {memory}"
        + (", compiled" if module.compile_blocks else ""),
    ]


def _length(trainer: Trainer, module: MaskedPriorModule, data: LatentDataModule) -> list[str]:
    ranks, parts, total = trainer.world_size, trainer.accumulate_grad_batches, module.planned_steps
    batches = data.order(0, ranks, limit=trainer.limit_train_batches).stop
    steps = math.ceil(batches / parts)
    factors = [f"{data.batch_size} sample{'s' * (data.batch_size > 1)}"]
    factors += [f"{parts} batches accumulated"] * (parts > 1) + [f"{ranks} processes"] * (ranks > 1)
    whole = f" = {data.batch_size * parts * ranks} per step" if len(factors) > 1 else ""
    long = f"steps: {steps} per epoch" if total is None else (
        f"steps: {total}, {steps} per epoch, so {total / steps:.3g} epochs"
    )  # fmt: skip
    return [f"batch: at most {' x '.join(factors)}{whole}", long]


def _rate(module: MaskedPriorModule) -> list[str]:
    name, settings = _called(module.make_optimizer)
    rate = f", lr {settings['lr']:g}" if "lr" in settings else ""
    course = ""
    if module.make_schedule is not None:
        schedule, how = _called(module.make_schedule)
        told = ", ".join(f"{key}={value}" for key, value in how.items() if value is not None)
        course = f", {schedule.removeprefix('get_')}{f' ({told})' if told else ''}"
    return [f"optimizer: {name}{rate}{course}"]


def _called(made: Callable[..., Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the settings of what a partial calls."""
    inner = getattr(made, "func", made)
    return getattr(inner, "__name__", type(inner).__name__), getattr(made, "keywords", {})


def _loss(module: MaskedPriorModule, data: LatentDataModule, coverage: Coverage) -> list[str]:
    loss, visits, picks = module.loss, int(data.train_entries.repeats.sum()), data.pool_picks
    rate = picks / (picks + visits)
    taught = coverage.taught * (1 - data.changes.unmasked_probability) * (1 - rate) + rate
    least, most = step_cost(taught, gradient_checkpointing=module.memory.recomputes)
    cost = (
        f"teacher: runs for {taught:.0%} of the samples; steps take about {least:.2f}x (long videos) to {most:.2f}x "
        f"(small images) as long"
        if loss.prior_weight > 0
        else "teacher: never runs"
    )
    settings = ", ".join(f"{name}={value}" for name, value in vars(loss).items())
    return [f"{mode_of(loss)}: {settings}", shares(coverage), cost]


def shares(coverage: Coverage) -> str:
    """How much of the area is learned, preserved, and neither or both in part; these add up to 100 %."""
    learn, preserve = round(coverage.learn * 1000), round(coverage.preserve * 1000)
    rest = 1000 - learn - preserve
    between = f"between {rest / 10:.1f}%" if rest >= 0 else f"of which both {-rest / 10:.1f}%"
    return (
        f"coverage: learned {learn / 10:.1f}%, preserved {preserve / 10:.1f}%, {between} of the area "
        f"(from {coverage.scanned} samples)"
    )


def _data(data: LatentDataModule) -> list[str]:
    visits, masks = int(data.train_entries.repeats.sum()), int(data.train_entries.masked.sum())
    sizes = Counter(bucket_of(entry.shape, data.architecture.latents) for entry in data.train_entries)
    common = [f"{name}: {number}" for name, number in sizes.most_common()]
    lines = [
        f"samples: {len(data.train_entries)} for training ({masks} with masks), {len(data.val_entries)} for validation",
        f"buckets: {', '.join(few(common, _BUCKETS))}",
    ]
    if visits > len(data.train_entries):
        lines.append(f"repeats: {visits} visits per epoch")
    if data.changes.unmasked_probability:
        lines.append(f"mask dropout: {data.changes.unmasked_probability:.0%} of the visits train without their mask")
    if data.changes.caption_dropout:
        lines.append(f"caption dropout: {data.changes.caption_dropout:.0%} of the visits have the empty caption")
    if data.pool:
        rate = data.pool_picks / (data.pool_picks + visits)
        lines.append(
            f"preservation: {data.pool_picks} more samples per epoch ({rate:.0%}) from a pool of {len(data.pool)}"
        )
    if data.empty_masks and data.empty_masks.skipped:
        lines.append(f"left out by data.on_empty_mask=skip: {data.empty_masks}")
    if data.source_changes.unchecked:
        lines.append(f"media, masks and captions were not all compared with the cache: {data.source_changes.unchecked}")
    if data.unchecked:
        lines.append(f"not on this machine, so not compared with the cache's: {', '.join(data.unchecked)}")
    return lines


def device_name(device: torch.device) -> str:
    """A device as people know it, with its memory."""
    if device.type != "cuda":
        return f"cpu (torch threads: {torch.get_num_threads()})" if device.type == "cpu" else device.type
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} ({found.total_memory / 2**30:.0f} GiB)"


def data_advice(loss: MaskedPriorLoss, data: LatentDataModule, coverage: Coverage) -> list[str]:
    """What of the data is rarely meant under a loss, each with its remedy."""
    advice = []
    masked = bool(data.train_entries.masked.any())
    advice += [
        f"{line}; this run uses the old ones: run `python -m mpp.prepare` again, which makes what changed"
        for line in data.source_changes.lines()
    ]
    if data.empty_masks and not data.empty_masks.skipped:
        advice.append(
            f"{data.empty_masks}: {black_under(loss)}; draw them, or leave them out by data.on_empty_mask=skip"
        )
    if data.changes.unmasked_probability and not masked:
        share = data.changes.unmasked_probability
        advice.append(f"data.unmasked_probability={share} changes nothing: no sample has a mask")
    if loss.prior_weight > 0 and not masked and not data.pool:
        advice.append(
            "loss.prior_weight > 0 while no sample has a mask: the prior never applies; prepare with data.mask_dir, or "
            "choose loss=plain"
        )
    threshold = loss.prior_threshold
    if loss.prior_weight > 0 and threshold is not None and masked and coverage.lowest >= threshold:
        advice.append(
            f"no mask goes below loss.prior_threshold={threshold} (lowest value {coverage.lowest:.3f}): the prior "
            "region is empty; a floor may be baked into the masks: remove it, or raise the threshold above it"
        )
    return advice
