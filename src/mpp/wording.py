"""How lists read."""

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
