"""Where subjects are, as people or coarse masks say it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

_BOX = (2, 3)  # SAM's labels of a box's corners; points have 1 (of the subject) or 0 (not of it)


@dataclass(frozen=True)
class SegmentPrompt:
    """Where the subject is, in one image or in one frame of a clip.

    Attributes:
        boxes: Left, top, right, bottom of each subject, relative to the upright image, in [0, 1].
        points: x, y in [0, 1], and 1 for a point of the subject or 0 for one beside it. With a box they are of its
            subject, so there can be one box at most.
        frame: Number of the frame that is meant, from 0.
    """

    boxes: tuple[tuple[float, ...], ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    frame: int = 0

    def subjects(self, side: int) -> list[tuple[Tensor, Tensor]]:
        """Coordinates `(1, 1, n, 2)` in a square of `side` pixels and labels `(1, 1, n)`, for each subject."""
        points = [(x, y, label) for x, y, label in self.points]
        corners = [[(x0, y0, _BOX[0]), (x1, y1, _BOX[1])] for x0, y0, x1, y1 in self.boxes] or [[]]
        found = [torch.tensor(corner + points, dtype=torch.float32)[None, None] for corner in corners]
        return [(rows[..., :2] * side, rows[..., 2].to(torch.int32)) for rows in found]


def from_settings(
    boxes: Sequence[Sequence[float]], points: Sequence[Sequence[float]], where: str, frame: int = 0
) -> SegmentPrompt:
    """A prompt from plain lists.

    Args:
        boxes: As in `SegmentPrompt`.
        points: As in `SegmentPrompt`; without a third number they are of the subject.
        where: Name of the setting or file, for errors.
        frame: As in `SegmentPrompt`.

    Raises:
        ValueError: Numbers are missing or out of range, there is neither box nor point, or several boxes with points.
    """
    for box in boxes:
        if not (_numbers(box, 4) and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(
                f"{where}.boxes: a box is [left, top, right, bottom] relative to the image, each from 0 to 1 and "
                f"left below right, top below bottom; got {box!r}"
            )
    for point in points:
        if not ((_numbers(point, 2) or (_numbers(point, 3) and point[2] in (0, 1))) and max(point[:2]) <= 1):
            raise ValueError(
                f"{where}.points: a point is [x, y] relative to the image, each from 0 to 1, or [x, y, 0] for one "
                f"beside the subject; got {point!r}"
            )
    if not boxes and not any(len(point) == 2 or point[2] == 1 for point in points):
        raise ValueError(f"{where} has no box and no point of the subject; give boxes or points")
    if len(boxes) > 1 and points:
        raise ValueError(f"{where} has {len(boxes)} boxes and points; points go with one box at most")
    if not (type(frame) is int and frame >= 0):
        raise ValueError(f"{where}.frame must be a frame's number, from 0, got {frame!r}")
    full = tuple((*point, 1) if len(point) == 2 else tuple(point) for point in points)
    return SegmentPrompt(tuple(tuple(box) for box in boxes), full, frame)


def read_prompts(file: str, option: str) -> dict[str, SegmentPrompt]:
    """Prompts by key from a JSON file.

    Raises:
        ValueError: It is not there, no JSON, or says something else.
    """
    path = Path(file).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}={file} is no readable JSON file ({error})") from error
    if not (isinstance(content, dict) and content and all(isinstance(entry, dict) for entry in content.values())):
        raise ValueError(f'{option}={file} must hold {{"NAME": {{"boxes": [[0.1, 0.2, 0.6, 0.9]]}}, ...}}')
    found = {}
    for key, entry in content.items():
        where, unknown = f"{option}={file}: {key}", entry.keys() - {"boxes", "points", "frame"}
        if unknown:
            raise ValueError(f"{where}: {min(unknown)!r} is unknown; there are boxes, points and frame")
        boxes, points = entry.get("boxes", []), entry.get("points", [])
        if not (isinstance(boxes, list) and isinstance(points, list)):
            raise ValueError(f"{where}: boxes and points are lists, as in [[0.1, 0.2, 0.6, 0.9]]")
        found[key] = from_settings(boxes, points, where, entry.get("frame", 0))
    return found


def from_mask(values: np.ndarray, how: Literal["box", "centre"], frame: int = 0) -> SegmentPrompt | None:
    """Where a coarse mask has its subject: at least 0.5; None where it has none.

    Args:
        values: `(height, width)` in [0, 1].
        how: Its bounding `box`, or at its `centre` the point of it that is nearest to the mean of all of them.
        frame: The frame's number.
    """
    rows, columns = np.nonzero(values >= 0.5)
    if not len(rows):
        return None
    height, width = values.shape
    if how == "box":
        box = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
        return SegmentPrompt(boxes=(tuple(map(float, box)),), frame=frame)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    point = (columns[nearest] + 0.5) / width, (rows[nearest] + 0.5) / height, 1
    return SegmentPrompt(points=(tuple(map(float, point)),), frame=frame)


def _numbers(values: Any, count: int) -> bool:  # noqa: ANN401 (from a file)
    right = isinstance(values, list | tuple) and len(values) == count
    return right and all(type(value) in (int, float) and value >= 0 for value in values)
