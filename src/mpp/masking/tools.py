"""What every mask tool offers, and the tools that look at one pixel at a time."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from mpp.masking.pixels import Pixels, fit_mask, read_indices
from mpp.masking.sequences import FrameSequence
from mpp.media.mask import Mask
from mpp.wording import few

T = TypeVar("T")
U = TypeVar("U")

_FARTHEST = 442  # from black to white in 8-bit RGB, rounded up


class Tool(ABC):
    """Makes masks or images of masks or images. Instances are cheap: models are loaded by `prepare`.

    Attributes:
        reads: What its input is.
        writes: What its output is.
        video_suffix: Of the videos it writes.
        masks: Folder (or one file) of the second input, for tools that have one.
        missing: What is done with inputs without a second one; `fail` names them and does the rest.
    """

    reads: ClassVar[Literal["mask", "image"]] = "mask"
    writes: ClassVar[Literal["mask", "image"]] = "mask"
    video_suffix: ClassVar[str] = ".mkv"
    masks: str | None = None
    missing: str = "fail"

    def prepare(self, clips: Sequence[FrameSequence]) -> None:  # noqa: B027 (most tools need nothing)
        """Load what these clips need; called once, and not if there is nothing to do.

        Raises:
            ValueError: A model that cannot be loaded, or does not fit the settings.
        """

    @abstractmethod
    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask | Pixels]:
        """One result for each frame, in order.

        Args:
            clip: The input.
            other: The second input of its name; None where the tool has none, or where it is missing.

        Raises:
            ValueError: The input is unreadable or does not fit; names the file.
        """

    def settings(self, key: str) -> dict[str, Any]:
        """What the result of the clip called `key` depends on, besides its files."""
        del key
        left_out = {"masks", "missing", "device"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def together(
    clip: FrameSequence, frames: Iterator[T], other: FrameSequence, others: Iterator[U]
) -> Iterator[tuple[T, U]]:
    """Frames of two clips side by side; what stands still is repeated for what moves.

    Raises:
        ValueError: Both move and have not equally many frames.
    """
    if not other.moving:
        return zip(frames, itertools.repeat(next(others)), strict=False)
    if not clip.moving:
        return zip(itertools.repeat(next(frames)), others, strict=False)
    return _equally_many(clip, frames, other, others)


def _equally_many(
    clip: FrameSequence, frames: Iterator[T], other: FrameSequence, others: Iterator[U]
) -> Iterator[tuple[T, U]]:
    for number, both in enumerate(itertools.zip_longest(frames, others)):
        if None in both:
            shorter = clip if both[0] is None else other
            raise ValueError(
                f"{clip.path} and {other.path} have different numbers of frames: {shorter.path} has only {number}; "
                "give masks of the same frames"
            )
        yield both


def needs_masks(masks: str | None) -> None:
    """Refuse a tool without its second input.

    Raises:
        ValueError: As said.
    """
    if masks is None:
        raise ValueError("tool.masks=... is missing: give the folder of masks, or one mask for all")


def one_of(option: str, value: str, words: Sequence[str]) -> None:
    """Refuse an unknown word.

    Raises:
        ValueError: As said.
    """
    if value not in words:
        raise ValueError(f"{option} must be {' or '.join(words)}, got {value!r}")


@dataclass(frozen=True)
class Invert(Tool):
    """White becomes black: what was learned is preserved."""

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The inverted masks."""
        del other
        return (Mask(1 - mask.values, mask.bits) for mask in clip.masks())


