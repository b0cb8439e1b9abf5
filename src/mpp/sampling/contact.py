"""The contact sheet of a run: what each prompt came to over the steps, on one image."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from mpp.files import write_atomically
from mpp.media.lettering import below_each_other, font_size, headed, panels
from mpp.sampling.generation import BASE, LORA, generation_name
from mpp.sampling.prompts import ReadyPrompt

NAME = "contact.png"
_STEPS, _PROMPTS = 12, 24  # at most
_SIDES = 96, 256  # of the longer side of an image
_PIXELS = 6e6  # of all images together, as far as the sides let it
_ABSENT = (225, 226, 221)  # where nothing was generated
_STEP = re.compile(r"step-(\d+)")


def write_contact(folder: Path, prompts: Sequence[ReadyPrompt]) -> Path | None:
    """Write `contact.png`: a row for each prompt, a column for the base and for each step, evenly chosen.

    The first and the newest step are always there. Of clips the middle frame is shown.

    Args:
        folder: `samples` of a run.
        prompts: What is generated.

    Returns:
        The file; None where nothing is generated yet.

    Raises:
        OSError: An image cannot be read, or the file not written; an older one is untouched.
    """
    names = [generation_name(number, ready.prompt) for number, ready in enumerate(prompts)][:_PROMPTS]
    steps = _chosen([step for step in steps_of(folder) if any(_still(folder, step, name, LORA) for name in names)])
    if not steps:
        return None
    side = int(min(_SIDES[1], max(_SIDES[0], math.sqrt(_PIXELS / (len(names) * (len(steps) + 1))))))
    rows = [_row(folder, steps, name, ready, side) for name, ready in zip(names, prompts, strict=False)]
    sheet = below_each_other(rows, font_size(side), font_size(side))
    if len(prompts) > len(names):
        sheet = headed(f"the first {len(names)} of {len(prompts)} prompts", sheet, font_size(side))
    path = folder / NAME
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
    return path


def _row(folder: Path, steps: Sequence[int], name: str, ready: ReadyPrompt, side: int) -> Image.Image:
    """One prompt: the base and the LoRA of each step."""
    bases = [found for step in reversed(steps) if (found := _still(folder, step, name, BASE))]
    files = [bases[0] if bases else None, *(_still(folder, step, name, LORA) for step in steps)]
    shape = ready.generation.width, ready.generation.height
    size = tuple(max(1, round(side * length / max(shape))) for length in shape)
    labels = ["base", *(f"step {step}" for step in steps)]
    row = panels([(label, _small(file, size)) for label, file in zip(labels, files, strict=True)], font_size(side))
    return headed(f"seed {ready.generation.seed}: {ready.prompt}", row, font_size(side))


def _small(file: Path | None, size: tuple[int, int]) -> Image.Image:
    """A file's image as large as it fits into a size; nothing where there is none."""
    if file is None:
        return Image.new("RGB", size, _ABSENT)
    with Image.open(file) as image:
        return ImageOps.pad(image.convert("RGB"), size, Image.Resampling.LANCZOS, color=_ABSENT)


def _still(folder: Path, step: int, name: str, part: str) -> Path | None:
    path = step_folder(folder, step) / f"{name}{part}.png"
    return path if path.is_file() else None


def step_folder(folder: Path, step: int) -> Path:
    """Where the samples of a step lie."""
    return folder / f"step-{step:06d}"


def steps_of(folder: Path) -> list[int]:
    """Steps of which there are samples, ascending."""
    return sorted(int(match[1]) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name)))


def _chosen(steps: Sequence[int]) -> list[int]:
    """At most so many, evenly spread, the first and the last included."""
    count = min(len(steps), _STEPS)
    return [steps[round(number * (len(steps) - 1) / max(1, count - 1))] for number in range(count)]
