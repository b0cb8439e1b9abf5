"""The masked prior loss: learn the target inside the mask, keep the base model's prediction outside.

`total = mean(error(pred, target), target weights) + prior_weight * mean(error(pred, prior), prior weights)`, each
term a mean over its own region. Each region is normalised by itself, so `prior_weight` is an independent knob:
1 means that preserving counts as much as learning, whatever the mask's area.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from mpp.core.masks import MaskWeights, as_mask, process_mask, split_regions

Latents = Float[Tensor, "b c h w"] | Float[Tensor, "b c f h w"]
AnyMask = Shaped[Tensor, "b 1 h w"] | Shaped[Tensor, "b 1 f h w"]
Scalar = Float[Tensor, ""]

EMPTY = 1e-8  # a region whose weights sum to less than this is empty: its term is 0, never 0 / 0


@dataclass(frozen=True)
class LossTerms:
    """Scalars with `total = target + prior`; `prior` includes `prior_weight`."""

    total: Scalar
    target: Scalar
    prior: Scalar


@dataclass(frozen=True)
class LossSums:
    """Sufficient statistics of the loss: sums that may be added over micro-batches and ranks.

    Attributes:
        target_error: Weighted sum of the error against the target (`per_sample`: sum of the samples' means).
        target_weight: What `target_error` is divided by: sum of weights over cells and channels, or of samples.
        prior_error: The same against the prior, without `prior_weight`.
        prior_weight: What `prior_error` is divided by.
        mask: Sum of the raw mask over cells.
        cells: Number of cells.
    """

    target_error: Scalar
    target_weight: Scalar
    prior_error: Scalar
    prior_weight: Scalar
    mask: Scalar
    cells: Scalar

    def __add__(self, other: "LossSums") -> "LossSums":
        """Statistics of both together."""
        return LossSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def stacked(self) -> Float[Tensor, "6"]:
        """The six sums as one vector, for a single reduction over ranks."""
        return torch.stack([getattr(self, f.name) for f in fields(self)])


@dataclass(frozen=True)
class MaskedPriorLoss:
    """Masked training with preservation of the base model's prediction outside the mask.

    Args:
        prior_weight: Weight of the prior term, >= 0; 0 is plain masked training.
        prior_threshold: None for the continuous mode, else in (0, 1): cells whose raw mask is below it are
            preserved in full and leave the target.
        mask_gamma: Exponent on the (blurred) mask, > 0; below 1 lifts low tiers.
        mask_min_weight: Floor of the target weights, in [0, 1).
        normalization: `global`: one weighted mean over the batch; `per_sample`: each sample's own weighted mean,
            then the mean over all samples.
        mask_blur: Gaussian kernel in latent cells, 0 or odd.
        area_scale_beta: >= 0; multiplies the target term by `mean(raw mask) ** beta`, which tames tiny masks.
        error: `mse`, `huber` or `l1`, for both terms.
        huber_delta: Where the Huber error turns linear, > 0.

    Raises:
        ValueError: A setting is out of its range.
    """

    prior_weight: float = 0.0
    prior_threshold: float | None = None
    mask_gamma: float = 1.0
    mask_min_weight: float = 0.0
    normalization: Literal["global", "per_sample"] = "global"
    mask_blur: int = 0
    area_scale_beta: float = 0.0
    error: Literal["mse", "huber", "l1"] = "mse"
    huber_delta: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        threshold, blur = self.prior_threshold, self.mask_blur
        rules = [
            ("prior_weight", _in(self.prior_weight, 0, math.inf), "at least 0"),
            ("prior_threshold", threshold is None or (_in(threshold, 0, 1) and threshold > 0), "between 0 and 1"),
            ("mask_gamma", _in(self.mask_gamma, 0, math.inf) and self.mask_gamma > 0, "greater than 0"),
            ("mask_min_weight", _in(self.mask_min_weight, 0, 1), "at least 0 and below 1"),
            ("normalization", self.normalization in ("global", "per_sample"), "global or per_sample"),
            ("mask_blur", blur == 0 or (isinstance(blur, int) and blur > 0 and blur % 2 == 1), "0 or an odd size"),
            ("area_scale_beta", _in(self.area_scale_beta, 0, math.inf), "at least 0"),
            ("error", self.error in ("mse", "huber", "l1"), "mse, huber or l1"),
            ("huber_delta", _in(self.huber_delta, 0, math.inf) and self.huber_delta > 0, "greater than 0"),
        ]
        bad = [f"loss.{name} must be {wish}, got {getattr(self, name)!r}" for name, fine, wish in rules if not fine]
        if bad:
            raise ValueError("; ".join(bad))

    def __call__(self, pred: Latents, target: Latents, mask: AnyMask | None, prior: Latents | None = None) -> LossTerms:
        """Loss of one batch.

        Args:
            pred: Student prediction, `(b, c, h, w)` or `(b, c, f, h, w)`.
            target: Training target of the same shape (velocity `noise - latents`).
            mask: Raw mask at latent resolution, or None for the plain mean of the error.
            prior: The base model's prediction, or None where the prior does not apply to the batch.

        Raises:
            ValueError: Shapes disagree.
        """
        cells = _as_video(pred, "pred")[:, :1]
        dtype = torch.promote_types(pred.dtype, torch.float32)
        raw = torch.ones_like(cells, dtype=dtype) if mask is None else as_mask(mask, dtype)
        weights = self._plain_weights(raw) if prior is None else self.weights(raw)
        return self.terms(self.sums(pred, target, weights, prior))

    def weights(self, mask: AnyMask) -> MaskWeights:
        """Which cells of a batch learn and which are kept, in float32 or the mask's float64.

        Without a prior weight nothing is kept. Whoever needs the weights of a batch is handed these: they are computed
        once a step.
        """
        plain = self._plain_weights(mask)
        return self.split(plain) if self.prior_weight > 0 else plain

    def split(self, weights: MaskWeights) -> MaskWeights:
        """The weights with the prior's region taken out, also where `prior_weight` is 0."""
        return split_regions(weights.raw, weights.target, threshold=self.prior_threshold)

    def sums(self, pred: Latents, target: Latents, weights: MaskWeights, prior: Latents | None = None) -> LossSums:
        """Sufficient statistics of one batch; arguments as in the call, but with the mask's `weights`."""
        dtype = torch.promote_types(pred.dtype, torch.float32)
        pred = _as_video(pred, "pred").to(dtype)
        target = _same_shape(_as_video(target, "target").to(dtype), pred, "target")
        _check_cells(weights.raw, pred)
        target_cells = self._error(pred, target)
        if prior is None or self.prior_weight == 0:
            prior_cells = torch.zeros_like(target_cells)
        else:
            prior_cells = self._error(pred, _same_shape(_as_video(prior, "prior").detach().to(dtype), pred, "prior"))
        return self._reduce(target_cells, prior_cells, weights, pred.shape[1])

    def normalizers(self, weights: MaskWeights, channels: int) -> LossSums:
        """The statistics of a batch as far as its mask alone decides them: the errors are 0.

        Args:
            weights: Of its cells.
            channels: Latent channels; a weight sum counts each of them.
        """
        nothing = torch.zeros_like(weights.raw)
        return self._reduce(nothing, nothing, weights, channels)

    def terms(self, sums: LossSums, over: LossSums | None = None) -> LossTerms:
        """Loss from statistics.

        Args:
            sums: Statistics whose errors enter.
            over: Statistics of the effective batch (all ranks and accumulated micro-batches) whose weights divide;
                None: `sums` itself.
        """
        over = over or sums
        target = _ratio(sums.target_error, over.target_weight)
        if self.area_scale_beta and self.normalization == "global":
            target = target * _ratio(over.mask, over.cells) ** self.area_scale_beta
        prior = self.prior_weight * _ratio(sums.prior_error, over.prior_weight)
        return LossTerms(target + prior, target, prior)

    def advice(self) -> list[str]:
        """Settings that are allowed and rarely meant, each with its remedy."""
        found = []
        if self.prior_weight > 0 and self.mask_min_weight > 0:
            found.append(
                f"loss.mask_min_weight={self.mask_min_weight} with a prior: the floor trains the background on the "
                "images and weakens the prior; set loss.mask_min_weight=0"
            )
        if self.prior_weight > 0 and self.normalization == "global":
            found.append(
                "loss.normalization=global with a prior: masks of uneven area make prior_weight uneven; "
                "set loss.normalization=per_sample"
            )
        if self.prior_threshold is not None and self.prior_weight == 0:
            found.append(
                f"loss.prior_threshold={self.prior_threshold} has no effect while loss.prior_weight=0; "
                "set loss.prior_weight=1 to preserve the background"
            )
        return found

    def _plain_weights(self, mask: AnyMask) -> MaskWeights:
        raw = as_mask(mask, torch.promote_types(mask.dtype, torch.float32))
        processed = process_mask(raw, gamma=self.mask_gamma, min_weight=self.mask_min_weight, blur=self.mask_blur)
        return MaskWeights(raw, processed, torch.zeros_like(processed))

    def _error(self, pred: Tensor, other: Tensor) -> Float[Tensor, "b 1 f h w"]:
        """Element-wise error summed over channels: weights broadcast over them, so they can be summed first."""
        match self.error:
            case "mse":
                error = (pred - other) ** 2
            case "l1":
                error = (pred - other).abs()
            case "huber":
                error = functional.huber_loss(pred, other, reduction="none", delta=self.huber_delta)
        return error.sum(1, keepdim=True)

    def _reduce(self, target_cells: Tensor, prior_cells: Tensor, weights: MaskWeights, channels: int) -> LossSums:
        cells = torch.full_like(weights.raw[0, 0, 0, 0, 0], weights.raw.numel())
        if self.normalization == "global":
            return LossSums(
                (target_cells * weights.target).sum(),
                weights.target.sum() * channels,
                (prior_cells * weights.prior).sum(),
                weights.prior.sum() * channels,
                weights.raw.sum(),
                cells,
            )
        target = _ratio(_per_sample(target_cells * weights.target), _per_sample(weights.target) * channels)
        prior = _ratio(_per_sample(prior_cells * weights.prior), _per_sample(weights.prior) * channels)
        if self.area_scale_beta:
            target = target * weights.raw.flatten(1).mean(1) ** self.area_scale_beta
        samples = torch.full_like(cells, weights.raw.shape[0])
        return LossSums(target.sum(), samples, prior.sum(), samples, weights.raw.sum(), cells)


def _in(value: float, low: float, high: float) -> bool:
    """Whether `low <= value < high`, False for anything that is no number (NaN included)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high


def _per_sample(cells: Tensor) -> Tensor:
    return cells.flatten(1).sum(1)


def _ratio(error: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > EMPTY, error / weight.clamp(min=EMPTY), 0)


def _as_video(latents: Tensor, name: str) -> Tensor:
    if latents.ndim not in (4, 5):
        raise ValueError(
            f"{name} has shape (batch, channels, height, width) or (batch, channels, frames, height, width), "
            f"got {tuple(latents.shape)}"
        )
    return latents.unsqueeze(2) if latents.ndim == 4 else latents


def _same_shape(other: Tensor, pred: Tensor, name: str) -> Tensor:
    if other.shape != pred.shape:
        raise ValueError(f"{name} has shape {tuple(other.shape)}, pred has {tuple(pred.shape)}; they must be equal")
    return other


def _check_cells(raw: Tensor, pred: Tensor) -> None:
    if raw.shape[0] != pred.shape[0] or raw.shape[2:] != pred.shape[2:]:
        raise ValueError(
            f"mask {tuple(raw.shape)} does not match latents {tuple(pred.shape)} frame for frame and cell for cell; "
            "run `python -m mpp.prepare` again if they come from a cache"
        )