@dataclass(frozen=True)
class Combine(Tool):
    """Two masks of the same image to one.

    Args:
        masks: Folder of the second masks, matched by path and name, or one mask for all. A mask that stands still
            holds for all frames of one that moves, whichever of the two it is.
        how: `multiply` (tiers inside an instance mask), `min`, `max` or `subtract` (first minus second, at least 0).
        resize: Bring the second mask to the size of the first; else other sizes are errors.
        missing: Masks without a second one: `fail`, or `keep` them as they are.

    Raises:
        ValueError: A setting is missing or unknown.
    """

    masks: str | None = None
    how: Literal["multiply", "min", "max", "subtract"] = "multiply"
    resize: bool = False
    missing: Literal["fail", "keep"] = "fail"

    def __post_init__(self) -> None:
        """Refuse what is missing or unknown."""
        needs_masks(self.masks)
        one_of("tool.how", self.how, ("multiply", "min", "max", "subtract"))
        one_of("tool.missing", self.missing, ("fail", "keep"))

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The combined masks, as deep as the deeper of the two."""
        if other is None:
            yield from clip.masks()
            return
        what = f"{clip.path} and {other.path}"
        for first, second in together(clip, clip.masks(), other, other.masks()):
            fitted = fit_mask(second, first.size, what, resize=self.resize)
            yield Mask(self._combined(first.values, fitted.values), max(first.bits, second.bits))

    def _combined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if self.how == "multiply":
            return first * second
        if self.how == "subtract":
            return (first - second).clip(min=0)
        return np.minimum(first, second) if self.how == "min" else np.maximum(first, second)


@dataclass(frozen=True)
class Tiers(Tool):
    """Other values for the grey levels (or palette indices, or label numbers) of masks, by a table.

    Args:
        table: From the file's own levels (0 to 255, or to 65535 in 16-bit files) to values in [0, 1], as
            `{255: 1.0, 128: 0.5}`, or with names that serve the reader only, as `{face: [255, 1.0]}`.
        tolerance: Levels beside an entry that count as it, >= 0; for masks from lossy files.
        other: Value of all levels that the table lacks; None: they are errors.
        values: `grey`, or `index` for the palette indices of label maps.

    Raises:
        ValueError: No table, a value out of range, or a tolerance with which two entries overlap.
    """

    table: Mapping[int | str, float | Sequence[float]] | None = None
    tolerance: int = 0
    other: float | None = None
    values: Literal["grey", "index"] = "grey"

    def __post_init__(self) -> None:
        """Refuse tables that are missing or ambiguous."""
        one_of("tool.values", self.values, ("grey", "index"))
        if not self.table:
            raise ValueError("tool.table is missing; give it as tool.table={255:1.0,128:0.5,0:0}")
        if self.tolerance < 0:
            raise ValueError(f"tool.tolerance must be at least 0, got {self.tolerance}")
        if self.other is not None and not 0 <= self.other <= 1:
            raise ValueError(f"tool.other must be between 0 and 1, got {self.other}")
        levels = sorted(level for level, _ in self.entries())
        for low, high in itertools.pairwise(levels):
            if high == low:
                raise ValueError(f"tool.table names the level {low} twice; it can have one value")
            if high - low <= 2 * self.tolerance:
                raise ValueError(
                    f"tool.tolerance={self.tolerance} is too much for a table with {low} and {high}: a level between "
                    f"them would be both; at most {(high - low - 1) // 2}"
                )

    def entries(self) -> list[tuple[int, float]]:
        """Levels and their new values.

        Raises:
            ValueError: A level is no whole number from 0 to 65535, or a value is not in [0, 1].
        """
        found = []
        for name, entry in (self.table or {}).items():
            named = isinstance(entry, list | tuple) and len(entry) == 2
            level, value = entry if named else (name, entry)
            whole = str(level).removesuffix(".0")
            if not (whole.isascii() and whole.isdigit() and int(whole) <= 65535):
                raise ValueError(
                    f"tool.table: {name!r}: {entry!r} has no level; write LEVEL: VALUE or NAME: [LEVEL, VALUE], the "
                    "level a whole number from 0 to 65535"
                )
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"tool.table: the value of {name!r} must be between 0 and 1, got {value!r}")
            found.append((int(whole), float(value)))
        return found

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks with their new values."""
        del other
        if self.values == "grey":
            for number, mask in enumerate(clip.masks(labels=True)):
                where = f"{clip.path}, frame {number}" if clip.is_video else clip.files[number]
                yield Mask(self._mapped(mask.levels(), where), mask.bits)
            return
        if clip.is_video:
            raise ValueError(f"{clip.path} is a video, which has no palette; set tool.values=grey")
        for file in clip.files:
            yield Mask(self._mapped(read_indices(file), file))

    def _mapped(self, levels: np.ndarray, where: object) -> np.ndarray:
        count = np.bincount(levels.ravel(), minlength=65536)
        new = np.full(len(count), np.nan if self.other is None else self.other, np.float32)
        for level, value in self.entries():
            new[max(0, level - self.tolerance) : level + self.tolerance + 1] = value
        unknown = np.flatnonzero((count > 0) & np.isnan(new))
        if len(unknown):
            shown = ", ".join(few([f"{level} ({count[level]} pixels)" for level in unknown]))
            raise ValueError(
                f"{where}: {len(unknown)} levels are not in the table: {shown}; "
                "add them, raise tool.tolerance, or say with tool.other what they become"
            )
        return new[levels]


@dataclass(frozen=True)
class FromColor(Tool):
    """Masks of a key colour, such as a green screen or a colour that was painted in.

    Args:
        color: Red, green and blue, 0 to 255.
        tolerance: Distance in 8-bit RGB up to which a pixel has the colour, 0 to 442.
        softness: Beyond the tolerance the mask falls to 0 over this distance, >= 0.
        keep: What becomes white: the `color`, or the `rest`.

    Raises:
        ValueError: A colour or distance out of range.
    """

    color: Sequence[int] | None = None
    tolerance: float = 30.0
    softness: float = 0.0
    keep: Literal["color", "rest"] = "color"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.color is None or len(self.color) != 3 or not all(0 <= c <= 255 for c in self.color):
            got = None if self.color is None else list(self.color)
            raise ValueError(f"tool.color must be red, green and blue from 0 to 255, as [0,255,0], got {got}")
        if not 0 <= self.tolerance <= _FARTHEST:
            raise ValueError(f"tool.tolerance must be between 0 and {_FARTHEST}, got {self.tolerance}")
        if not 0 <= self.softness <= _FARTHEST:
            raise ValueError(f"tool.softness must be between 0 and {_FARTHEST}, got {self.softness}")
        one_of("tool.keep", self.keep, ("color", "rest"))

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks."""
        del other
        for image in clip.images():
            away = np.asarray(image.rgb, dtype=np.float32) - np.asarray(self.color, dtype=np.float32)
            beyond = np.sqrt((away**2).sum(2)) - self.tolerance
            key = 1 - (beyond / self.softness).clip(0, 1) if self.softness else (beyond <= 0).astype(np.float32)
            yield Mask(key if self.keep == "color" else 1 - key)
