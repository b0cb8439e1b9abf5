"""What a user says of memory."""

from dataclasses import dataclass

from mpp.memory.bases import Base, check_base


@dataclass(frozen=True)
class Memory:
    """How a run fits.

    Args:
        base: What the weights of the frozen base's blocks are kept in: `bf16`, as `model.dtype` has them; `fp8` or
            `int8`, 8 bits with a scale per output row; `nf4`, 4 bits by bitsandbytes. It computes in `model.dtype`, and
            adapters are float32, in all of them. Norms, embeddings, modulation and output layers are not quantised.

    Raises:
        ValueError: An unknown base, or one whose package is not installed.
    """

    base: Base = "bf16"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_base(self.base, "memory.base")
