"""Flow matching: sigma laws, interpolation and the velocity target.

Convention everywhere in mpp: sigma in [0, 1], 0 = clean, 1 = noise;
`noisy = (1 - sigma) * latents + sigma * noise`, target = velocity = `noise - latents`
(rectified flow, Liu et al. 2022, arXiv 2209.03003, with time reversed so that 1 is noise).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mpp.core import draws


@dataclass(frozen=True)
class Noisy:
    """One draw of noise and sigma applied to latents; teacher and student both see exactly this.

    Attributes:
        latents: Noisy latents `(b, c, f, h, w)`.
        sigma: Noise level per sample, in [0, 1].
        target: Velocity `noise - latents`, what the student learns inside the mask.
    """

    latents: Float[Tensor, "b c f h w"]
    sigma: Float[Tensor, " b"]
    target: Float[Tensor, "b c f h w"]


def interpolate(
    latents: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b c f h w"]:
    """Noisy latents `(1 - sigma) * latents + sigma * noise`, sigma per sample in [0, 1]."""
    level = sigma.to(latents.dtype).view(-1, 1, 1, 1, 1)
    return (1 - level) * latents + level * noise


def velocity(latents: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
    """The training target `noise - latents`, the derivative of `interpolate` by sigma."""
    return noise - latents


Shift = Callable[[int], float]  # number of tokens of a sample -> factor s > 0 in `s * t / (1 + (s - 1) * t)`


@dataclass(frozen=True)
class LinearShift:
    """Resolution-dependent shift `exp(mu)` with mu linear in the number of tokens.

    Esser et al. 2024 (arXiv 2403.03206), section 5.3.2, in the form of diffusers' `calculate_shift`.
    FLUX: 256 -> 0.5, 4096 -> 1.15. Qwen-Image: 256 -> 0.5, 8192 -> 0.9.
    """

    base_tokens: int = 256
    base_mu: float = 0.5
    max_tokens: int = 4096
    max_mu: float = 1.15

    def __call__(self, tokens: int) -> float:
        """Shift factor for a sample of `tokens` tokens."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_mu + slope * (tokens - self.base_tokens))


@dataclass(frozen=True)
class EmpiricalShift:
    """FLUX.2's shift: mu interpolated between fits for 10 and 200 steps (diffusers `compute_empirical_mu`)."""

    num_steps: int = 50

    def __call__(self, tokens: int) -> float:
        """Shift factor for a sample of `tokens` tokens sampled in `num_steps` steps."""
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return math.exp(at_200)
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        slope = (at_200 - at_10) / 190
        return math.exp(slope * self.num_steps + at_200 - 200 * slope)


# Of `stretched_logit_normal`: the 0.5 % and 99.9 % points of the normal law, and the least sigma
_STRETCH_FROM, _STRETCH_TO, _LEAST = -2.5758, 3.0902, 1e-3


