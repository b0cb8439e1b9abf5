"""Whether what a cache was made from is what lies on disk now: media, masks and captions.

The answer is that of preparing again with the settings that the cache was prepared with: by content, wherever the files
lie. A sample counts as changed where preparing would make something of it anew, or leave it out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import Notes, evenly_spread
from mpp.cache.index import Entry, Index
from mpp.cache.provenance import MediaProvenance
from mpp.cache.reader import Reader
from mpp.media.paths import as_path, reaching
from mpp.models.frame_axis import FrameAxis
from mpp.preparing.frames import mask_kind, mask_sources
from mpp.preparing.planning import source_files
from mpp.sources.items import Item
from mpp.sources.source import FolderSource
from mpp.wording import few

_LISTED = 50_000  # sources of larger sets are not listed at the start of a run
_SHOWN = 3


@dataclass(frozen=True)
class Changed:
    """What became of one kind of source since a cache was prepared, by key of the media.

    Attributes:
        new: There was none.
        edited: Of other content, or used otherwise.
        deleted: There is none any more.
    """

    new: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.new or self.edited or self.deleted)

    def __str__(self) -> str:
        """In words, with a few of the names."""
        found = ((len(keys), what, ", ".join(few(keys, _SHOWN))) for what, keys in vars(self).items() if keys)
        return ", ".join(f"{count} {what} ({names})" for count, what, names in found)


@dataclass(frozen=True)
class SourceChanges:
    """What became of the sources of a cache since it was prepared.

    Attributes:
        masks: Of masks.
        captions: Of captions.
        media: Of images and videos, with their layers and control images.
        unchecked: What could not be looked at, and why; None where all was.
    """

    masks: Changed = field(default_factory=Changed)
    captions: Changed = field(default_factory=Changed)
    media: Changed = field(default_factory=Changed)
    unchecked: str | None = None

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.masks or self.captions or self.media)

    def lines(self, cache: str = "the cache") -> list[str]:
        """In words, a line for each kind; `cache` is how they call it."""
        kinds = {"masks": self.masks, "captions": self.captions, "media": self.media}
        return [f"{kind} changed since {cache} was prepared: {what}" for kind, what in kinds.items() if what]


def source_changes(cache: Reader, entries: Index, axis: FrameAxis, *, thorough: bool = False) -> SourceChanges:
    """Compare the sources of a cache with those on disk, by size and time, and by content where these differ.

    Args:
        cache: The cache.
        entries: Its samples.
        axis: What the model's frames are: layers have masks of their own.
        thorough: Look at all samples, however many there are; else at 10,000 at most, evenly spread, and for what is
            new, deleted or captioned otherwise only in sets of at most 50,000.
    """
    found = _Comparison(cache, Fingerprints())
    items, found.unchecked = _items(cache, entries, axis, thorough=thorough)
    if items:
        found.listed(items, entries)
    for entry in _one_each(entries if thorough else evenly_spread(entries)):
        try:
            found.files(entry, items)
        except (ValueError, OSError) as error:  # storage that cannot be reached
            found.unchecked = found.unchecked or str(error)
    return found.result()


class _Comparison:
    """What was found so far; each sample is looked at once."""

    def __init__(self, cache: Reader, fingerprints: Fingerprints) -> None:
        self.cache, self.fingerprints = cache, fingerprints
        self.unchecked: str | None = None
        self._found: dict[tuple[str, str], set[str]] = {}

    def result(self) -> SourceChanges:
        """All of it."""
        kinds = (
            Changed(*(tuple(sorted(self._found.get((kind, what), ()))) for what in ("new", "edited", "deleted")))
            for kind in ("masks", "captions", "media")
        )
        return SourceChanges(*kinds, unchecked=self.unchecked)

    def listed(self, items: Mapping[str, Item], entries: Index) -> None:
        """What shows without looking at files: media that came and went, captions, and how often they are visited."""
        known = {entry.origin: entry for entry in _one_each(entries)}
        notes = self.cache.notes()
        for key, item in items.items():
            entry = known.get(key)
            if entry is None:
                if not self._is_left_out(item, notes):
                    self._note("media", "new", key)
                continue
            if (entry.caption, entry.variants) != (item.caption, item.variants):
                bare = not item.captioned
                self._note("captions", "deleted" if bare else "edited" if entry.caption else "new", key)
            if entry.repeats != item.repeats:
                self._note("media", "edited", key)
        for key in known.keys() - items.keys():
            self._note("media", "deleted", key)

    def files(self, entry: Entry, items: Mapping[str, Item]) -> None:
        """Compare the files of one sample's media and mask.

        Raises:
            ValueError: They cannot be looked at.
        """
        made, mask = self.cache.latents_made_from(entry), self.cache.mask_made_from(entry)
        if not items:
            for kind, known in (("media", made), ("masks", mask)):
                if known is not None and not self._current_where_it_was(known):
                    self._note(kind, "edited", entry.origin)
            return
        item = items.get(entry.origin)
        if item is None:
            return
        if made is not None and not self.fingerprints.current(made, made, source_files(item)):
            self._note("media", "edited", entry.origin)
        alpha = mask is not None and mask.kind == "alpha" if made is None else made.alpha
        kind = mask_kind(item, transparent=alpha)
        if entry.mask is None:
            if kind is not None:
                self._note("masks", "new", entry.origin)
        elif kind is None:
            self._note("masks", "deleted", entry.origin)
        elif mask is not None:  # the file itself is checked elsewhere
            wanted = replace(mask, kind=kind, invert=item.invert)
            if not self.fingerprints.current(mask, wanted, _mask_sources(item)):
                self._note("masks", "edited", entry.origin)

    def _note(self, kind: str, what: str, key: str) -> None:
        self._found.setdefault((kind, what), set()).add(key)

    def _current_where_it_was(self, known: MediaProvenance) -> bool:
        """Whether the files that something was made from are what they were, where they were.

        Raises:
            ValueError: One of them is not there, as on another machine.
        """
        paths = [as_path(source.path) for source in known.sources]
        for path in paths:
            with reaching(path):
                there = path.exists()
            if not there:
                raise ValueError(f"{path} is not on this machine")
        return self.fingerprints.current(known, known, paths)

    def _is_left_out(self, item: Item, notes: Notes) -> bool:
        """Whether preparing left an item out, and none of its files came later."""
        files = [path for path in (item.media, item.mask, *item.layers, *item.controls) if path is not None]
        if not any(path.name in reason for path in files for reason in notes.skipped):
            return False
        written = (self.cache.folder / "notes.json").stat().st_mtime_ns
        times = [self.fingerprints.of(path).get("mtime_ns") for path in files]
        return all(isinstance(time, int) and time < written for time in times)


def _mask_sources(item: Item) -> Sequence[Path]:
    """The files that an item's mask would be made from; none where only some of its layers have one."""
    try:
        return mask_sources(item)
    except ValueError:
        return ()


def _items(cache: Reader, entries: Index, axis: FrameAxis, *, thorough: bool) -> tuple[dict[str, Item], str | None]:
    """The media and masks there are now, by key; or why they cannot be listed."""
    record = cache.notes().sources
    if not record:
        return {}, "the cache does not say what it was made from"
    if len(entries) > _LISTED and not thorough:
        return {}, f"new and deleted files are not looked for in sets of more than {_LISTED:,} samples"
    try:
        found = FolderSource.from_record(record).items(with_layers=axis.has_layers)
        return {item.key: item for item in found}, None
    except (ValueError, OSError) as error:
        return {}, str(error)


def _one_each(entries: Sequence[Entry]) -> Iterator[Entry]:
    """One sample of each image or video: they share its sources."""
    seen = set()
    for entry in entries:
        if entry.origin not in seen:
            seen.add(entry.origin)
            yield entry
