"""Media in a folder, with the captions, layers and sidecar masks beside them, and masks and controls in others."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.media.paths import MediaPath, as_path, folder, look_through, real
from mpp.sources.beside import LAYER, MEDIA, Beside, Found, ancestors, by_key, check_foreign
from mpp.sources.items import Item, MaskKind
from mpp.sources.passed import Passed, of_listing, unread
from mpp.sources.settings import SourceSettings
from mpp.wording import few

_NUMBERED = re.compile(r"(.+)_([0-9]+)")
_LAYERS = "of layers, which this model does not learn"
_OTHER_KIND = "another mask of the same media comes first, or data.mask_sources leaves this kind out"


class LeftOver(NamedTuple):
    """What in the folders of a dataset is not used.

    Attributes:
        unused: Masks, control images and captions that belong to no media.
        passed: Everything else, with the reason.
        doubtful: Media that are called like masks, of media that are not there.
    """

    unused: list[str]
    passed: list[Passed]
    doubtful: list[str]


class MediaFolder:
    """A folder of media and the folders that belong to it: one split of a dataset.

    Args:
        dataset: Its settings.
        split: `train` or `val`.
        without: Folders in it that hold other things, as `real` gives them.
        option: The settings' names in messages, e.g. `data.`.

    Raises:
        ValueError: A folder is not there or holds no media, or two files of one kind share a stem.
    """

    def __init__(self, dataset: SourceSettings, split: str, without: Collection[str], option: str) -> None:
        val = "val_" if split == "val" else ""
        paths = {name: getattr(dataset, f"{val}{name}") for name in ("image_dir", "mask_dir", "control_dir")}
        roots = {name: folder(text, f"{option}{val}{name}") for name, text in paths.items() if text is not None}
        self.dataset, self.split = dataset, split
        self.beside = Beside.read(roots["image_dir"], without)
        if not self.beside.media:
            raise ValueError(
                f"{option}{val}image_dir={paths['image_dir']} holds no images ({', '.join(sorted(SUFFIXES))}) or "
                f"videos ({', '.join(sorted(VIDEO_SUFFIXES))})"
            )
        table = None if dataset.captions is None else real(as_path(dataset.captions))
        self.passed = [file for file in self.beside.passed if real(roots["image_dir"] / file.name) != table]
        self.masks = self._read_masks(roots["mask_dir"]) if "mask_dir" in roots else {}
        self.controls = self._files(roots["control_dir"], "control images") if "control_dir" in roots else {}
        self.control_numbers = _numbers(self.controls, self.beside.media)
        for name, files, pattern in (("mask_dir", self.masks, LAYER), ("control_dir", self.controls, _NUMBERED)):
            if files and not any(self._fits(key, pattern) for key in files):
                raise ValueError(
                    f"{option}{val}{name}={paths[name]}: none of its {len(files)} files ({_names(files)}) has "
                    f"the name of any of the {len(self.beside.media)} media in {paths['image_dir']} "
                    f"({_names(self.beside.media)}); files match by their path below the folder, without suffix"
                )

    def items(self, *, with_layers: bool) -> list[tuple[Item, Found]]:
        """Its media without captions, sorted by key, and the file of each.

        Raises:
            ValueError: Layers lack a number or their image, control images are numbered with a gap, or an image's
                mask is a video.
        """
        media = self.beside.media
        layers = _layers(media) if with_layers else {}
        whole = {key: found for key, found in media.items() if not self._is_layer(key, with_layers=with_layers)}
        orphans = sorted(layers.keys() - whole.keys())
        if orphans:
            raise ValueError(
                f"{layers[orphans[0]][0].path} is a layer of {orphans[0]}, which is not there; add the whole image "
                f"as {orphans[0]}.png"
            )
        return [(self._item(key, found, layers.get(key, ())), found) for key, found in sorted(whole.items())]

    def left_over(self, used: Collection[MediaPath], *, with_layers: bool) -> LeftOver:
        """What of its files is not used.

        Args:
            used: Media, masks and control images of the items of all folders.
            with_layers: Whether layers are read.
        """
        beside, media = self.beside, self.beside.media
        unused, passed = [], list(self.passed)
        for files in (beside.labels, beside.sidecars, self.masks, self.controls):
            pattern = _NUMBERED if files is self.controls else LAYER
            for key, found in files.items():
                if found.path in used:
                    continue
                inside = files is beside.labels or files is beside.sidecars
                if not self._fits(key, pattern):
                    unused.append(found.name if inside else posixpath.basename(found.name))
                    continue
                name = found.name if inside else f"{found.root.name}/{found.name}"
                passed.append(Passed(name, _LAYERS if key not in media or LAYER.fullmatch(key) else _OTHER_KIND))
        for key, found in beside.captions.items():
            if self.dataset.captions is not None:
                passed.append(Passed(found.name, "data.captions is read instead"))
            elif key not in media:
                unused.append(found.name)
            elif self._is_layer(key, with_layers=with_layers):
                passed.append(Passed(found.name, "layers have no captions"))
        layers = (found for key, found in media.items() if self._is_layer(key, with_layers=with_layers))
        passed += [Passed(found.name, _LAYERS) for found in layers if found.path not in used]
        return LeftOver(unused, passed, list(beside.doubtful))

    def _fits(self, key: str, pattern: re.Pattern[str]) -> bool:
        """Whether a mask or a control image belongs to any media, by its own name or as one of several of a pattern."""
        match = pattern.fullmatch(key)
        return key in self.beside.media or (match is not None and match[1] in self.beside.media)

    def _is_layer(self, key: str, *, with_layers: bool) -> bool:
        match, media = LAYER.fullmatch(key), self.beside.media
        return match is not None and media[key].still and (with_layers or match[1] in media)

    def _item(self, key: str, found: Found, layers: Sequence[Found]) -> Item:
        mask, kind = self._mask(key, found)
        own = tuple(self._mask(f"{key}.layer{n}", layer)[0] for n, layer in enumerate(layers))
        train = self.split == "train"
        return Item(
            key=key if train else f"@val/{key}",
            split=self.split,
            media=found.path,
            mask=mask,
            mask_kind=kind,
            caption="",
            captioned=False,
            layers=tuple(layer.path for layer in layers),
            layer_masks=own,
            controls=tuple(control.path for control in self.control_numbers.get(key, ())),
            invert=self.dataset.invert_mask,
            repeats=self.dataset.repeats if train else 1,
            alpha="alpha" in self.dataset.mask_sources,
            require_mask=self.dataset.require_mask,
        )

    def _mask(self, key: str, media: Found) -> tuple[MediaPath | None, MaskKind | None]:
        kinds = {"folder": self.masks, "masklabel": self.beside.labels, "sidecar": self.beside.sidecars}
        for kind in self.dataset.mask_sources:
            mask = kinds.get(kind, {}).get(key)
            if mask is not None:
                if media.still and not mask.still:
                    raise ValueError(
                        f"{mask.path} is a video or a folder of frames, the media that it is for is one image: "
                        f"{media.path}"
                    )
                return mask.path, kind
        return None, None

    def _read_masks(self, root: MediaPath) -> dict[str, Found]:
        """Masks by key; a folder that has a video's name and no media's folder holds its frames."""
        media = self.beside.media
        videos = {f"{key}/" for key, found in media.items() if not found.still} - self.beside.folders
        frames, files = {}, []
        for file in self._found(root):
            video = next((path for path in ancestors(file.name) if path in videos), None) if videos else None
            if video is None:
                files.append((file.key, file))
            else:
                frames[video[:-1]] = Found.folder(root, video[:-1])
        return by_key([*files, *frames.items()], "masks")

    def _files(self, root: MediaPath, what: str) -> dict[str, Found]:
        return by_key([(file.key, file) for file in self._found(root)], what)

    def _found(self, root: MediaPath) -> Iterator[Found]:
        """Images and videos below a folder; others are passed over."""
        listing = look_through(root)
        check_foreign(root, listing)
        self.passed += [Passed(f"{root.name}/{name}", reason) for name, reason in of_listing(listing)]
        for file in (Found.file(root, listed) for listed in listing.files):
            if file.suffix in MEDIA:
                yield file
            else:
                self.passed.append(unread(f"{root.name}/{file.name}"))


def _names(files: Mapping[str, Found]) -> str:
    """Names of some of the files."""
    return ", ".join(few(sorted(found.name for found in files.values()), 3))


def _layers(media: Mapping[str, Found]) -> dict[str, tuple[Found, ...]]:
    """Layers by their image's key, in order.

    Raises:
        ValueError: A number is missing, or is there twice.
    """
    found: dict[str, dict[int, Found]] = defaultdict(dict)
    for key, file in media.items():
        match = LAYER.fullmatch(key)
        if match is None or not file.still:
            continue
        number = int(match[2])
        if number in found[match[1]]:
            twin = found[match[1]][number]
            raise ValueError(f"{file.path} and {twin.path} are both layer {number}; rename one of them")
        found[match[1]][number] = file
    for key, layers in found.items():
        missing = next(n for n in range(len(layers) + 1) if n not in layers)
        if missing < len(layers):
            raise ValueError(f"{key} has layers {sorted(layers)} but no {key}.layer{missing}; number them from 0")
    return {key: tuple(layers[n] for n in sorted(layers)) for key, layers in found.items()}


def _numbers(controls: Mapping[str, Found], media: Mapping[str, Found]) -> dict[str, tuple[Found, ...]]:
    """Control images by their sample's key: `NAME`, or `NAME_0`, `NAME_1`, ...

    Raises:
        ValueError: Both forms, a video, or a gap in the numbers.
    """
    numbered: dict[str, dict[int, Found]] = defaultdict(dict)
    for key, control in controls.items():
        if not control.still:
            raise ValueError(f"{control.path} is a video; control images are images")
        match = _NUMBERED.fullmatch(key)
        if match is None or key in media:  # what has a sample's own name belongs to that sample
            continue
        number = int(match[2])
        if number in numbered[match[1]]:
            twin = numbered[match[1]][number]
            raise ValueError(f"{control.path} and {twin.path} are both number {number}; rename one of them")
        numbered[match[1]][number] = control
    found: dict[str, tuple[Found, ...]] = {}
    for key in media:
        own = numbered.get(key, {})
        if key in controls and 0 in own:
            raise ValueError(
                f"{controls[key].path} and {own[0].path} are both control images of {key}; name them _0, _1, ..."
            )
        if key in controls:
            found[key] = (controls[key],)
        elif sorted(own) != list(range(len(own))):
            raise ValueError(f"control images of {key} are numbered {sorted(own)}; number them from 0 without a gap")
        elif own:
            found[key] = tuple(own[number] for number in sorted(own))
    return found