@dataclass(frozen=True)
class SigmaLaw:
    """Distribution of the training sigma, given by its quantile function.

    A base law on (0, 1) is shifted by `s * t / (1 + (s - 1) * t)` (Esser et al. 2024, eq. 23) and, where min or max
    sigma is set, conditioned on that range: the density keeps its shape inside the range (what rejection sampling
    gives), so an expert that serves part of the range sees the same law there. Being a quantile function it turns
    one uniform number per sample into one sigma, without rejection.

    `stretched_logit_normal` is LTX-2's (Lightricks' `ShiftedLogitNormalTimestepSampler`, packages/ltx-trainer), which
    reaches low noise however large the shift: with `t` the shifted logit-normal and `a`, `b` its 0.5 % and 99.9 %
    points, `x = (t - a) / (b - a)`; where `x < e = 0.001` it is reflected to `2 e - x`; what is above 1 is 1; and a
    share of the draws is uniform in `[e, 1]` instead.

    Args:
        distribution: `uniform`, `logit_normal` or `stretched_logit_normal`.
        mean: Mean of logit(t), for the logit-normal ones.
        std: Standard deviation of logit(t), > 0, for the logit-normal ones.
        shift: A factor > 0, or a rule from tokens to a factor (`LinearShift`, `EmpiricalShift`). Above 1 moves
            towards noise.
        min_sigma: Lower end of the range, in [0, 1).
        max_sigma: Upper end, in (min_sigma, 1].
        uniform_share: Share of uniform draws in `stretched_logit_normal`, in [0, 1].

    Raises:
        ValueError: A setting is out of its range.
    """

    distribution: Literal["uniform", "logit_normal", "stretched_logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float | Shift = 1.0
    min_sigma: float = 0.0
    max_sigma: float = 1.0
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.distribution not in ("uniform", "logit_normal", "stretched_logit_normal"):
            raise ValueError(
                f"sigma.distribution must be uniform, logit_normal or stretched_logit_normal, got {self.distribution!r}"
            )
        if not self.std > 0:
            raise ValueError(f"sigma.std must be greater than 0, got {self.std}")
        if isinstance(self.shift, int | float) and not self.shift > 0:
            raise ValueError(f"sigma.shift must be greater than 0, got {self.shift}")
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ValueError(
                f"sigma.min_sigma and sigma.max_sigma must satisfy 0 <= min < max <= 1, "
                f"got {self.min_sigma} and {self.max_sigma}"
            )
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"sigma.uniform_share must be in [0, 1], got {self.uniform_share}")
        if self.distribution != "stretched_logit_normal" and self.uniform_share != SigmaLaw.uniform_share:
            raise ValueError(
                f"sigma.uniform_share={self.uniform_share} is for stretched_logit_normal, not {self.distribution}"
            )
        if self.distribution == "stretched_logit_normal" and self.max_sigma <= _LEAST:
            raise ValueError(
                f"sigma.max_sigma must be greater than {_LEAST}, the least sigma of stretched_logit_normal, "
                f"got {self.max_sigma}"
            )

    def quantile(self, uniform: Float[Tensor, " n"], tokens: int) -> Float[Tensor, " n"]:
        """Sigma for each uniform number in [0, 1), float64.

        Args:
            uniform: Numbers in [0, 1).
            tokens: Tokens of a sample (latent cells over the patch), for shifts that depend on it.
        """
        ends = torch.tensor([self.min_sigma, self.max_sigma], dtype=torch.float64)
        low, high = self.cdf(ends, tokens)
        level = low + (high - low) * uniform.double()
        if self.distribution == "stretched_logit_normal":
            return self._bisected(level, tokens).clamp(self.min_sigma, self.max_sigma)
        if self.distribution == "logit_normal":
            level = torch.sigmoid(self.mean + self.std * torch.special.ndtri(level))
        factor = self._factor(tokens)
        return (factor * level / (1 + (factor - 1) * level)).clamp(self.min_sigma, self.max_sigma)

    def draw(self, keys: Sequence[str], seed: int, epoch: int | str, tokens: int) -> Float[Tensor, " n"]:
        """Sigma of each sample for one visit, float32: a function of (seed, epoch, key) alone.

        Args:
            keys: Names of the samples.
            seed: Of the run.
            epoch: Position of the visit.
            tokens: Tokens of each of the samples.
        """
        uniform = torch.stack([draws.uniform(seed, epoch, key) for key in keys])
        return self.quantile(uniform, tokens).float()

    def cdf(self, sigma: Float[Tensor, " n"], tokens: int) -> Float[Tensor, " n"]:
        """Share of the unrestricted law (without min and max sigma) at or below each sigma, float64."""
        factor = self._factor(tokens)
        if self.distribution == "stretched_logit_normal":
            return self._stretched_cdf(sigma.double(), factor)
        level = sigma.double() / (factor - (factor - 1) * sigma.double())  # inverse of the shift
        if self.distribution == "logit_normal":
            return torch.special.ndtr((torch.logit(level) - self.mean) / self.std)
        return level

    def _stretched_cdf(self, sigma: Float[Tensor, " n"], factor: float) -> Float[Tensor, " n"]:
        """The mixture's; at sigma 1 lies what the stretch leaves above it."""
        mirrored = 2 * _LEAST - sigma
        logit_normal = self._below(sigma, factor) - self._below(mirrored, factor)
        mixed = self.uniform_share * (sigma - _LEAST) / (1 - _LEAST) + (1 - self.uniform_share) * logit_normal
        return torch.where(sigma < _LEAST, 0.0, torch.where(sigma < 1, mixed, 1.0))

    def _below(self, level: Float[Tensor, " n"], factor: float) -> Float[Tensor, " n"]:
        """Share of the stretched law, before it is reflected, at or below each level up to 1.

        With odds `t / (1 - t) = factor * y`, which keeps precision where `t` and its points are all close to 1.
        """
        factor = factor * math.exp(self.mean)
        low, high = math.exp(self.std * _STRETCH_FROM), math.exp(self.std * _STRETCH_TO)
        odds = low * (1 + factor * high) + level * (high - low)
        odds = odds.clamp_min(0) / (1 + factor * (high - level * (high - low)))
        return torch.special.ndtr(odds.log() / self.std)

    def _bisected(self, level: Float[Tensor, " n"], tokens: int) -> Float[Tensor, " n"]:
        """The least sigma whose share reaches each level: the mixture has no quantile function in closed form."""
        low, high = torch.full_like(level, _LEAST), torch.ones_like(level)
        for _ in range(54):  # to the last bit of float64
            middle = (low + high) / 2
            short = self.cdf(middle, tokens) < level
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return high

    def _factor(self, tokens: int) -> float:
        return self.shift if isinstance(self.shift, int | float) else self.shift(tokens)
