"""Whether the masks in a cache are still those on disk."""

from collections.abc import Iterable
from dataclasses import dataclass

from mpp.data.cache import Cache, made_from, some
from mpp.data.index import Entry, Index
from mpp.data.item import Item
from mpp.data.places import as_path
from mpp.data.source import FolderSource
from mpp.data.stamps import Stamps

_LISTED = 50_000  # sources of larger sets are not listed at the start of a run
_SHOWN = 3


@dataclass(frozen=True)
class MaskChanges:
    """Masks that were added, edited or deleted since a cache was prepared, by key of their media.

    Attributes:
        new: Media that have a mask now.
        edited: Masks of other content, or used otherwise.
        deleted: Masks that are gone.
        unchecked: What could not be looked at, and why; None where all was.
    """

    new: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    unchecked: str | None = None

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.new or self.edited or self.deleted)

    def __str__(self) -> str:
        """In words, with a few of the names."""
        found = [
            f"{len(keys)} {what} ({_some(keys)})"
            for what, keys in vars(self).items()
            if isinstance(keys, tuple) and keys
        ]
        return ", ".join(found)


def mask_changes(cache: Cache, entries: Index, *, layered: bool) -> MaskChanges:
    """Compare the masks in a cache with those on disk, by size and time, and by content where these differ.

    At most 10,000 samples are looked at, evenly spread. New masks are looked for in sets of at most 50,000.

    Args:
        cache: The cache.
        entries: Its samples.
        layered: Whether layers have masks.
    """
    stamps = Stamps()
    items, unchecked = _items(cache, entries, layered=layered)
    new, edited, deleted = set(), set(), set()
    for entry in _one_each(some(entries)):
        item = items.get(entry.origin)
        if entry.mask is None:
            if item is not None and (item.mask is not None or (layered and any(item.layer_masks))):
                new.add(entry.origin)
            continue
        known = made_from(cache.mask_path(entry.key))
        if not known:
            continue  # the file itself is checked elsewhere
        paths = [as_path(source["source"]) for source in known["sources"]]
        if not all(path.exists() for path in paths):
            # All sources may be out of reach, e.g. on another machine: then nothing was deleted.
            if items:
                deleted.add(entry.origin)
            elif unchecked is None:
                unchecked = f"{paths[0]} is not on this machine"
        elif not stamps.unchanged(paths, known["sources"]) or _used_otherwise(item, entry, known, layered=layered):
            edited.add(entry.origin)
    return MaskChanges(tuple(sorted(new)), tuple(sorted(edited)), tuple(sorted(deleted)), unchecked)


def _items(cache: Cache, entries: Index, *, layered: bool) -> tuple[dict[str, Item], str | None]:
    """The media and masks there are now, by key; or why they cannot be listed."""
    record = cache.notes().sources
    if not record:
        return {}, "the cache does not say where its masks came from"
    if len(entries) > _LISTED:
        return {}, f"new masks are not looked for in sets of more than {_LISTED:,} samples"
    try:
        return {item.key: item for item in FolderSource.from_record(record).items(layered=layered)}, None
    except (ValueError, OSError) as error:
        return {}, str(error)


def _used_otherwise(item: Item | None, entry: Entry, known: dict[str, object], *, layered: bool) -> bool:
    """Whether another file, or another reading of it, is the mask now."""
    if item is None:
        return False
    if known["invert"] != item.invert:
        return True
    if layered or entry.mask == "alpha":
        return item.mask is not None and not layered
    return item.mask is None or str(item.mask) != known["sources"][0]["source"]


def _one_each(entries: Iterable[Entry]) -> Iterable[Entry]:
    """One sample of each picture or video: they share its masks."""
    seen = set()
    for entry in entries:
        if entry.origin not in seen:
            seen.add(entry.origin)
            yield entry


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
