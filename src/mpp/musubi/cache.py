"""Caches of musubi-tuner and blissful-tuner, read as they lie: latents, masks and text without encoding again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpp.cache.format import CacheIdentity, Notes, as_conditioning
from mpp.cache.index import Entry, Index
from mpp.core.loss import MaskedPriorLoss
from mpp.models.conditioning import Conditioning, flat_tensors
from mpp.models.contract import Architecture, Identity
from mpp.musubi.formats import format_of
from mpp.musubi.headers import check_cells, describe_latents, describe_text, have
from mpp.musubi.names import MASK, LatentsName, blaming, read_contents, text_short
from mpp.wording import few

_SLACK = 1e-3  # by which masks in half precision may leave [0, 1]


class MusubiCache:
    """A folder of such files, which is only read. Constructing one touches nothing.

    Args:
        folder: The folder; folders in it are not looked at.
        architecture: The model that trains.

    Raises:
        ValueError: Caches of the architecture are not read.

    Attributes:
        format: How the model's samples are stored.
        left_out: What `entries` found in the folder and did not take, in words.
        baked: For the masks that `entries` found, how many were cached with each gamma and floor.
    """

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        self.format = format_of(architecture)
        self.folder, self.architecture = Path(folder).expanduser(), architecture
        self.left_out: tuple[str, ...] = ()
        self.baked: Counter[tuple[float, float]] = Counter()

    def latents_path(self, key: str) -> Path:
        """Where a sample's latents, mask and images lie."""
        return self.folder / f"{key}.safetensors"

    def text_path(self, name: str) -> Path:
        """Where a sample's embeddings lie.

        Raises:
            ValueError: The name is of another caption, of which such a cache has none.
        """
        if text_short(name) not in self.format.names:
            raise ValueError(
                f"{self.folder} holds each sample's own caption and no other: leave data.caption_dropout at 0 and "
                "data.preservation.replace and caption at null, or prepare a cache with `python -m mpp.prepare`"
            )
        return self.folder / f"{name}.safetensors"

    def identity(self) -> CacheIdentity:
        """What such files say of how they were made: the architecture, and no fingerprints.

        Raises:
            ValueError: The folder holds no latents of the architecture.
        """
        self._choose(self._stems())
        return CacheIdentity.of(self.architecture, Identity(None, None, None))

    def entries(self) -> Index:
        """All samples, from the headers of all files.

        Raises:
            ValueError: Names the file: it is missing, damaged or of another architecture, its shapes disagree with
                its name, its mask or the model, it lacks what the model sees, or holds what the model knows nothing of.
        """
        stems = self._stems()
        short = self._choose(stems)
        names = [name for stem in stems if (name := LatentsName.read(stem)) is not None and name.short == short]
        self._check_items(names)
        texts = {stem for stem in stems if text_short(stem) == short}
        captions: dict[str, str] = {}
        widths: dict[str, tuple[int, str]] = {}
        entries, baked = [], Counter()
        for name in names:
            stem = self._text_of(name, texts)
            if stem not in captions:
                text = describe_text(self.text_path(stem), short, self.format)
                self._check_widths(stem, text.widths, widths)
                captions[stem] = text.caption
            sample = describe_latents(self.latents_path(name.stem), name, self.format, self.architecture.latents)
            self._check_widths(name.stem, {f: s[1] for f, s in sample.images.items() if len(s) == 2}, widths)
            if sample.baked is not None:
                baked[sample.baked] += 1
            video = name.window[0] if stem != f"{name.item}_{short}_te" else ""
            entries.append(
                Entry(
                    key=name.stem,
                    split="train",
                    shape=sample.shape,
                    text=stem,
                    caption=captions[stem],
                    mask=None if sample.baked is None else "cache",
                    images=sample.images,
                    source=video,
                )
            )
        self.baked, self.left_out = baked, self._left_out(stems, short, texts - captions.keys())
        return Index.of(entries)

    def latents(self, entry: Entry) -> Tensor:
        """A sample's latents `(c, f, h, w)` in our normalisation, float32.

        Raises:
            ValueError: The file is missing, damaged, of another shape than its header was, or not finite.
        """
        path = self.latents_path(entry.key)
        contents = read_contents(path, "latents")
        with blaming(path):
            latents = self.format.latents(have(contents, "latents"))
            if tuple(latents.shape) != entry.shape:
                raise ValueError(f"holds latents of shape {tuple(latents.shape)} and held {entry.shape}")
        return latents

    def mask(self, entry: Entry) -> Tensor:
        """A sample's mask `(1, f, h, w)` in float32; all ones without one.

        Raises:
            ValueError: The file is missing or damaged, or the mask disagrees with the latents or leaves [0, 1].
        """
        shape = (1, *entry.shape[1:])
        if entry.mask is None:
            return torch.ones(shape)
        path = self.latents_path(entry.key)
        contents = read_contents(path, MASK)
        with blaming(path):
            mask = have(contents, MASK).float()
            check_cells(mask, entry.shape)
            low, high = mask.aminmax()
            if low < -_SLACK or high > 1 + _SLACK:
                raise ValueError(f"holds a mask from {float(low):.4g} to {float(high):.4g}, wanted is 0 to 1")
        return mask.reshape(shape).clamp(0, 1)

    def conditioning(self, entry: Entry, record: type[Conditioning]) -> Conditioning:
        """A sample's text and image conditioning as the family's record.

        Raises:
            ValueError: A file is missing, damaged, or lacks what the model sees.
        """
        path = self.text_path(entry.text)
        contents = read_contents(path, "|".join(self.format.text_axes))
        with blaming(path):
            for name in self.format.text_axes:
                have(contents, name)
            tensors = self.format.text_fields(contents)
        if entry.images:
            path = self.latents_path(entry.key)
            contents = read_contents(path, f"latents|{self.format.reads}")
            with blaming(path):
                contents["latents"] = self.format.latents(have(contents, "latents"))
                tensors |= flat_tensors(self.format.images(contents))
        return as_conditioning(tensors, record, path)

    def latents_made_from(self, entry: Entry) -> None:
        """Such files do not say it."""

    def mask_made_from(self, entry: Entry) -> None:
        """Such files do not say it."""

    def notes(self) -> Notes:
        """Such files say nothing of their sources."""
        return Notes()

    def has_text(self, name: str) -> bool:
        """Whether embeddings of that name are there.

        Raises:
            ValueError: The name is of another caption than a sample's own.
        """
        return self.text_path(name).is_file()

    def prompt(self, name: str, model: Architecture) -> None:
        """Such a cache has no prompts for generations."""

    def preview(self, key: str, suffix: str = "") -> None:
        """Such a cache has no previews."""

    def check_some(self, entries: Sequence[Entry]) -> None:
        """Nothing more: `entries` has looked at every header."""

    def check_files(self, entry: Entry) -> None:
        """Refuse a sample whose files are not what they were.

        Raises:
            ValueError: As `entries` raises, or a file has changed.
        """
        path, name = self.latents_path(entry.key), LatentsName.read(entry.key)
        if name is None:
            raise ValueError(f"{path} is no name of a latents file")
        describe_text(self.text_path(entry.text), name.short, self.format)
        found = describe_latents(path, name, self.format, self.architecture.latents)
        if (found.shape, found.images) != (entry.shape, entry.images) or (entry.mask and found.baked is None):
            raise ValueError(f"{path} has changed since this run looked at it; start again")

    def advice(self, loss: MaskedPriorLoss) -> list[str]:
        """Warnings: what `entries` left out, and a gamma or floor that the masks were cached with already.

        Args:
            loss: What the masks will be used with.
        """
        return [*self.left_out, *baked_advice(self.baked, loss)]

    def _stems(self) -> list[str]:
        """Names without suffix, sorted."""
        if not self.folder.is_dir():
            raise ValueError(f"data.cache_dir={self.folder} is no folder")
        return sorted(path.stem for path in self.folder.iterdir() if path.suffix == ".safetensors")

    def _choose(self, stems: Sequence[str]) -> str:
        """The one short name of the model's architecture that the folder has latents of."""
        shorts = Counter(name.short for stem in stems if (name := LatentsName.read(stem)) is not None)
        wanted = [short for short in self.format.names if short in shorts]
        if len(wanted) == 1:
            return wanted[0]
        model = self.architecture.family
        if wanted:
            held = {name.short: stem for stem in stems if (name := LatentsName.read(stem)) is not None}
            both = " and ".join(f"{short} ({held[short]}.safetensors)" for short in wanted)
            raise ValueError(f"{self.folder} holds latents of {both}, different sizes of {model}; give each a folder")
        if (self.folder / "cache.json").is_file():
            raise ValueError(f"{self.folder} is a cache of `python -m mpp.prepare`; choose data.layout=mpp")
        held = ", ".join(f"{short} ({count})" for short, count in sorted(shorts.items()))
        holds = f"its latents files are of {held}" if held else "it has no latents files"
        names = " or ".join(f"NAME_WIDTHxHEIGHT_{short}.safetensors" for short in self.format.names)
        raise ValueError(f"{self.folder} holds no latents of {model}, which are called {names}: {holds}")

    def _check_items(self, names: Sequence[LatentsName]) -> None:
        """Refuse two latents of one item: one is left over from an original that was replaced."""
        seen: dict[str, str] = {}
        for name in names:
            other = seen.setdefault(name.item, name.stem)
            if other != name.stem:
                raise ValueError(
                    f"{self.latents_path(name.stem)} and {other}.safetensors are latents of one item at two original "
                    "sizes; delete the one that is left over"
                )

    def _check_widths(self, stem: str, found: Mapping[str, int], widths: dict[str, tuple[int, str]]) -> None:
        """Refuse embeddings of another width than those before: they are another encoder's."""
        for name, width in found.items():
            known, first = widths.setdefault(name, (width, stem))
            if width != known:
                raise ValueError(
                    f"{self.folder / stem}.safetensors holds {name} {width} wide and {first}.safetensors {known}; keep "
                    "what one encoder made in a folder"
                )

    def _text_of(self, name: LatentsName, texts: set[str]) -> str:
        """Stem of the text file: that of the item, or of the video it was cut from."""
        items = [name.item, name.window[0]] if name.window else [name.item]
        stems = [f"{item}_{name.short}_te" for item in items]
        for stem in stems:
            if stem in texts:
                return stem
        raise ValueError(
            f"{self.latents_path(name.stem)} has no text file {' or '.join(f'{stem}.safetensors' for stem in stems)} "
            "beside it; cache the outputs of the text encoder, or delete it"
        )

    def _left_out(self, stems: Sequence[str], short: str, texts: set[str]) -> tuple[str, ...]:
        """What the folder holds besides, in words."""
        names = {stem: name for stem in stems if (name := LatentsName.read(stem)) is not None}
        others = Counter(name.short for name in names.values() if name.short != short)
        lines = [f"{count} latents files of the architecture {other}" for other, count in sorted(others.items())]
        if texts:
            lines.append(f"{', '.join(few(sorted(texts)))}: text without latents")
        strange = [stem for stem in stems if stem not in names and text_short(stem) is None]
        if strange:
            lines.append(f"{', '.join(few(sorted(strange)))}: not named as files of a cache")
        return tuple(f"{self.folder}: left out {line}" for line in lines)


