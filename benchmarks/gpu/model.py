"""WAN at its real shapes with random weights, made on the device, and what trains it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.settings import Memory
from mpp.models.contract import Identity, Ready
from mpp.models.families.wan import Wan, WanConditioning
from mpp.training.module import MaskedPriorModule
from mpp.training.step import MaskedPriorStep, Position, StepOutput
from mpp.training.teacher import Teacher

PLAIN = MaskedPriorLoss()
PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
RANK = 16
SPREAD = 0.02  # of the random weights


@dataclass(frozen=True)
class Size:
    """Sizes of a WAN transformer, and the tokens of its text."""

    heads: int
    layers: int
    ffn: int
    head: int = 128
    text_width: int = 4096
    text_tokens: int = 512

    @property
    def settings(self) -> dict[str, int]:
        """What diffusers' class is called with."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head,
            "num_layers": self.layers,
            "ffn_dim": self.ffn,
            "text_dim": self.text_width,
        }


SIZES = {"1.3b": Size(12, 30, 8960), "14b": Size(40, 40, 13824)}
SHAPES = {"image": (1, 60, 104), "480p81": (21, 60, 104), "720p81": (21, 90, 160)}  # frames, height, width of latents
TINY = Size(4, 2, 128, head=32, text_width=64, text_tokens=16)
TINY_SHAPE = (1, 8, 8)


@dataclass(kw_only=True, eq=False)
class RandomWan(Wan):
    """A WAN whose weights are drawn instead of loaded.

    Args:
        size: Of the transformer.
        device: Where its weights are drawn.
    """

    pretrained: str = "random"
    size: Size = field(default=SIZES["1.3b"])
    device: str = "cuda"

    def load_transformer(self, ready: Ready | None = None) -> nn.Module:
        """Drawn block by block, so that of a quantised base never two copies are there."""
        transformer, random = self.skeleton(), torch.Generator(self.device).manual_seed(0)
        for name, block in self.blocks(transformer):
            _draw(block, name, self.device, random)
            if ready is not None:
                ready(name, block)
        _draw(transformer, "", self.device, random)
        return transformer.to(self.device).requires_grad_(False)

    def skeleton(self) -> nn.Module:
        """The same without weights."""
        with init_empty_weights():
            return WanTransformer3DModel(**self.size.settings)

    def identity(self, *, fetch: bool = False) -> Identity:
        """There are no files."""
        del fetch
        return Identity(None, None, None)


def _draw(module: nn.Module, prefix: str, device: str, random: torch.Generator) -> None:
    """Give what is on the meta device numbers: weights of norms are 1; precisions as diffusers loads them."""
    exact = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001 (as `from_pretrained` reads it)
    for owner, child in module.named_modules(prefix=prefix):
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                whole = any(part in f"{owner}.{name}".split(".") for part in exact)
                dtype = torch.float32 if whole else torch.bfloat16
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                norm = parameter.ndim == 1 and name == "weight"
                value = value.fill_(1) if norm else value.normal_(0, SPREAD, generator=random)
                setattr(child, name, nn.Parameter(value, requires_grad=False))


def batch(size: Size, shape: tuple[int, int, int], device: str, *, samples: int = 1, with_prior: int = 1) -> Batch:
    """Random latents and text on a device; half of the cells of the first `with_prior` samples are to be preserved."""
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(samples, 1, *shape)
    mask[:with_prior, ..., shape[-1] // 2 :] = 0
    text = torch.randn(samples, size.text_tokens, size.text_width, generator=random).bfloat16()
    latents = torch.randn(samples, 16, *shape, generator=random)
    keys = tuple(f"s{number}" for number in range(samples))
    return Batch(keys, latents, mask, WanConditioning(text), host_mask=mask).to(device)


def module(architecture: RandomWan, memory: Memory, *, compiled: bool = False) -> MaskedPriorModule:
    """What a run trains, with its transformer."""
    built = MaskedPriorModule(
        architecture=architecture,
        adapter=Adapter(rank=RANK, alpha=RANK),
        loss=PRIOR,
        teacher=Teacher(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        compile_blocks=compiled,
        memory=memory,
    )
    built.configure_model()
    return built


@dataclass(frozen=True)
class Trainee:
    """Steps of a module as a run in bf16-mixed has them, with losses of choice.

    Attributes:
        module: With its transformer.
        optimizer: Over its adapter.
    """

    module: MaskedPriorModule
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, built: MaskedPriorModule) -> "Trainee":
        """With AdamW."""
        return cls(built, built.configure_optimizers())

    def forward(self, data: Batch, loss: MaskedPriorLoss) -> tuple[Tensor, StepOutput]:
        """Loss and what the step came to."""
        step = replace(self.module.step, loss=loss)
        assert isinstance(step, MaskedPriorStep)
        with torch.autocast(data.latents.device.type, torch.bfloat16):
            output = step(data, Position(0, 0))
            return loss.terms(output.sums).total, output

    def learn(self, data: Batch, loss: MaskedPriorLoss) -> None:
        """Forward and backward."""
        self.forward(data, loss)[0].backward()

    def stepper(self, data: Batch, loss: MaskedPriorLoss) -> Callable[[], None]:
        """A whole step, the optimizer's included."""

        def run() -> None:
            self.learn(data, loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return run
