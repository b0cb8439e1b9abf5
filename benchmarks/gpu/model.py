"""Models at their real shapes with random weights, made on the device, and what trains them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.settings import Memory
from mpp.memory.streaming import Streaming
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Identity, Ready
from mpp.models.families.qwen_image import QwenImage, QwenImageConditioning
from mpp.models.families.wan import Wan, WanConditioning
from mpp.models.filling import in_precision
from mpp.training.module import MaskedPriorModule
from mpp.training.passes import passes_of
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

    def conditioning(self, text: Tensor) -> Conditioning:
        """Of a batch's text."""
        return WanConditioning(text)

    def family(self, device: str, *, waits: bool = False) -> "Drawn":
        """The model, whose blocks may wait in the CPU's memory."""
        return RandomWan(size=self, device=device, waits=waits, text_length=self.text_tokens)


@dataclass(frozen=True)
class QwenSize(Size):
    """Sizes of Qwen-Image, whose feed-forward layers have none of their own."""

    ffn: int = 0

    @property
    def settings(self) -> dict[str, object]:
        """What diffusers' class is called with."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head,
            "num_layers": self.layers,
            "joint_attention_dim": self.text_width,
            "axes_dims_rope": (self.head // 8, self.head * 7 // 16, self.head * 7 // 16),
        }

    def conditioning(self, text: Tensor) -> Conditioning:
        """Of a batch's text."""
        return QwenImageConditioning(text, torch.ones(text.shape[:2], dtype=torch.bool))

    def family(self, device: str, *, waits: bool = False) -> "Drawn":
        """The model, whose blocks may wait in the CPU's memory."""
        return RandomQwen(size=self, device=device, waits=waits, text_length=self.text_tokens)


SIZES = {
    "1.3b": Size(12, 30, 8960),
    "14b": Size(40, 40, 13824),
    "qwen": QwenSize(24, 60, text_width=3584, text_tokens=1024),
}
SHAPES = {  # frames, height, width of latents
    "image": (1, 60, 104),
    "480p49": (13, 60, 104),
    "480p81": (21, 60, 104),
    "720p81": (21, 90, 160),
    "1024": (1, 128, 128),
}
TINY = Size(4, 2, 128, head=32, text_width=64, text_tokens=16)
TINY_QWEN = QwenSize(2, 2, head=32, text_width=64, text_tokens=16)
TINY_SHAPE = (1, 8, 8)


@dataclass(kw_only=True, eq=False)
class Drawn:
    """A family whose weights are drawn instead of loaded.

    Args:
        size: Of the transformer.
        device: Where its weights are drawn.
        waits: They go to the CPU's memory then.
    """

    pretrained: str = "random"
    size: Size = field(default=SIZES["1.3b"])
    device: str = "cuda"
    waits: bool = False

    def load_transformer(self, ready: Ready | None = None) -> nn.Module:
        """Drawn block by block, so that of a quantised base never two copies are there."""
        transformer, random = self.skeleton(), torch.Generator(self.device).manual_seed(0)
        for name, block in self.blocks(transformer):
            _draw(block, self.device, random)
            if ready is not None:
                ready(name, block)
            if self.waits:
                block.to("cpu")
        _draw(transformer, self.device, random)
        return transformer.to("cpu" if self.waits else self.device).requires_grad_(False)

    def skeleton(self, *, published: bool = False) -> nn.Module:
        """The same without weights, in the precisions that diffusers loads."""
        del published
        with init_empty_weights():
            transformer = self.transformer_class(**self.size.settings)
        return in_precision(transformer, torch.bfloat16)

    def identity(self, *, fetch: bool = False) -> Identity:
        """There are no files."""
        del fetch
        return Identity(None, None, None)


@dataclass(kw_only=True, eq=False)
class RandomWan(Drawn, Wan):
    """WAN."""


@dataclass(kw_only=True, eq=False)
class RandomQwen(Drawn, QwenImage):
    """Qwen-Image."""


def _draw(module: nn.Module, device: str, random: torch.Generator) -> None:
    """Give what is on the meta device numbers: weights of norms are 1."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, device=device, dtype=parameter.dtype)
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
    return Batch(keys, latents, mask, size.conditioning(text), host_mask=mask).to(device)


def module(architecture: Drawn, memory: Memory, *, compiled: bool = False) -> MaskedPriorModule:
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
    return built.to(architecture.device)


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

    @property
    def streaming(self) -> Streaming:
        """What brings its blocks."""
        hooks = [hook for part in self.module.modules() for hook in part._forward_pre_hooks.values()]  # noqa: SLF001
        return next(hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Streaming))

    def with_teacher(self, teacher: str) -> "Trainee":
        """The same, with the teacher as `memory.teacher` says."""
        built = self.module
        memory = replace(built.memory, teacher=teacher)
        passes = passes_of(built.architecture, built.transformer, built.teacher, memory)
        built.step = replace(built.step, passes=passes)
        return self

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
