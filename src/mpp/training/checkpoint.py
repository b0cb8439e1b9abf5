"""Checkpoints on disk: written beside their target, synced and renamed; which of them a run can go on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mpp.files import write_atomically

CHECKPOINT_FORMAT = 1
_DONE, _BEGUN = ("processed", "completed"), ("ready", "started")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint format, but a checkpoint is either its old self or the complete new one.

    Lightning's own writer goes through the system's temporary folder, which across file systems is a copy, and does
    not sync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint atomically.

        Raises:
            OSError: The disk is full or not writable; the previous checkpoint is untouched.
        """
        del storage_options

        def write(temporary: Path) -> None:
            with temporary.open("wb") as handle:  # torch's own writer tells no full disk from a mistake
                torch.save(checkpoint, handle)

        write_atomically(Path(path), write)


def settled(loops: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's loop counters as they are between two steps, whenever in a step they were taken.

    A save at a batch's end finds the counters of batch and epoch half advanced, and Lightning 2.6 guesses from them
    where to go on: at an epoch's end it repeats the epoch, and leaves out a validation that was due. The place is known
    from the loader, so all else follows: the epoch is begun, so many of its batches are done, and where a validation is
    due after the last of them, it has not begun. Settling what is settled changes nothing.

    Args:
        loops: `checkpoint["loops"]`.
    """
    fit = dict(loops["fit_loop"])
    where = (fit["state_dict"].get("combined_loader") or [None])[0]
    if not isinstance(where, Mapping):  # batches by hand: no place to go on from
        return dict(loops)
    epoch, batch = where["epoch"], where["position"]
    seen = fit["epoch_loop.batch_progress"]["total"]["ready"]
    epochs = dict.fromkeys(_BEGUN, epoch + 1) | dict.fromkeys(_DONE, epoch)
    total, current = (dict.fromkeys((*_BEGUN, *_DONE), count) for count in (seen, batch))
    fit["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
    fit["epoch_loop.batch_progress"] = {**fit["epoch_loop.batch_progress"], "total": total, "current": current}
    begun = dict.fromkeys(_BEGUN, 1) | dict.fromkeys(_DONE, 0)  # what Lightning takes for a validation to run again
    validation = {"total": begun, "current": dict(begun), "is_last_batch": False}
    fit["epoch_loop.val_loop.batch_progress"] = validation
    return {**loops, "fit_loop": fit}


def validation_is_due(loops: Mapping[str, Any], trainer: Trainer) -> bool:
    """Whether a validation was to follow the step that a checkpoint was saved after.

    Args:
        loops: `checkpoint["loops"]`, settled.
        trainer: After it has looked at its data.
    """
    fit, every = loops["fit_loop"], trainer.val_check_batch
    where = (fit["state_dict"].get("combined_loader") or [None])[0]
    if every is None or not isinstance(where, Mapping):
        return False
    if trainer.check_val_every_n_epoch is None:
        return fit["epoch_loop.batch_progress"]["total"]["ready"] % every == 0
    return (where["epoch"] + 1) % trainer.check_val_every_n_epoch == 0 and where["position"] % every == 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running code from it.

    Raises:
        ValueError: It is not there, or not a checkpoint.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint at {path}; resume= takes the output folder of a run, or a .ckpt file in its "
            "folder checkpoints"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever the unpickler meets in a foreign or damaged file
        raise ValueError(f"{path} is no checkpoint, or damaged ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def check_checkpoint(checkpoint: Mapping[str, Any], *, base: str | None, seed: int) -> None:
    """Refuse a checkpoint that cannot be resumed here.

    Raises:
        ValueError: Not made by mpp, another format version, no adapter in it, another base model, or another seed.
    """
    record = checkpoint.get("mpp")
    if not isinstance(record, Mapping) or "state_dict" not in checkpoint:
        raise ValueError("that is not a checkpoint of mpp; give a .ckpt file from a run's checkpoints folder")
    if record.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"the checkpoint has format version {record.get('format')}, this mpp reads {CHECKPOINT_FORMAT}"
        )
    if not checkpoint["state_dict"]:
        raise ValueError("the checkpoint holds no adapter tensors, so there is nothing to resume; begin a run instead")
    if base is not None and record.get("base") not in (None, base):
        raise ValueError(
            f"the checkpoint was trained on another base model (weights {record['base']}) than model.pretrained "
            f"({base}); resume with the model it was made with"
        )
    if record.get("seed") != seed:
        raise ValueError(
            f"the checkpoint was made with seed={record.get('seed')}, this run has seed={seed}: samples would see "
            "other noise; resume with the same seed"
        )
