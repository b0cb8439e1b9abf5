"""Which files of earlier steps a run keeps."""

import re
from pathlib import Path

_STEP = re.compile(r"step-(\d{6,})(_\w+)?\.(safetensors|ckpt)")


def outdated(folder: Path, newest: int, most: int) -> list[Path]:
    """The files of steps in a folder that go when `most` steps are kept: all up to `newest` but its last ones.

    What a run did not name itself is not among them.

    Args:
        folder: Of `step-000500.safetensors`, files for other programs beside it, or `step-000500.ckpt`.
        newest: The step that was saved just now; files of later steps are another run's, and stay.
        most: Steps that are kept, >= 1.
    """
    found: dict[int, list[Path]] = {}
    for file in sorted(folder.glob("step-*")):
        named = _STEP.fullmatch(file.name)
        if named and int(named[1]) <= newest:
            found.setdefault(int(named[1]), []).append(file)
    return [file for step in sorted(found)[:-most] for file in found[step]]
