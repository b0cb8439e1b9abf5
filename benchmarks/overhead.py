"""What mpp's training adds in time to a loop that one would write by hand, with the same teacher.

Both train the same small WAN, by turns in one process: a step of the Trainer with mpp's module from the end of the one
before, then two of a loop on diffusers, PEFT and torch. CPU time of the process is compared, as others may share the
machine; the two bare steps against each other say how far it can be trusted.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from lightning import Callback, Trainer
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter, adapters_off
from mpp.memory.settings import Memory
from mpp.models.families.wan import Wan, WanConditioning
from mpp.models.tiny import TRANSFORMER
from mpp.training.module import MaskedPriorModule
from mpp.training.teacher import Teacher

SIZE = {**TRANSFORMER, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4}
CELLS = (1, 32, 32)  # of the latents: frames, height, width
ROUNDS = 11
WARM = 2  # rounds that are not counted
SURE = 0.03  # how far equal steps may differ in their median
RANK = 16


@dataclass(frozen=True)
class Overhead:
    """Seconds of CPU time of equal steps, by rounds.

    Attributes:
        checkpointing: Whether activations are recomputed.
        own: Of mpp in the Trainer.
        bare: Of the bare loop.
        again: Of the bare loop a second time: the control.
    """

    checkpointing: bool
    own: Sequence[float]
    bare: Sequence[float]
    again: Sequence[float]

    @property
    def control(self) -> float:
        """Median ratio of what should be equal."""
        return statistics.median(b / a for a, b in zip(self.bare, self.again, strict=True))

    @property
    def ratios(self) -> list[float]:
        """Of mpp over the mean of both bare steps of a round."""
        return [2 * own / (a + b) for own, a, b in zip(self.own, self.bare, self.again, strict=True)]

    @property
    def added(self) -> float:
        """Median seconds that mpp takes longer."""
        return statistics.median(own - (a + b) / 2 for own, a, b in zip(self.own, self.bare, self.again, strict=True))

    @property
    def verdict(self) -> str:
        """`measured`, or `inconclusive` where equal steps are not equally long."""
        return "measured" if abs(self.control - 1) <= SURE else "inconclusive"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checkpointing": self.checkpointing,
            "rounds": len(self.own),
            "ratio": statistics.median(self.ratios),
            "ratio_range": [min(self.ratios), max(self.ratios)],
            "added_seconds": self.added,
            "bare_seconds": statistics.median([*self.bare, *self.again]),
            "control": self.control,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        """One line."""
        ratios = self.ratios
        return (
            f"overhead, checkpointing {'on' if self.checkpointing else 'off'}: mpp / bare loop "
            f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}], +{1000 * self.added:.1f} ms on "
            f"{1000 * statistics.median([*self.bare, *self.again]):.0f} ms; control {self.control:.3f}: {self.verdict}"
        )


class Bare:
    """A step with a prior as one writes it on diffusers, PEFT and torch.

    Args:
        folder: Of the transformer.
        data: One batch, which every step trains on.
        checkpointing: Recompute activations.
    """

    def __init__(self, folder: Path, data: Batch, *, checkpointing: bool) -> None:
        self.model = WanTransformer3DModel.from_pretrained(folder).requires_grad_(False)
        targets = list(Wan.lora_targets)
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self.data = data
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> None:
        """One step."""
        latents, mask = self.data.latents, self.data.mask
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
        shift = sigma.view(-1, 1, 1, 1, 1)
        noisy, target = (1 - shift) * latents + shift * noise, noise - latents
        # PEFT's own switch takes several times as long as this one, which would flatter the comparison.
        with torch.no_grad(), adapters_off(self.model):
            prior = self._predict(noisy, sigma)
        pred = self._predict(noisy, sigma)
        keep = (mask < 0.1).float()
        learn = mask * (1 - keep)
        loss = ((pred - target) ** 2 * learn).sum() / learn.expand_as(pred).sum()
        loss = loss + ((pred - prior) ** 2 * keep).sum() / keep.expand_as(pred).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _predict(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return self.model(noisy, 1000 * sigma, self.data.conditioning.text, return_dict=False)[0]


class Turns(Callback):
    """After each step of the Trainer, two bare ones; the order of the two changes from round to round.

    Args:
        bare: The bare step.
        clock: Seconds.
    """

    def __init__(self, bare: Callable[[], None], clock: Callable[[], float] = time.process_time) -> None:
        self.bare, self.clock = bare, clock
        self.rounds: list[tuple[float, float, float]] = []
        self._since = 0.0

    def on_train_start(self, *_: object) -> None:
        """The clock of the first step."""
        self._since = self.clock()

    def on_train_batch_end(self, *_: object) -> None:
        """One round is complete."""
        own = self.clock() - self._since
        pair = [self._timed(), self._timed()]
        self.rounds.append((own, *(pair[::-1] if len(self.rounds) % 2 else pair)))
        self._since = self.clock()

    def _timed(self) -> float:
        start = self.clock()
        self.bare()
        return self.clock() - start


def example() -> Batch:
    """A batch of one, half of it to be preserved."""
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(1, 1, *CELLS)
    mask[..., CELLS[-1] // 2 :] = 0
    latents, text = torch.randn(1, 16, *CELLS, generator=random), torch.randn(1, 64, 32, generator=random)
    return Batch(("a",), latents, mask, WanConditioning(text), host_mask=mask)


def module_of(folder: Path, *, checkpointing: bool) -> MaskedPriorModule:
    """What mpp trains: the same model, adapter and batch."""
    return MaskedPriorModule(
        architecture=Wan(pretrained=str(folder), dtype="float32", text_length=64),
        adapter=Adapter(rank=RANK, alpha=RANK),
        loss=MaskedPriorLoss(1.0, 0.1),
        teacher=Teacher(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        memory=Memory(activations="checkpoint" if checkpointing else "keep"),
    )


def measure(rounds: int = ROUNDS) -> Iterator[Overhead]:
    """Without and with checkpointing.

    Args:
        rounds: That count.
    """
    data = example()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        WanTransformer3DModel(**SIZE).save_pretrained(Path(folder) / "transformer")
        for checkpointing in (False, True):
            turns = Turns(Bare(Path(folder) / "transformer", data, checkpointing=checkpointing))
            trainer = Trainer(
                accelerator="cpu",
                max_steps=rounds + WARM,
                callbacks=[turns],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            batches = DataLoader([data] * (rounds + WARM), batch_size=None, collate_fn=lambda batch: batch)
            trainer.fit(module_of(Path(folder), checkpointing=checkpointing), batches)
            yield Overhead(checkpointing, *zip(*turns.rounds[WARM:], strict=True))
