"""Where media, masks and captions come from, as the list of samples to prepare."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from mpp.files import WINDOWS
from mpp.media.paths import absolute, as_path, read_all, real
from mpp.sources.beside import Found
from mpp.sources.captions import CaptionTable, OtherCaptions, clean
from mpp.sources.clips import Clips
from mpp.sources.folders import LeftOver, MediaFolder
from mpp.sources.items import Item
from mpp.sources.manifest import manifest_items
from mpp.sources.settings import PATHS, SourceSettings, read_datasets
from mpp.sources.tables import as_record, decode_text

_NO_FILE = re.compile(r"[<>:\"|?*\\\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # Windows
_LONGEST = 200  # bytes of a file name, so that the cache's own endings fit into the usual 255


class _Named(NamedTuple):
    """An item, who named it, and where its media really lies."""

    item: Item
    where: str
    real: str


@dataclass(frozen=True, kw_only=True)
class FolderSource(SourceSettings):
    """Where media, masks and captions lie, and how they are brought into shape.

    Args:
        image_dir: See `SourceSettings` for this and all other settings of where things lie.
        cache_dir: Where the cache goes, on this machine.
        datasets: Several datasets by name instead of one, each with settings of `SourceSettings`, or a YAML file that
            holds them. Paths are then said by each of them, and other settings of `SourceSettings` here are their
            defaults. Keys of their samples begin with `NAME/`.
        on_error: `stop` at unreadable media and wrong masks, or `skip` them and name them at the end.
        resolution: Side of the square bucket in pixels.
        max_aspect: Longest side of a bucket over its shortest.
        flip: Also prepare each training image mirrored.
        empty_caption: Also prepare the empty caption, which caption dropout in training needs.
        clips: How clips are cut out of videos.
        preservation: Other captions of the training media that are encoded as well, for preservation samples.

    Raises:
        ValueError: Settings that are unknown, out of range, or contradict each other.
    """

    cache_dir: str
    datasets: Mapping[str, Mapping[str, Any]] | str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    resolution: int = 512
    max_aspect: float = 2.0
    flip: bool = False
    empty_caption: bool = False
    clips: Clips = field(default_factory=Clips)
    preservation: OtherCaptions = field(default_factory=OtherCaptions)

    def __post_init__(self) -> None:
        """Refuse unknown words, and settings that say two things."""
        super().__post_init__()
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"data.on_error must be stop or skip, got {self.on_error!r}")
        if "://" in self.cache_dir:
            raise ValueError(f"data.cache_dir={self.cache_dir} must be a folder on this machine")
        if self.datasets is None:
            if self.image_dir is None and self.manifest is None:
                raise ValueError("no media: set data.image_dir, data.manifest or data.datasets")
            return
        if self.paths():
            option = next(iter(self.paths()))
            raise ValueError(f"data.{option} and data.datasets are both set; say the path in the datasets it is for")
        if not isinstance(self.datasets, str):
            read_datasets(self.datasets, self._defaults())

    def items(self, *, with_layers: bool = False) -> list[Item]:
        """All media, those for training first, sorted by key.

        Args:
            with_layers: Whether layers are read; else those of an image that is there are left out.

        Raises:
            ValueError: A path is not there, cannot be read or holds no media; two media, masks or captions share a
                name; a caption is not UTF-8; a row of a file is damaged; layers or control images lack a number.
        """
        datasets = self._all()
        found = [named for name in datasets for named in self._read(name, datasets, with_layers=with_layers)]
        self._check(found)
        return sorted((named.item for named in found), key=lambda item: (item.split != "train", item.key))

    def left_over(self, items: Sequence[Item], *, with_layers: bool) -> LeftOver:
        """What in the folders is not used: most often a misspelt name, or a format that is not read.

        Args:
            items: What `items` gave.
            with_layers: As for `items`.

        Raises:
            ValueError: As `items` raises.
        """
        masks = (mask for item in items for mask in (item.mask, *item.layer_masks) if mask is not None)
        used = {*masks, *(path for item in items for path in (item.media, *item.layers, *item.controls))}
        found = LeftOver([], [], [])
        datasets = self._all()
        for name, dataset in datasets.items():
            if dataset.manifest is not None:
                continue
            folders = self._folders(name, datasets)
            for folder in folders:
                for known, more in zip(found, folder.left_over(used, with_layers=with_layers), strict=True):
                    known.extend(more)
            if dataset.captions is not None:
                whole = [row for folder in folders for row in folder.items(with_layers=False)]
                table = CaptionTable.read(dataset.captions)
                _, strangers = table.match([(file.name, file.path) for _, file in whole])
                found.unused.extend(f"{table.path.name}:{row.line} ({row.media})" for row in strangers)
        return found

    def sources_record(self) -> dict[str, Any]:
        """The settings as JSON-able values, with absolute paths: what they say does not depend on where it is read.

        Raises:
            ValueError: `data.datasets` is a file that cannot be read.
        """
        record = asdict(self.absolute()) | {"cache_dir": absolute(self.cache_dir)}
        if self.datasets is not None:
            record["datasets"] = {name: asdict(dataset.absolute()) for name, dataset in self._all().items()}
        return json.loads(json.dumps(record))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "FolderSource":
        """The source that `sources_record` described.

        Raises:
            ValueError: It is another version's record, or damaged.
        """
        return as_record(cls, record, "the record of the sources", below=".")

    def _defaults(self) -> SourceSettings:
        """What datasets do not say themselves."""
        own = {f.name: getattr(self, f.name) for f in fields(SourceSettings) if f.name not in PATHS}
        return SourceSettings(**own)

    def _all(self) -> dict[str, SourceSettings]:
        """The datasets by name; the only one, where there are no several, has none."""
        if self.datasets is None:
            return {"": self}
        return read_datasets(self.datasets, self._defaults())

    def _folders(self, name: str, datasets: Mapping[str, SourceSettings]) -> list[MediaFolder]:
        """The folders of media of one of the datasets, without what is no media of it."""
        dataset, option = datasets[name], f"data.datasets.{name}." if name else "data."
        for path, value in dataset.paths().items():
            if real(as_path(value)) == real(as_path(self.cache_dir)):
                raise ValueError(
                    f"{option}{path} and data.cache_dir are both {value}, so previews in the cache would be read as "
                    "images; choose a folder of its own for the cache, such as data.cache_dir="
                    f"{self.cache_dir.rstrip('/')}_cache"
                )
        inside = {real(as_path(self.cache_dir))}.union(*(other.inside() for other in datasets.values()))
        found = [MediaFolder(dataset, "train", inside, option)]
        if dataset.val_image_dir is not None:
            found.append(MediaFolder(dataset, "val", inside | {real(as_path(dataset.image_dir))}, option))
        return found

    def _read(self, name: str, datasets: Mapping[str, SourceSettings], *, with_layers: bool) -> Iterator[_Named]:
        """The items of one of the datasets, complete."""
        dataset = datasets[name]
        if dataset.manifest is not None:
            for item, where in manifest_items(dataset, with_layers=with_layers):
                caption = item.caption if item.captioned else None
                yield _Named(_finished(item, name, dataset, caption), where, real(item.media))
            return
        found = [
            (item, file, folder.beside.captions.get(file.key))
            for folder in self._folders(name, datasets)
            for item, file in folder.items(with_layers=with_layers)
        ]
        captions = _captions(dataset, found)
        of = f" (data.datasets.{name})" if name else ""
        for number, (item, file, _) in enumerate(found):
            told = _finished(item, name, dataset, captions.get(number))
            yield _Named(told, f"{item.media}{of}", file.real)

    def _check(self, found: Sequence[_Named]) -> None:
        """Refuse keys that cannot be file names, or are claimed twice, and media that are there twice."""
        keys: dict[str, str] = {}
        media: dict[tuple[str, str], str] = {}
        for item, where, lies in found:
            problem = _bad_key(item.key)
            if problem:
                raise ValueError(f"{where}: the key {item.key!r} {problem}; rename it, or give it another key")
            other = keys.setdefault(item.key, where)
            if other is not where:
                raise ValueError(f"{other} and {where} both claim the key {item.key}; rename one of them")
            other = media.setdefault((item.split, lies), where)
            if other is not where:
                raise ValueError(
                    f"{other} and {where} are the same file {lies}; leave one out (`repeats` shows media more often)"
                )
        mirrored = next((f"{key}@flip" for key in keys if f"{key}@flip" in keys), None) if self.flip else None
        if mirrored is not None:
            raise ValueError(f"{keys[mirrored]} has the key of a mirrored copy, with data.flip=true; rename it")


def _finished(item: Item, name: str, dataset: SourceSettings, caption: str | None) -> Item:
    """An item under its dataset's name and with its final caption."""
    key = item.key
    if name:
        key = f"@val/{name}/{key.removeprefix('@val/')}" if item.split == "val" else f"{name}/{key}"
    make = dataset.caption_variants
    final = make.caption(caption or "")
    variants = tuple(make.variants(final, key)) if item.split == "train" and make.shuffles else ()
    return replace(item, key=key, caption=final, captioned=caption is not None, variants=variants)


def _captions(dataset: SourceSettings, found: Sequence[tuple[Item, Found, Found | None]]) -> dict[int, str]:
    """Captions by number in `found`."""
    if dataset.captions is not None:
        return CaptionTable.read(dataset.captions).match([(file.name, file.path) for _, file, _ in found])[0]
    there = {number: text.path for number, (_, _, text) in enumerate(found) if text is not None}
    contents = read_all(list(there.values()))
    return {n: clean(decode_text(content, path)) for (n, path), content in zip(there.items(), contents, strict=True)}


def _bad_key(key: str) -> str | None:
    """Why a key cannot name files of a cache."""
    parts = key.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "is not UTF-8"
    if any(part in ("", ".", "..") for part in parts) or "\0" in key:
        return "has an empty part, `.` or `..`"
    if WINDOWS and any(map(_NO_FILE.search, parts)):
        return "has a part that can name no file on Windows"
    return f"has a part longer than {_LONGEST} bytes" if longest > _LONGEST else None
