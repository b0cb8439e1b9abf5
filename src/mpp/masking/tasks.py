"""What a job has to do: inputs, their second inputs, and where each result goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpp.masking.sequences import FrameSequence, find_sequences, pair
from mpp.masking.tools import Tool


@dataclass(frozen=True)
class Task:
    """One result to write.

    Attributes:
        clip: Its input.
        other: Its second input, for tools that have one.
        target: The file, or the folder of frames.
        form: What is written there.
    """

    clip: FrameSequence
    other: FrameSequence | None
    target: Path
    form: Literal["png", "video", "frames"]

    @property
    def timing(self) -> FrameSequence:
        """The clip whose frames the result has."""
        return _timing(self.clip, self.other)


def task_for(root: str, clip: FrameSequence, other: FrameSequence | None, tool: Tool, video_format: str) -> Task:
    """The task for one input, with its result below `root`."""
    timing, base = _timing(clip, other), Path(root).expanduser() / clip.key
    if timing.frames or (timing.is_video and video_format == "frames"):
        return Task(clip, other, base, "frames")
    suffix, form = (tool.video_suffix, "video") if timing.is_video else (".png", "png")
    return Task(clip, other, base.with_name(base.name + suffix), form)


def find_pairs(
    tool: Tool, source: str | None, *, frame_folders: bool, masked: bool = True
) -> tuple[list[tuple[FrameSequence, FrameSequence | None]], tuple[Path, ...]]:
    """All inputs with their second inputs, and second inputs that nothing needs.

    Args:
        tool: The tool.
        source: Folder or file of inputs.
        frame_folders: Whether the images of one folder are the frames of one clip.
        masked: Whether images with a mask beside them count too.

    Raises:
        ValueError: There are no inputs, or no second inputs of their names.
    """
    images = tool.reads == "image"
    clips = find_sequences(
        source, "input", masks=not images, frame_folders=frame_folders, without=tool.masks, masked=masked or not images
    )
    if tool.masks is None:
        return [(clip, None) for clip in clips.values()], ()
    others = find_sequences(tool.masks, "tool.masks", masks=True)
    if Path(tool.masks).expanduser().is_file():
        return [(clip, other) for clip in clips.values() for other in others.values()], ()
    pairs = pair(clips, others)
    if not any(other for _, other in pairs):
        raise ValueError(
            f"nothing in tool.masks={tool.masks} has the name of anything in input={source}, such as "
            f"{next(iter(clips))}; files match by their path below the folder, without suffix"
        )
    used = {file for _, other in pairs if other for file in other.files}
    return pairs, tuple(other.path for other in others.values() if other.path not in used)


def check_outside(option: str, path: str, others: Mapping[str, str | None]) -> None:
    """Refuse a folder for results that lies in one of the others.

    Args:
        option: The setting's name.
        path: Its value.
        others: The folders by the names of their settings; None where they are not set.

    Raises:
        ValueError: As said.
    """
    for name, other in others.items():
        if other is None or _absolute(other).is_file():
            continue
        if _absolute(path).is_relative_to(_absolute(other)):
            raise ValueError(f"{option}={path} lies in {name}={other}; choose a folder outside of it")


def check_targets(tasks: Sequence[Task]) -> None:
    """Refuse results in the place of inputs, and two in one place.

    Raises:
        ValueError: As said.
    """
    read = [clip for task in tasks for clip in (task.clip, task.other) if clip is not None]
    inputs = {file.resolve() for clip in read for file in clip.files}
    folders = {task.target for task in tasks if task.form == "frames"}
    for task in tasks:
        if task.target.resolve() in inputs:
            raise ValueError(f"{task.target} is an input itself; choose another output")
        if task.target.parent in folders:
            raise ValueError(
                f"the results of {task.clip.path} and of a clip would both lie in "
                f"{task.target.parent}; rename one of them"
            )


def _timing(clip: FrameSequence, other: FrameSequence | None) -> FrameSequence:
    return other if other is not None and not clip.moving else clip


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()