def baked_advice(baked: Mapping[tuple[float, float], int], loss: MaskedPriorLoss) -> list[str]:
    """Warnings about masks that were cached with a gamma or a floor already.

    Args:
        baked: How many masks were cached with each gamma and floor.
        loss: What they will be used with.
    """
    lines = []
    if len(baked) > 1:
        kinds = ", ".join(f"gamma {g:g} and floor {f:g} ({n} samples)" for (g, f), n in sorted(baked.items()))
        lines.append(f"masks were cached in different ways: {kinds}; cache them all alike")
    gammas, floors = ({pair[n] for pair in baked} for n in (0, 1))
    twice = max(gammas - {1.0}, default=None)
    if twice is not None and loss.mask_gamma != 1:
        lines.append(
            f"masks were cached with gamma {twice:g}, and loss.mask_gamma={loss.mask_gamma:g} applies a second one, "
            f"{twice * loss.mask_gamma:g} in all; set loss.mask_gamma=1"
        )
    floor, threshold = max(floors, default=0.0), loss.prior_threshold
    if floor > 0 and loss.mask_min_weight > 0:
        lines.append(
            f"masks were cached with a floor of {floor:g}, and loss.mask_min_weight={loss.mask_min_weight:g} applies a "
            "second one; set loss.mask_min_weight=0"
        )
    if floor > 0 and loss.prior_weight > 0 and threshold is None:
        lines.append(
            f"masks were cached with a floor of {floor:g}: outside the subject it is learned, and the prior has only "
            f"{1 - floor:g} of its weight; cache the masks without one"
        )
    elif loss.prior_weight > 0 and threshold is not None and 0 < threshold <= floor:
        lines.append(
            f"masks were cached with a floor of {floor:g}, so none of their cells is below "
            f"loss.prior_threshold={threshold:g}: the prior region is empty; raise the threshold above the floor, or "
            "cache the masks without one"
        )
    return lines
