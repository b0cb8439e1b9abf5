"""What a user says of memory: each command has the settings that do something there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mpp.memory.activations import check_activations
from mpp.memory.bases import Base, check_base
from mpp.memory.streaming import PASSING

Resident = int | Literal["all", "auto"]
TeacherPass = Literal["apart", "lockstep", "auto"]
TextEncoder = Literal["bf16", "fp8", "int8", "nf4", "cpu"]
Vae = Literal["whole", "tiled"]


@dataclass(frozen=True)
class Memory:
    """How a run fits.

    Args:
        base: What the weights of the frozen base's blocks are kept in: `bf16`, as `model.dtype` has them; `fp8` or
            `int8`, 8 bits with a scale per output row; `nf4`, 4 bits by bitsandbytes; `gguf`, as a GGUF file has them.
            It computes in `model.dtype`, and adapters are float32, in all of them. Norms, embeddings, modulation and
            output layers are not quantised. Of a single file in fp8, `fp8` keeps the blocks' layers just as they are.
        activations: What training's backward pass needs of the forward pass: `keep` keeps all of it; `checkpoint`
            keeps the blocks' inputs and computes the rest again, for far less memory at about 1.4 times the time;
            `offload` does so and keeps the blocks' inputs in the CPU's memory. `auto`: on a GPU what fits, else
            `checkpoint`. Loss and gradients are the same.
        resident: How many of the transformer's blocks have their weights on the GPU at once, at least 2, or `all`; the
            others wait in the CPU's memory and come when they run, for which `activations` must not be `keep`. Of
            several experts it is those of the one in use. `auto`: on a GPU what fits, else `all`.
        teacher: When the teacher runs: `apart`, before the student; `lockstep`, each block just before the student's,
            so that a block that is not resident comes once for both. `auto`: `lockstep` where blocks are not resident.
        vae: How the VAE decodes samples: `whole`; `tiled`, what is larger than a tile in overlapping tiles that are
            blended: less memory, and slightly other values.
        card: GiB of the GPU that `auto` chooses for; None: what is free on the one that is there.

    Raises:
        ValueError: An unknown value, a base whose package is not installed, or blocks that are not resident with kept
            activations.
    """

    base: Base = "bf16"
    activations: Literal["keep", "checkpoint", "offload", "auto"] = "auto"
    resident: Resident = "auto"
    teacher: TeacherPass = "auto"
    vae: Vae = "whole"
    card: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_base(self.base, "memory.base")
        if self.activations != "auto":
            check_activations(self.activations, "memory.activations")
        _check_resident(self.resident, "memory.resident", "blocks", ("all", "auto"))
        if self.teacher not in get_args(TeacherPass):
            raise ValueError(f"memory.teacher must be one of {', '.join(get_args(TeacherPass))}, got {self.teacher!r}")
        if self.activations == "keep" and isinstance(self.resident, int):
            raise ValueError(
                f"memory.resident={self.resident} needs memory.activations=checkpoint or offload, which compute the "
                "blocks again: kept activations need all weights until the backward pass is done"
            )
        _check_vae(self.vae)
        if self.card is not None and not self.card > 0:
            raise ValueError(f"memory.card must be above 0 GiB, got {self.card}")

    @property
    def settled(self) -> "Memory":
        """The same with what nobody chose: `checkpoint`, `all`, and `apart` unless blocks are not resident."""
        resident = "all" if self.resident == "auto" else self.resident
        apart = "apart" if resident == "all" else "lockstep"
        return replace(
            self,
            activations="checkpoint" if self.activations == "auto" else self.activations,
            resident=resident,
            teacher=apart if self.teacher == "auto" else self.teacher,
        )

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes the blocks again."""
        return self.activations != "keep"

    @property
    def encoders(self) -> "EncoderMemory":
        """Of the VAE that decodes; training loads no text encoder."""
        return EncoderMemory(vae=self.vae)


def _check_resident(resident: Resident, setting: str, what: str, words: Sequence[str]) -> None:
    """Refuse what is neither a number of blocks or layers nor a word: ValueError."""
    if resident not in words and not (isinstance(resident, int) and resident >= PASSING):
        raise ValueError(
            f"{setting} must be {', '.join(words)} or a number of {what}, at least {PASSING} (one that runs and one "
            f"that comes), got {resident!r}"
        )


@dataclass(frozen=True)
class EncoderMemory:
    """How text encoders and VAE fit.

    Args:
        text_encoder: What the linear layers of the text encoders' repeated layers are kept in: `bf16`, as
            `model.text_dtype` has them; `fp8` or `int8`, 8 bits with a scale per output row; `nf4`, 4 bits by
            bitsandbytes. `cpu`: as `bf16`, and the text encoders run on the CPU, whatever else runs on `device`.
        text_layers: How many of a text encoder's repeated layers have their weights on the GPU at once, at least 2, or
            `all`; the others wait in the CPU's memory and come when they run. Embeddings are the same.
        vae: How the VAE encodes and decodes: `whole`; `tiled`, one sample at a time, and what is larger than a tile in
            overlapping tiles that are blended, as diffusers does it: less memory, and slightly other values.

    Raises:
        ValueError: An unknown value, one whose package is not installed, or layers that wait for a text encoder on the
            CPU.
    """

    text_encoder: TextEncoder = "bf16"
    text_layers: int | Literal["all"] = "all"
    vae: Vae = "whole"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.text_encoder != "cpu":
            check_base(self.text_encoder, "memory.text_encoder", get_args(TextEncoder))
        _check_resident(self.text_layers, "memory.text_layers", "layers", ("all",))
        if self.text_encoder == "cpu" and self.text_layers != "all":
            raise ValueError(
                f"memory.text_layers={self.text_layers} does nothing with memory.text_encoder=cpu, which has all "
                "layers in the CPU's memory; leave one of the two out"
            )
        _check_vae(self.vae)

    @property
    def text_weights(self) -> str:
        """What the text encoders' weights are kept in, wherever they run: what tells embeddings apart."""
        return "bf16" if self.text_encoder == "cpu" else self.text_encoder

    @property
    def encoders(self) -> "EncoderMemory":
        """Itself."""
        return self


@dataclass(frozen=True)
class GenerationMemory(EncoderMemory):
    """How generating fits.

    Args:
        base: What the weights of the base's blocks are kept in, as for training.
        resident: How many of the transformer's blocks have their weights on the GPU at once, at least 2, or `all`; the
            others wait in the CPU's memory and come when they run. Of several experts it is those of the one in use.

    Raises:
        ValueError: An unknown value, or one whose package is not installed.
    """

    base: Base = "bf16"
    resident: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        check_base(self.base, "memory.base")
        _check_resident(self.resident, "memory.resident", "blocks", ("all",))


def _check_vae(vae: str) -> None:
    if vae not in ("whole", "tiled"):
        raise ValueError(f"memory.vae must be whole or tiled, got {vae!r}")
