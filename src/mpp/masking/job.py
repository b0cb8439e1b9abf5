"""One tool over whole folders: what is there already stays, what fails is named, the rest is done."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mpp import __version__
from mpp.files import check_writable
from mpp.masking.alpha import Preview
from mpp.masking.pixels import Pixels
from mpp.masking.sequences import FrameSequence
from mpp.masking.tasks import Task, check_outside, check_targets, find_pairs, task_for
from mpp.masking.tools import Tool, one_of
from mpp.masking.video_frames import read_times
from mpp.masking.writing import is_own_folder, made_with, write_frames, write_png, write_video
from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.media.mask import Mask
from mpp.media.own import mark
from mpp.wording import few

_FORMAT = 1
_SHOWN = 20


@dataclass(frozen=True)
class JobSummary:
    """What a job did.

    Attributes:
        written: Results written.
        kept: Results that were there already, made of the same files by the same settings.
        frames: Frames of the moving ones among the written.
        unused: Second inputs that belong to no input: most often a misspelt name.
        failures: What could not be done and why, each with its file.
        output: Where the results lie.
        black: Of the masks of images written, those that are black everywhere.
    """

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    frames: int
    unused: tuple[Path, ...]
    failures: tuple[str, ...]
    output: Path
    black: tuple[Path, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        moving = f" ({self.frames} frames of clips)" if self.frames else ""
        found = [f"{len(self.written)} written to {self.output}{moving}, {len(self.kept)} there already"]
        if self.unused:
            names = ", ".join(few(self.unused, _SHOWN))
            found.append(f"{len(self.unused)} of tool.masks belong to no input: {names}")
        if self.black:
            names = ", ".join(few(self.black, _SHOWN))
            found.append(f"{len(self.black)} are wholly black, as nothing was found; draw these masks: {names}")
        return found

    def check(self) -> None:
        """Say what failed.

        Raises:
            ValueError: Something did; names each file.
        """
        if self.failures:
            head = f"{len(self.failures)} failed, the others are done; mend what is named and run again:"
            raise ValueError("\n  ".join([head, *few(self.failures, _SHOWN)]))


@dataclass(frozen=True)
class MaskJob:
    """A tool, what it works on, and where the results go.

    Args:
        tool: The tool.
        input: Folder of images, masks or videos, searched with its subfolders, or one file.
        output: Folder for the results, with the same subfolders: `NAME.png` for images, and as below for clips.
        overwrite: Replace results that are there. Without it, those made of the same files by the same settings are
            kept, and others are errors.
        keep: Make what is missing alone: results that are there stay as they are, whoever made them, and images with a
            mask beside them are left out.
        video_format: Of results of videos: `mkv` (lossless FFV1; previews are H.264 in `.mp4`), or `frames`: a folder
            `NAME/000001.png`, ....
        frame_folders: Take the images of each folder for the frames of one clip. Its result is a folder of frames.
        preview: Folder for images with the new masks over them; for tools that make masks from images.

    Raises:
        ValueError: A setting is missing, unknown, or does not go with the tool.
    """

    tool: Tool
    input: str | None = None
    output: str | None = None
    overwrite: bool = False
    keep: bool = False
    video_format: Literal["mkv", "frames"] = "mkv"
    frame_folders: bool = False
    preview: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is missing or does not go together."""
        one_of("video_format", self.video_format, ("mkv", "frames"))
        if self.keep and self.overwrite:
            raise ValueError("keep=true leaves results that are there, overwrite=true replaces them; set one of them")
        if self.output is None:
            raise ValueError("output=... is missing: give a folder for the results")
        if Path(self.output).suffix.lower() in SUFFIXES | VIDEO_SUFFIXES:
            raise ValueError(
                f"output={self.output} must be a folder; results are written as .png and .{self.video_format}"
            )
        if self.preview is not None and (self.tool.reads, self.tool.writes) != ("image", "mask"):
            raise ValueError(
                "preview=... is for tools that make masks from images; look at others with tool=preview "
                f"input=PICTURES tool.masks={self.output}"
            )

    def run(self) -> JobSummary:
        """Do it.

        A file that cannot be read does not stop the others.

        Raises:
            ValueError: Bad settings, or results that are there already and were made otherwise; nothing was written.
            OSError: The output cannot be written; what was done until then stays.
        """
        tasks, unused = self._tasks()
        open_tasks, kept = self._open(tasks)
        for option, folder in {"output": self.output, "preview": self.preview}.items():
            if folder is not None:
                check_writable(Path(folder).expanduser(), option)
        if open_tasks:
            self.tool.prepare([task.clip for task in open_tasks])
        previews = self.output if isinstance(self.tool, Preview) else self.preview
        if previews is not None:
            mark(Path(previews).expanduser())
        written, black, failures, frames, still = [], [], [], 0, set(open_tasks)
        for task in tqdm(tasks, desc="masks", unit="file", disable=None):
            try:
                if task in still:
                    count, dark = self._write(self.tool, task)
                    frames += count
                    written.append(task.target)
                    black += [task.target] if dark and self.tool.reads == "image" else []
                if self.preview is not None:
                    self._look(task)
            except ValueError as error:
                failures.append(_named(task.clip, str(error)))
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 (of a model or a library, or too little memory for it)
                failures.append(_named(task.clip, f"the model failed on it ({error})".splitlines()[0]))
        return JobSummary(tuple(written), tuple(kept), frames, unused, tuple(failures), Path(self.output), tuple(black))

    def _tasks(self) -> tuple[list[Task], tuple[Path, ...]]:
        """Everything to be done, and second inputs that nothing needs."""
        sources = {"input": self.input, "tool.masks": self.tool.masks}
        check_outside("output", self.output, sources)
        if self.preview is not None:
            check_outside("preview", self.preview, sources | {"output": self.output})
        pairs, unused = find_pairs(self.tool, self.input, frame_folders=self.frame_folders, masked=not self.keep)
        tasks = [task_for(self.output, *both, self.tool, self.video_format) for both in pairs]
        check_targets(tasks)
        return tasks, unused

    def _open(self, tasks: Sequence[Task]) -> tuple[list[Task], list[Path]]:
        """Tasks that are still to be done, and results that are there.

        Raises:
            ValueError: A result is there and was made otherwise.
        """
        there = [task for task in tasks if task.target.exists()]
        kept = {task for task in there if self.keep or (not self.overwrite and self._is_made(self.tool, task))}
        foreign = [task for task in there if task not in kept]
        if foreign and not self.overwrite:
            raise ValueError(
                f"{len(foreign)} results are there already and were made otherwise, such as {foreign[0].target}; "
                "choose another output, or set overwrite=true to make all of them anew"
            )
        for task in foreign:
            if task.target.is_dir() if task.form != "frames" else not is_own_folder(task.target):
                raise ValueError(f"{task.target} holds other things, and is not replaced; choose another output")
        return [task for task in tasks if task not in kept], [task.target for task in there if task in kept]

    def _made(self, tool: Tool, task: Task) -> dict[str, Any]:
        """How a result is made: all that it depends on."""
        other = None if task.other is None else task.other.fingerprint()
        settings = json.loads(json.dumps(tool.settings(task.clip.key)))
        made = {"format": _FORMAT, "tool": type(tool).__name__, "settings": settings}
        return made | {"input": task.clip.fingerprint(), "masks": other}

    def _is_made(self, tool: Tool, task: Task) -> bool:
        found = made_with(task.target) or {}
        if {name: value for name, value in found.items() if name != "mpp"} != self._made(tool, task):
            return False
        return not task.timing.frames or {p.name for p in task.target.iterdir()} == set(_names(task.timing))

    def _write(self, tool: Tool, task: Task) -> tuple[int, bool]:
        """Write one result; returns its frames if it is a clip, and whether it is a mask that is black everywhere."""
        if task.other is None and tool.masks is not None and tool.missing == "fail":
            raise ValueError(f"{task.clip.path} has nothing of its name in tool.masks={tool.masks}")
        made = json.dumps({"mpp": __version__} | self._made(tool, task), sort_keys=True)
        frames, timing, count = _Watched(tool.apply(task.clip, task.other)), task.timing, 0
        if task.form == "png":
            write_png(task.target, _only(iter(frames)), made)
        elif task.form == "video":
            count = write_video(task.target, iter(frames), read_times(timing.path), made)
        else:
            count = write_frames(task.target, iter(frames), tuple(_names(timing)), made)
        return count, frames.black

    def _look(self, task: Task) -> None:
        """Write the preview of a result, unless it is there."""
        tool = Preview(masks=self.output)
        look = task_for(self.preview, task.clip, _result(task), tool, self.video_format)
        if look.target.exists() and not self.overwrite:
            if self._is_made(tool, look):
                return
            if (made_with(look.target) or {}).get("tool") != "Preview":
                raise ValueError(
                    f"{look.target} is there already and is no preview; choose another folder for previews"
                )
        self._write(tool, look)


class _Watched:
    """Frames on their way, and whether all of those that passed are masks without anything in them."""

    def __init__(self, frames: Iterator[Mask | Pixels]) -> None:
        self._frames, self.black = frames, True

    def __iter__(self) -> Iterator[Mask | Pixels]:
        for frame in self._frames:
            self.black = self.black and isinstance(frame, Mask) and not frame.levels().any()
            yield frame


def _result(task: Task) -> FrameSequence:
    """A result as a clip."""
    frames = tuple(sorted(task.target.iterdir())) if task.target.is_dir() else ()
    return FrameSequence(task.clip.key, task.target, frames)


def _names(timing: FrameSequence) -> Iterator[str]:
    """Of the files in a folder of frames."""
    if timing.frames:
        return (f"{file.stem}.png" for file in timing.frames)
    return (f"{number:06d}.png" for number in range(1, len(read_times(timing.path).pts) + 1))


def _only(frames: Iterator[Mask | Pixels]) -> Mask | Pixels:
    (frame,) = frames
    return frame


def _named(clip: FrameSequence, text: str) -> str:
    return text if str(clip.path) in text else f"{clip.path}: {text}"
