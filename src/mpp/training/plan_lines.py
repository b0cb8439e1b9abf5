"""A plan in lines for people."""

from collections.abc import Sequence

from mpp.memory.streaming import PASSING
from mpp.training.costs import Costs
from mpp.training.planning import CARDS, Choice, Plan, fits, transferred

_GIB = 2**30
TABLE = "peaks in GiB with all blocks on the GPU and with two at once, and how many cards of so many GiB hold:"


def parts(costs: Costs, decode: int | None = None) -> list[tuple[str, int, str]]:
    """What a run's peak is made of, in bytes: name, size, remark.

    Args:
        costs: As counted.
        decode: As `decoding` gives it.
    """
    work = costs.step - costs.saved
    vae = "the VAE, which is not counted" if decode is None else f"the VAE's decoding of it, {gib(decode)}"
    return [
        ("base", costs.base, "frozen weights"),
        ("adapter", costs.adapter, "float32"),
        ("optimizer", costs.optimizer, "its state"),
        ("saved activations", costs.saved, "of the forward pass, for the backward pass"),
        ("work of blocks", work, f"at the peak; gradients among it, {gib(costs.gradients)} when all are there"),
        ("peak", costs.peak, ""),
        ("teacher's pass", costs.teacher, "before the student's, in the same memory"),
        ("sampling", max(costs.teacher, decode or 0), f"a pass of this size likewise, then {vae}"),
    ]


def gib(size: float) -> str:
    """Bytes as people read them here."""
    return f"{size / _GIB:.2f} GiB" if size < _GIB / 10 else f"{size / _GIB:.1f} GiB"


def lines_of(choice: Choice, plan: Plan | None = None, decode: int | None = None) -> list[str]:
    """A choice in lines for people; with the least time of a step where a plan says what the machine does.

    Args:
        choice: What was counted.
        plan: What is known of the machine.
        decode: As `decoding` gives it.
    """
    costs = choice.costs
    lines = [f"  {name:<18} {gib(size):>10}  {remark}".rstrip() for name, size, remark in parts(costs, decode)]
    both = costs.plain + costs.prior
    if costs.waiting:
        brought = transferred(costs, choice.memory, prior=costs.prior > 0) / 1e9
        said = f"weights that wait; {brought:.3g} GB pass between CPU and GPU in a step"
        lines.append(f"  {'CPU memory':<18} {gib(costs.waiting):>10}  {said}")
    lines.append(
        f"  FLOPs of a step: {costs.plain / 1e12:,.3g} T without the teacher, {both / 1e12:,.3g} T with it "
        f"({both / costs.plain:.3f} times)"
    )
    for prior, words in ((False, "without the teacher"), (True, "with it")):
        least = plan.seconds(costs, choice.memory, prior=prior) if plan else None
        if least is not None:
            lines.append(f"  at least {least:.3g} s/step {words}")
    return lines


def table(found: Sequence[Choice]) -> list[str]:
    """Choices as lines: their peaks with all blocks on the device and with the fewest, and how many cards hold.

    Args:
        found: With all blocks there.
    """
    head = f"  {'base':<6}{'activations':<12}{'all':>7}{f'{PASSING} blocks':>10}  blocks on a card of"
    lines = [head + "".join(f"{card:>5}" for card in CARDS)]
    for choice in found:
        memory, least = choice.memory, choice.least
        peaks = f"{choice.costs.peak / _GIB:>7.1f}{f'{least.costs.peak / _GIB:.1f}' if least else '-':>10}"
        marks = "".join(f"{resident_on(choice, card):>5}" for card in CARDS)
        lines.append(f"  {memory.base:<6}{memory.activations:<12}{peaks}{'':>21}{marks}")
    return lines


def resident_on(choice: Choice, card: float) -> str:
    """How many blocks of a choice a card of so many GiB holds: `all`, a number, or `-` where it holds too few."""
    if fits(choice.costs, card):
        return "all"
    most = choice.most(card * _GIB) if choice.least else None
    return str(most.memory.resident) if most else "-"
