"""Names and sums of everything logged. Sums and counts only, so ranks and uneven batches combine exactly."""

import torch
from torch import Tensor
from torchmetrics import Metric

from mpp.core.loss import EMPTY, LossSums, MaskedPriorLoss
from mpp.training.step import StepOutput

PROGRESS_BAR = ("loss", "target_loss", "prior_loss")


class LossMetrics(Metric):
    """The loss breakdown over all samples since the last reset, on all ranks.

    One vector of float64 sums, so a synchronisation is a single reduction: the six of `LossSums`, then sums of prior
    weights, squared distance to the base prediction and its energy, samples the teacher ran for, samples.

    Args:
        loss: Turns sums into terms.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, loss: MaskedPriorLoss) -> None:
        super().__init__()
        self.loss = loss
        self.add_state("sums", default=torch.zeros(11, dtype=torch.float64), dist_reduce_fx="sum")

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
        self.sums = self.sums + torch.cat([output.sums.stacked().detach().double(), more, counts])

    def compute(self) -> dict[str, float]:
        """Values by name without stage; `drift` only where a teacher ran."""
        vector = self.sums.cpu()
        terms = self.loss.terms(LossSums(*vector[:6]))
        prior_sum, distance, energy, taught, samples = vector[6:].tolist()
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
        return values

    @property
    def samples(self) -> int:
        """Samples on this rank since the last reset."""
        return int(self.sums[-1])


def names(stage: str, values: dict[str, float]) -> dict[str, float]:
    """Values under their logged names, `train/loss` and so on."""
    return {f"{stage}/{name}": value for name, value in values.items()}
