"""Runs on disk: which checkpoint a run goes on from, and where a run may write without overwriting another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def asked_checkpoint(resume: str | None, ckpt_path: str | None, folder: Path) -> Path | None:
    """The checkpoint that a start asks to go on from; None: it begins a run.

    Args:
        resume: A run's folder, whose newest checkpoint is meant, or one of its checkpoints.
        ckpt_path: The older word for it: a checkpoint, or `last` for the newest in `folder`.
        folder: The output folder.

    Raises:
        ValueError: Both are given.
    """
    if resume is not None and ckpt_path is not None:
        raise ValueError(f"resume={resume} and ckpt_path={ckpt_path} say the same thing; leave out ckpt_path")
    if resume is None and ckpt_path is not None:
        resume = str(folder) if ckpt_path == "last" else ckpt_path
    if resume is None:
        return None
    path = Path(resume).expanduser()
    return path if path.suffix == ".ckpt" else newest(path)


def newest(folder: Path) -> Path:
    """A run's newest checkpoint, whether it is there or not."""
    return folder / "checkpoints" / "last.ckpt"


def folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None where it lies anywhere else."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def begun(folder: Path) -> None:
    """Refuse to begin a run in a folder that holds one.

    Raises:
        ValueError: As above.
    """
    if newest(folder).exists():
        raise ValueError(
            f"output_dir={folder} holds a run already; go on with resume={folder}, or choose another output_dir"
        )


def resumed(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Read the checkpoint that a run goes on from.

    Args:
        checkpoint: It.
        folder: Where the run will write.

    Raises:
        ValueError: It is not there or damaged, or what a run has done since, or another run, would be overwritten.
    """
    from mpp.training.checkpoint import read_checkpoint  # which brings torch and Lightning

    content = read_checkpoint(checkpoint)
    last = newest(folder)
    if not last.exists() or last.samefile(checkpoint):
        return content
    own = folder_of(checkpoint.resolve())
    if own is None or not own.samefile(folder):
        raise ValueError(
            f"output_dir={folder} holds another run, not that of {checkpoint}, which would be overwritten; choose "
            "another output_dir"
        )
    here, there = _step(content), _step(read_checkpoint(last))
    if here < there:
        raise ValueError(
            f"{checkpoint} is of step {here}, and the run in {folder} has come to step {there}, which would be "
            f"overwritten; go on with resume={folder}, or set another output_dir to go on from there"
        )
    return content


def _step(content: Mapping[str, Any]) -> int:
    return int(content.get("global_step", 0))
