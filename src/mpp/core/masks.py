"""Raw masks to loss weights: which latent cells learn the target and which keep the base model's prediction.

Shape legend: b batch, f latent frames, h and w latent cells. A mask is 1 where the LoRA learns and 0 where the
base model's prediction is preserved.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

Mask = Float[Tensor, "b 1 f h w"]

# A prior weight below this is rounding, not a wish: a region is normalised by itself, so the residue of one that is
# empty would count as much as a real one.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class MaskWeights:
    """Per-cell weights of the two loss terms, all `(b, 1, f, h, w)` in [0, 1].

    Attributes:
        raw: The mask itself, clamped to [0, 1].
        target: Weight of the error against the training target (`processed` in the formulas).
        prior: Weight of the error against the base model's prediction.
    """

    raw: Mask
    target: Mask
    prior: Mask

    def needs_prior(self) -> Bool[Tensor, " b"]:
        """Samples that have any cell to preserve: the teacher runs for exactly these."""
        return self.prior.flatten(1).amax(1) > 0

    def to(self, device: torch.device | str) -> "MaskWeights":
        """The weights on a device; to a GPU by way of page-locked memory, from where the host need not wait."""
        fields = (self.raw, self.target, self.prior)
        if torch.device(device).type == "cuda" and self.raw.device.type == "cpu":
            fields = tuple(field.pin_memory() for field in fields)
        return MaskWeights(*(field.to(device, non_blocking=True) for field in fields))


def as_mask(mask: Shaped[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Mask:
    """Bring a mask of any dtype to `(b, 1, f, h, w)` floats clamped to [0, 1].

    Args:
        mask: `(b, 1, h, w)` for images or `(b, 1, f, h, w)`; 1 = learn, 0 = preserve.
        dtype: Floating dtype of the result.

    Raises:
        ValueError: The mask has another number of dimensions, or more than one channel.
    """
    if mask.ndim not in (4, 5) or mask.shape[1] != 1:
        raise ValueError(
            f"a mask has shape (batch, 1, height, width) or (batch, 1, frames, height, width), got {tuple(mask.shape)}"
        )
    raw = mask.to(dtype).clamp(0, 1)
    return raw.unsqueeze(2) if raw.ndim == 4 else raw


def blur_mask(raw: Mask, kernel_size: int) -> Mask:
    """Spatial Gaussian over latent cells, each frame alone, edges replicated.

    The width follows the kernel: `sigma = 0.3 * ((k - 1) / 2 - 1) + 0.8`. A mean lies between the smallest and the
    largest value under the kernel; holding it there keeps what is constant exactly as it is. Computed in the mask's
    own precision also under autocast, which would convolve in half of it.

    Args:
        raw: Mask in [0, 1].
        kernel_size: 0 (no blur) or odd, in latent cells.
    """
    if kernel_size == 0:
        return raw
    sigma = 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8
    offset = torch.arange(kernel_size, dtype=raw.dtype, device=raw.device) - (kernel_size - 1) / 2
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    reach = kernel_size // 2
    frames = raw.transpose(1, 2).flatten(0, 1)  # (b * f, 1, h, w)
    padded = functional.pad(frames, (reach, reach, reach, reach), mode="replicate")
    with torch.autocast(raw.device.type, enabled=False):
        soft = functional.conv2d(padded, kernel.view(1, 1, 1, -1))
        soft = functional.conv2d(soft, kernel.view(1, 1, -1, 1))
    soft = soft.clamp(-_largest(-padded, kernel_size), _largest(padded, kernel_size))
    return soft.unflatten(0, (raw.shape[0], raw.shape[2])).transpose(1, 2)


def _largest(frames: Float[Tensor, "n 1 y x"], size: int) -> Float[Tensor, "n 1 h w"]:
    """Largest value in each window of `size` by `size` cells."""
    rows = functional.max_pool2d(frames, (1, size), stride=1)
    return functional.max_pool2d(rows, (size, 1), stride=1)


def process_mask(raw: Mask, *, gamma: float, min_weight: float, blur: int) -> Mask:
    """Target weights before the prior takes its region: blur, then `soft ** gamma`, then the floor.

    The floor is affine, `processed * (1 - min_weight) + min_weight`, so full weight stays 1.
    """
    processed = blur_mask(raw, blur) ** gamma
    return processed * (1 - min_weight) + min_weight


def split_regions(raw: Mask, processed: Mask, *, threshold: float | None) -> MaskWeights:
    """Divide the cells between target and prior.

    Continuous (no threshold): `prior = 1 - processed`, and 0 where that is negligible. With a threshold: `prior = raw <
    threshold` as 0/1, decided on the raw mask, and those cells leave the target, so that a cell either learns or is
    preserved, never both.

    Args:
        raw: Mask in [0, 1].
        processed: Result of `process_mask` on it.
        threshold: In (0, 1), or None for the continuous mode.
    """
    if threshold is None:
        prior = 1 - processed
        return MaskWeights(raw, processed, torch.where(prior < NEGLIGIBLE, 0, prior))
    prior = (raw < threshold).to(raw.dtype)
    return MaskWeights(raw, processed * (1 - prior), prior)
