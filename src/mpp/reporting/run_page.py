"""The page of a run: its losses, what its prompts came to over the steps, its regions and settings."""

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from mpp import __version__
from mpp.reporting.inline import Lines, filled
from mpp.sampling.contact import step_folder, steps_of
from mpp.sampling.generation import BASE, LORA, generation_name
from mpp.training.history import Course
from mpp.training.metrics import Point
from mpp.wording import duration

_STYLES, _SCRIPTS = ("page.css", "run.css"), ("elements.js", "run.js")
_POINTS = 1000  # shown at most, evenly spread
_STEPS, _PROMPTS = 10, 16  # of samples
_PIXELS, _SIDES = 24e6, (160, 640)  # of all samples; of the longer side of each
_REGIONS = 1600


def render_run(course: Course) -> str:
    """The page."""
    images = Lines()
    regions = course.folder / "regions.png"
    data = {
        "name": course.folder.resolve().name,
        "folder": str(course.folder),
        "status": course.status,
        "step": course.step,
        "total": course.total,
        "time": duration(course.seconds),
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "points": _plain(spread(course.points, _POINTS)),
        "validations": _plain(spread(course.validations, _POINTS)),
        "samples": _samples(course, images),
        "regions": _image(regions, images, _REGIONS),
        "settings": list(flat(course.settings).items()),
        "facts": list(course.facts.items()),
        "command": shlex.join(["python", "-m", "mpp.train", f"resume={course.folder}"]),
    }
    return filled("run.html", _STYLES, _SCRIPTS, data, images=images)


def spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of some rows, evenly spread, the first and the last with them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(number * (len(rows) - 1) / (most - 1))] for number in range(most)]


def _plain(points: Sequence[Point]) -> list[tuple[int, dict[str, float | None]]]:
    return [(p.step, {n: v if math.isfinite(v) else None for n, v in p.values.items()}) for p in points]


def _samples(course: Course, images: Lines) -> list[dict[str, Any]]:
    """For each prompt its base and the LoRA of each step."""
    folder, prompts = course.folder / "samples", list(enumerate(course.prompts))[:_PROMPTS]
    steps = spread(steps_of(folder), _STEPS)
    side = int(min(_SIDES[1], max(_SIDES[0], math.sqrt(_PIXELS / max(1, len(prompts) * (len(steps) + 1))))))
    found = []
    for number, ready in prompts:
        name, folders = generation_name(number, ready.prompt), {step: step_folder(folder, step) for step in steps}
        loras = [(step, _image(own / f"{name}{LORA}.png", images, side)) for step, own in folders.items()]
        loras = [(step, image) for step, image in loras if image is not None]
        bases = (own / f"{name}{BASE}.png" for own in reversed(folders.values()))
        base = next((path for path in bases if path.is_file()), None)
        row = {"prompt": ready.prompt, "seed": ready.generation.seed, "steps": loras}
        row["size"] = ready.generation.width, ready.generation.height
        row["base"] = None if base is None else _image(base, images, side)
        found += [row] if loras else []
    return found


def _image(path: Path, images: Lines, side: int) -> int | None:
    """Embed an image; None where there is none that can be read."""
    try:
        with Image.open(path) as image:
            return images.put_image(image, side)
    except (OSError, ValueError, SyntaxError):
        return None


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Settings by their full names, as they are typed."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        key = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return found
