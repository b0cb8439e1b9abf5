"""Whether the masks in a cache are still those on disk."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import evenly_spread
from mpp.cache.index import Entry, Index
from mpp.cache.provenance import MaskProvenance
from mpp.cache.reader import Reader
from mpp.media.paths import as_path, reaching
from mpp.models.frame_axis import FrameAxis
from mpp.preparing.frames import mask_kind, mask_sources
from mpp.sources.items import Item
from mpp.sources.source import FolderSource
from mpp.wording import few

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


def mask_changes(cache: Reader, entries: Index, axis: FrameAxis) -> MaskChanges:
    """Compare the masks in a cache with those on disk, by size and time, and by content where these differ.

    At most 10,000 samples are looked at, evenly spread. New masks are looked for in sets of at most 50,000.

    Args:
        cache: The cache.
        entries: Its samples.
        axis: What the model's frames are: layers have masks of their own.
    """
    fingerprints = Fingerprints()
    items, unchecked = _items(cache, entries, axis)
    found: dict[str, list[str]] = {"new": [], "edited": [], "deleted": []}
    for entry in _one_each(evenly_spread(entries)):
        try:
            change = _change(cache, entry, items, fingerprints)
        except (ValueError, OSError) as error:  # storage that cannot be reached
            unchecked = unchecked or str(error)
            continue
        if change is not None:
            found[change].append(entry.origin)
    return MaskChanges(*(tuple(sorted(keys)) for keys in found.values()), unchecked)


def _change(cache: Reader, entry: Entry, items: dict[str, Item], fingerprints: Fingerprints) -> str | None:
    """What happened to one sample's mask, so that preparing again would write it anew, or leave it out.

    Raises:
        ValueError: Its files cannot be looked at.
    """
    item = items.get(entry.origin)
    if entry.mask is None:
        return "new" if item is not None and mask_kind(item, transparent=False) else None
    known = cache.mask_made_from(entry)
    if known is None:
        return None  # the file itself is checked elsewhere
    if item is not None and _current(item, known, fingerprints):
        return None
    paths = [as_path(source.path) for source in known.sources]
    for path in paths:
        with reaching(path):
            there = path.exists()
        if not there and items:
            return "deleted"
        if not there:  # nothing can be found here, as on another machine
            raise ValueError(f"{path} is not on this machine")
    return None if item is None and fingerprints.current(known, known, paths) else "edited"


def _current(item: Item, known: MaskProvenance, fingerprints: Fingerprints) -> bool:
    """Whether an item's mask is the one that was cached; its cells are those of the latents, which stay as they are."""
    kind = mask_kind(item, transparent=known.kind == "alpha")
    try:
        paths = mask_sources(item)
    except ValueError:  # only some of its layers have one
        return False
    return fingerprints.current(known, replace(known, kind=kind, invert=item.invert), paths)


def _items(cache: Reader, entries: Index, axis: FrameAxis) -> tuple[dict[str, Item], str | None]:
    """The media and masks there are now, by key; or why they cannot be listed."""
    record = cache.notes().sources
    if not record:
        return {}, "the cache does not say where its masks came from"
    if len(entries) > _LISTED:
        return {}, f"new masks are not looked for in sets of more than {_LISTED:,} samples"
    try:
        found = FolderSource.from_record(record).items(with_layers=axis.has_layers)
        return {item.key: item for item in found}, None
    except (ValueError, OSError) as error:
        return {}, str(error)


def _one_each(entries: Iterable[Entry]) -> Iterable[Entry]:
    """One sample of each image or video: they share its masks."""
    seen = set()
    for entry in entries:
        if entry.origin not in seen:
            seen.add(entry.origin)
            yield entry


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(few(keys, _SHOWN))
