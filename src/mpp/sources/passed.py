"""Files that are passed over, each with the reason."""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mpp.media.paths import Listing
from mpp.wording import few

_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")


class Passed(NamedTuple):
    """A file that is not used.

    Attributes:
        name: Its path below the folder that was searched.
        reason: Why, and what to do.
    """

    name: str
    reason: str


def unread(name: str) -> Passed:
    """A file of no format that is read."""
    if posixpath.splitext(name)[1].lower() in _TABLES:
        return Passed(name, "a table is read where data.captions or data.manifest names it")
    return Passed(name, "no format that mpp reads; save images as PNG and videos as MP4")


def of_listing(listing: Listing) -> Iterator[Passed]:
    """What looking through a folder left out by itself."""
    yield from (Passed(name, "hidden, by a name that begins with a dot") for name in listing.hidden)
    yield from (Passed(f"{name}/", "written by mpp, a cache or the output of a run") for name in listing.own)


def lines(passed: Iterable[Passed]) -> list[str]:
    """A line for each reason and suffix: how many, some of their names, and the reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, reason in passed:
        groups[reason, posixpath.splitext(name)[1].lower()].append(name)
    return [
        f"{len(names)} {f'{suffix} ' if suffix else ''}({', '.join(few(sorted(names), 3))}): {reason}"
        for (reason, suffix), names in sorted(groups.items())
    ]
