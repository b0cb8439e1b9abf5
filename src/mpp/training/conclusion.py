"""What a run has come to, in words and for scripts."""

from pathlib import Path
from typing import Any

from lightning import Trainer

from mpp.lora.export import program_of
from mpp.lora.writing import scale_is_said
from mpp.training.module import MaskedPriorModule
from mpp.training.pace import peak_memory
from mpp.training.progress import Progress, compared
from mpp.training.runs import newest
from mpp.wording import duration


def outcome(trainer: Trainer, module: MaskedPriorModule, folder: Path) -> dict[str, Any]:
    """A run's figures and files, whichever way it ended.

    Returns:
        Plain values: paths as texts, seconds of this start, and as `validation` the first and the last one.
    """
    progress = next((callback for callback in trainer.callbacks if isinstance(callback, Progress)), None)
    memory = peak_memory(module.device)
    return {
        "output_dir": str(folder),
        "finished": trainer.state.finished,
        "steps": trainer.global_step,
        "planned_steps": module.planned_steps,
        "samples_seen": module.samples_seen,
        "seconds": round(module.pace.seconds, 1),
        "peak_memory_gib": None if memory is None else round(memory, 2),
        "train": dict(module.point.values),
        "validation": {} if progress is None else {"first": progress.first, "last": progress.last},
        "loras": [
            {"file": str(file), "program": program_of(file), "average": _is_average(file)} for file in _loras(folder)
        ],
        "checkpoint": str(newest(folder)) if newest(folder).is_file() else None,
    }


def ending(found: dict[str, Any], folder: Path) -> list[str]:
    """What is said at the end of a run: how it went, which file is for whom, and how to go on."""
    measured, steps = found["validation"], found["steps"]
    lines = [f"finished: step {steps} after {duration(found['seconds'])}"]
    if measured.get("last"):
        lines.append(f"validation, first and last: {compared(measured['first'], measured['last'])}")
    for file in _loras(folder):
        what, program = "average of the LoRA" if _is_average(file) else "LoRA", program_of(file)
        what = f"best {what}" if "best" in file.stem.split("_") else what
        alone = program == "diffusers" and scale_is_said(file)
        lines.append(f"{what} for {program}{' alone, whose metadata others do not read' if alone else ''}: {file}")
    if found["checkpoint"]:
        more = found["planned_steps"] or steps
        lines.append(f"go on with: python -m mpp.train resume={folder} trainer.max_steps={2 * max(more, 1)}")
    return lines


def _loras(folder: Path) -> list[Path]:
    return sorted(folder.glob("lora*.safetensors"))  # with experts one each


def _is_average(file: Path) -> bool:
    return "ema" in file.stem.split("_")
