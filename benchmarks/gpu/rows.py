"""Which rows there are, and which of them still fit the time."""

from collections.abc import Sequence
from dataclasses import dataclass

BASES = ("bf16", "fp8", "int8", "nf4")


@dataclass(frozen=True)
class Row:
    """One measurement, made by a process of its own.

    Attributes:
        name: Unique.
        kind: What is measured: a function of `benchmarks.gpu.child.KINDS`.
        seconds: After which it is stopped, and without which it is not begun.
        size: Of the model, a key of `model.SIZES`.
        shape: Of the latents, a key of `model.SHAPES`.
        base: What the frozen weights are held in.
        activations: As `memory.activations`.
        rounds: Of what is timed by turns.
        resident: Blocks whose weights are on the device at once; None: all.
        card: GiB of the card that it is to fit; 0: whatever is there.
        cuda: Whether it means nothing without a GPU, at whatever size.
        asked: Whether it is measured only where it is named.
    """

    name: str
    kind: str
    seconds: int
    size: str = "1.3b"
    shape: str = "image"
    base: str = "bf16"
    activations: str = "checkpoint"
    rounds: int = 9
    resident: int | None = None
    card: float = 0
    cuda: bool = False
    asked: bool = False


def _memory(size: str, shape: str, seconds: int, bases: Sequence[str] = BASES) -> list[Row]:
    return [Row(f"memory_{size}_{shape}_{b}", "memory", seconds, size, shape, b, cuda=True) for b in bases]


def _streams(shape: str, seconds: int, usual: Sequence[tuple[str, int]]) -> list[Row]:
    """WAN 14B with so many resident blocks of each base; those that are usual, and the rest where it is asked for."""
    every = [(base, resident) for base in ("fp8", "bf16", "nf4") for resident in (40, 20, 8, 2)]
    return [
        Row(
            f"stream_14b_{shape}_{base}_{resident}", "stream", seconds, "14b", shape, base,
            resident=resident, asked=(base, resident) not in usual,
        )
        for base, resident in every
    ]  # fmt: skip


def _fits(size: str, shape: str, card: float, activations: str, resident: int) -> Row:
    """A choice that fits a card as it is counted, with 1 GiB left over."""
    name = f"fits_{size}_{shape}_{card:g}gib"
    return Row(name, "fits", 300, size, shape, "fp8", activations, resident=resident, card=card)


ROWS = (
    Row("environment", "environment", 90),
    Row("correct", "correct", 120),
    *(Row(f"gradients_{base}", "gradients", 90, base=base) for base in BASES[1:]),
    Row("syncs", "syncs", 90, cuda=True),
    Row("time_1.3b_image", "time", 150),
    Row("time_14b_image", "time", 240, "14b"),
    Row("train_1.3b", "train", 240),
    Row("time_1.3b_480p81", "time", 300, shape="480p81", rounds=5),
    *_memory("1.3b", "480p81", 120),
    *_memory("14b", "image", 120),
    *_memory("14b", "480p81", 240),
    Row("memory_14b_480p81_fp8_offload", "memory", 240, "14b", "480p81", "fp8", "offload", cuda=True),
    _fits("qwen", "1024", 12, "checkpoint", 16),
    _fits("14b", "480p49", 16, "offload", 8),
    _fits("14b", "480p81", 24, "offload", 16),
    *_streams("image", 180, [("fp8", 2), ("bf16", 8)]),
    *_streams("480p81", 300, [("fp8", 8), ("nf4", 2)]),
    Row("compile_1.3b_image", "compile", 300, cuda=True),
    *_memory("1.3b", "720p81", 150, ("bf16",)),
    *_memory("14b", "720p81", 400, ("fp8",)),
)


def chosen(words: Sequence[str]) -> list[Row]:
    """The rows of these names or kinds, or the usual; the environment's always, which says where they were measured.

    Raises:
        ValueError: A word that is neither.
    """
    known = {row.name for row in ROWS} | {row.kind for row in ROWS}
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"--only={unknown[0]}: there is no such row; there are {', '.join(row.name for row in ROWS)}")
    wanted = {"environment", *words}
    return [row for row in ROWS if row.name in wanted or row.kind in wanted or not (words or row.asked)]


def obstacle(row: Row, left: float, *, cuda: bool, tiny: bool) -> str | None:
    """Why a row is not begun, or None.

    Args:
        row: Which.
        left: Seconds until the time is up.
        cuda: Whether there is a GPU.
        tiny: Whether models and latents are tiny.
    """
    if not cuda and row.kind != "environment" and (row.cuda or not tiny):
        return "needs CUDA"
    if left < row.seconds:
        return f"skipped: may take {row.seconds} s, {max(0, round(left))} s are left"
    return None
