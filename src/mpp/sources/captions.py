"""Captions: text files beside the media, or one table for all; trigger word and shuffled tags."""

import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ConfigDict

from mpp.core import draws
from mpp.media.paths import MediaPath, as_path, join, real
from mpp.sources.tables import csv_rows, json_rows

_MEDIA = ("file", "file_name", "media")
_TEXT = ("caption", "text")
_MOST_SHUFFLES = 100
_SHOWN = 60


@dataclass(frozen=True)
class CaptionVariants:
    """What is made of each caption: a trigger word in front, and copies of it with its tags in other orders.

    Args:
        trigger: Put in front of each caption that does not hold it as a word; alone where there is no caption.
        shuffles: Shuffled orders of the tags that are prepared for each training sample, 0 to 100; captions with fewer
            orders have fewer.
        keep_tags: First tags that stay in place, the trigger word counted.
        separator: What stands between two tags.

    Raises:
        ValueError: An empty trigger word or separator, or numbers out of range.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    trigger: str | None = None
    shuffles: int = 0
    keep_tags: int = 1
    separator: str = ","

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.trigger is not None and not self.trigger.strip():
            raise ValueError("data.caption_variants.trigger is empty; leave it out for none")
        if not 0 <= self.shuffles <= _MOST_SHUFFLES:
            raise ValueError(f"data.caption_variants.shuffles must be 0 to {_MOST_SHUFFLES}, got {self.shuffles}")
        if self.keep_tags < 0:
            raise ValueError(f"data.caption_variants.keep_tags must be at least 0, got {self.keep_tags}")
        if not self.separator:
            raise ValueError('data.caption_variants.separator is empty; tags are mostly separated by ","')

    def caption(self, caption: str) -> str:
        """A caption with the trigger word."""
        if self.trigger is None:
            return caption
        trigger = clean(self.trigger)
        if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
            return caption
        return self._glue().join([trigger, caption]) if caption else trigger

    def variants(self, caption: str, key: str) -> list[str]:
        """Other orders of a caption's tags: distinct, without the caption's own, the same in each run.

        The first of many are those of fewer, so that more of them leave prepared ones in use.

        Args:
            caption: With its trigger word.
            key: Its sample's, on which the draw depends.
        """
        tags = [tag for part in caption.split(self.separator) if (tag := part.strip())]
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        orders = math.factorial(len(rest)) // math.prod(math.factorial(count) for count in Counter(rest).values())
        wanted, found = min(self.shuffles, orders - 1), {tuple(rest): None}
        random = draws.generator(0, "tags", key)
        while len(found) <= wanted:
            order = torch.randperm(len(rest), generator=random).tolist()
            found[tuple(rest[number] for number in order)] = None
        return [self._glue().join([*kept, *order]) for order in list(found)[1:]]

    def _glue(self) -> str:
        return self.separator if self.separator[-1].isspace() else f"{self.separator} "


@dataclass(frozen=True)
class CaptionRow:
    """One row of a table of captions.

    Attributes:
        line: Its number, for messages.
        media: The media as the table names it.
        caption: Its text.
    """

    line: int
    media: str
    caption: str


@dataclass(frozen=True)
class CaptionTable:
    """Captions of many media in one JSONL or CSV file.

    A row names its media by the path from the table's own folder (as `metadata.jsonl` of Hugging Face's ImageFolder
    does), or from the folder of media, with or without suffix.

    Attributes:
        path: The file.
        rows: Its rows.
    """

    path: MediaPath
    rows: tuple[CaptionRow, ...]

    @classmethod
    def read(cls, text: str) -> "CaptionTable":
        """Read a table.

        Raises:
            ValueError: It is not there, is neither JSONL nor CSV, has no rows, or a row is damaged.
        """
        path = as_path(text)
        kind = path.suffix.lower()
        if kind in (".jsonl", ".ndjson"):
            rows = json_rows(path)
        elif kind in (".csv", ".tsv"):
            rows = csv_rows(path)
        else:
            raise ValueError(f"data.captions={text} must be a .jsonl, .csv or .tsv file")
        found = tuple(_row(path, line, row) for line, row in rows)
        if not found:
            raise ValueError(f"data.captions={text} has no rows")
        return cls(path, found)

    def match(self, media: Sequence[tuple[str, MediaPath]]) -> tuple[dict[int, str], list[CaptionRow]]:
        """Captions of media.

        Args:
            media: Each one's path below its folder, and its path.

        Returns:
            Captions by number in `media`, and the rows that belong to none.

        Raises:
            ValueError: A row fits two media, two rows name the same one, or no row fits any.
        """
        paths: dict[str, int] = {}
        names: dict[str, list[int]] = defaultdict(list)
        for number, (name, path) in enumerate(media):
            paths[str(path)] = paths[real(path)] = number
            for spelling in {name, posixpath.splitext(name)[0]}:
                names[spelling].append(number)
        taken: dict[int, CaptionRow] = {}
        strangers = []
        for row in self.rows:
            number = self._number(row, paths, names, media)
            if number is None:
                strangers.append(row)
            elif number in taken:
                raise ValueError(
                    f"{self.path}:{row.line} and line {taken[number].line} are both about {media[number][1]}; "
                    "remove one of them"
                )
            else:
                taken[number] = row
        if not taken:
            row = self.rows[0]
            raise ValueError(
                f"{self.path}: none of its {len(self.rows)} rows names one of the {len(media)} media, such as "
                f"{media[0][0]}; line {row.line} names {row.media[:_SHOWN]!r}"
            )
        return {number: row.caption for number, row in taken.items()}, strangers

    def _number(
        self, row: CaptionRow, paths: Mapping[str, int], names: Mapping[str, list[int]], media: Sequence
    ) -> int | None:
        try:
            exact = paths.get(str(join(self.path.parent, row.media)))
        except ValueError:  # a URL of a file system that is not installed is none of the media
            exact = None
        if exact is not None:
            return exact
        found = names.get(posixpath.normpath(row.media), [])
        if len(found) > 1:
            raise ValueError(
                f"{self.path}:{row.line}: {row.media[:_SHOWN]!r} may be {media[found[0]][1]} or "
                f"{media[found[1]][1]}; write its path from the folder of {self.path.name}"
            )
        return found[0] if found else None


def clean(caption: str) -> str:
    """A caption on one line, without blanks at its ends."""
    return " ".join(caption.split())


def _row(path: MediaPath, line: int, row: Mapping[str, object]) -> CaptionRow:
    media, caption = (_field(path, line, row, names) for names in (_MEDIA, _TEXT))
    if not media.strip() or "\0" in media:
        raise ValueError(f"{path}:{line} names no media")
    return CaptionRow(line, media.strip(), clean(caption))


def _field(path: MediaPath, line: int, row: Mapping[str, object], names: Sequence[str]) -> str:
    there = [name for name in names if name in row]
    if len(there) != 1:
        what = f"both {there[0]} and {there[1]}" if there else "none of them"
        raise ValueError(
            f"{path}:{line} needs one field of {', '.join(names)} and has {what} ({', '.join(row)[:_SHOWN]})"
        )
    value = row[there[0]]
    if not isinstance(value, str):
        raise ValueError(f"{path}:{line}: {there[0]} should be text, got {repr(value)[:_SHOWN]}")
    return value


@dataclass(frozen=True)
class OtherCaptions:
    """Captions under which the training images are shown again.

    Args:
        replace: Words and what stands for them, e.g. `{ohwx: person}`: the trigger word's class word. None: not used.
        caption: One caption for all images; `""` is the empty caption. None: not used.

    Raises:
        ValueError: An empty word to replace, or one that stands for itself.
    """

    replace: Mapping[str, str] | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would match everywhere."""
        if any(not word.strip() for word in self.replace or ()):
            raise ValueError("data.preservation.replace has an empty word; write it as {trigger: class}")
        if any(word == other for word, other in (self.replace or {}).items()):
            raise ValueError(
                "data.preservation.replace has a word that stands for itself; write it as {trigger: class}"
            )

    def of(self, caption: str) -> list[str]:
        """The other captions of an image: with words replaced, where any occurs, and the one for all."""
        found = []
        if self.replace:
            words = "|".join(re.escape(word) for word in sorted(self.replace, key=len, reverse=True))
            other = re.sub(rf"(?<!\w)(?:{words})(?!\w)", lambda match: self.replace[match[0]], caption)
            if other != caption:
                found.append(other.strip())
        if self.caption is not None:
            found.append(self.caption)
        return found

    def check(self, captions: Sequence[str]) -> None:
        """Refuse words to replace that no caption has.

        Raises:
            ValueError: None of them occurs.
        """
        if self.replace and not any(len(self.of(caption)) > (self.caption is not None) for caption in captions):
            example = f", such as {captions[0]!r}" if captions else ""
            raise ValueError(
                f"data.preservation.replace: none of {', '.join(self.replace)} occurs as a word in any caption{example}"
            )
