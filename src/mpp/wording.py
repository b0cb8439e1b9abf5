"""How lists and times read."""

from collections.abc import Sequence


def few(names: Sequence[object], most: int = 5, total: int | None = None) -> list[str]:
    """The first `most` of some names, and where there are others how many: `and 3 more`.

    Args:
        names: All of them, or at least the first `most`.
        most: How many are named.
        total: How many there are; None: as many as `names`.
    """
    left = (len(names) if total is None else total) - most
    return [*map(str, names[:most]), *([f"and {left} more"] if left > 0 else [])]


def duration(seconds: float) -> str:
    """A time in words: `2.7 s`, `42 s`, `3 min 20 s`, `45 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 1200:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
