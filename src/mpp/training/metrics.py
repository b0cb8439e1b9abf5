"""Names and sums of everything logged. Sums and counts only, so ranks and uneven batches combine exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torchmetrics import Metric

from mpp.core.loss import EMPTY, LossSums, MaskedPriorLoss
from mpp.training.step import StepOutput

PROGRESS_BAR = ("train/loss", "train/target_loss", "train/prior_loss", "train/drift", "train/lr")
BANDS = 4  # of equal width in [0, 1], by which losses are told apart: what is learned differs with the noise
_SUMS = 11  # over all bands


@dataclass(frozen=True)
class Point:
    """One point of a run's logs.

    Attributes:
        step: Optimizer steps behind it.
        values: By their logged names, over the steps since the point before.
    """

    step: int = 0
    values: Mapping[str, float] = field(default_factory=dict)


class LossMetrics(Metric):
    """The loss breakdown over all samples since the last reset, on all ranks.

    One vector of float64 sums, so a synchronisation is a single reduction: the six of `LossSums`, then sums of prior
    weights, squared distance to the base prediction and its energy, samples the teacher ran for, samples; then for each
    band of sigma the six of its samples.

    Args:
        loss: Turns sums into terms.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, loss: MaskedPriorLoss) -> None:
        super().__init__()
        self.loss = loss
        sums = torch.zeros(_SUMS + BANDS * len(fields(LossSums)), dtype=torch.float64)
        self.add_state("sums", default=sums, dist_reduce_fx="sum")

    def update(self, output: StepOutput) -> None:
        """Add one batch."""
        pred, prior, kept = output.pred, output.prior, output.kept
        distance = energy = pred.new_zeros((), dtype=torch.float64)
        if prior is not None:
            base = prior.float()
            distance = (((pred.detach().float() - base) ** 2).sum(1, keepdim=True) * kept).sum().double()
            energy = ((base**2).sum(1, keepdim=True) * kept).sum().double()
        counts = torch.tensor([output.taught, len(pred)], dtype=torch.float64).to(self.sums.device, non_blocking=True)
        more = torch.stack([kept.sum().double(), distance, energy])
        whole = output.sums.stacked().detach().double()
        self.sums = self.sums + torch.cat([whole, more, counts, self._by_band(output).flatten()])

    @torch.no_grad()
    def _by_band(self, output: StepOutput) -> Tensor:
        """The six sums of each band's samples, `(BANDS, 6)`; the device is not asked which band a sample is in."""
        band = (output.sigma.double() * BANDS).long().clamp(max=BANDS - 1)
        sums = torch.stack([part.stacked().double() for part in output.by_sample(self.loss)])
        return (band == torch.arange(BANDS, device=band.device)[:, None]).double() @ sums

    def compute(self) -> dict[str, float]:
        """Values by name without stage; `drift` only where a teacher ran, and of bands those that had samples.

        A band's are `sigma_0.25-0.50/target_loss` and, where there is a prior, `sigma_0.25-0.50/prior_loss`: the terms
        of its samples alone.
        """
        vector = self.sums.cpu()
        terms = self.loss.terms(LossSums(*vector[:6]))
        prior_sum, distance, energy, taught, samples = vector[6:_SUMS].tolist()
        cells = max(float(vector[5]), 1.0)
        values = {
            "loss": float(terms.total),
            "target_loss": float(terms.target),
            "prior_loss": float(terms.prior),
            "mask_mean": float(vector[4]) / cells,
            "prior_mask_mean": prior_sum / cells,
            "teacher_fraction": taught / max(samples, 1.0),
        }
        if energy > EMPTY:
            values["drift"] = distance / energy
        for number, sums in enumerate(vector[_SUMS:].view(BANDS, -1)):
            values |= self._band(number, LossSums(*sums))
        return values

    def _band(self, number: int, sums: LossSums) -> dict[str, float]:
        if not sums.cells:
            return {}
        name, terms = f"sigma_{number / BANDS:.2f}-{(number + 1) / BANDS:.2f}", self.loss.terms(sums)
        prior = {f"{name}/prior_loss": float(terms.prior)} if self.loss.prior_weight > 0 else {}
        return {f"{name}/target_loss": float(terms.target)} | prior

    @property
    def samples(self) -> int:
        """Samples on this rank since the last reset."""
        return int(self.sums[_SUMS - 1])


def names(stage: str, values: dict[str, float]) -> dict[str, float]:
    """Values under their logged names, `train/loss` and so on; those of bands are `train_sigma_0.25-0.50/loss`."""
    return {f"{stage}{'_' if '/' in name else '/'}{name}": value for name, value in values.items()}
