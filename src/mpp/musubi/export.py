"""A finished cache written as musubi-tuner's and blissful-tuner's files, masks in blissful-tuner's keys."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpp.cache.format import Cache, CacheIdentity, made_from
from mpp.cache.index import Entry
from mpp.cache.provenance import LatentsProvenance
from mpp.files import write_atomically
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Architecture
from mpp.musubi.contents import MusubiFormat
from mpp.musubi.formats import format_of
from mpp.musubi.names import MASK, LatentsName

_UNSAFE = re.compile(r'[\x00-\x1f%/\\:*?"<>|]')  # in names on some file system, and the sign that stands for them
_LONGEST = 255  # bytes of a name


@dataclass(frozen=True)
class MusubiSummary:
    """What was written.

    Attributes:
        folders: Number of samples by folder.
        short: Short name of the architecture in file names.
        masks: Number of samples with a mask.
        notes: What musubi-tuner's files cannot hold, in words.
    """

    folders: dict[Path, int]
    short: str
    masks: int
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The summary in words."""
        total = sum(self.folders.values())
        written = [
            f"{folder}: {count} samples of the architecture {self.short}" for folder, count in self.folders.items()
        ]
        return [*written, f"masks: {self.masks} of {total}", *self.notes]


@dataclass(frozen=True)
class _Job:
    """One sample to write."""

    entry: Entry
    folder: Path
    item: str
    size: tuple[int, int]
    frames: int | None

    def latents_path(self, short: str) -> Path:
        clip = "" if self.frames is None else f"_00000-{self.frames:03d}"
        return self.folder / f"{self.item}{clip}_{self.size[0]:04d}x{self.size[1]:04d}_{short}.safetensors"

    def text_path(self, short: str) -> Path:
        return self.folder / f"{self.item}_{short}_te.safetensors"


def export_musubi(cache: Cache, architecture: Architecture, folder: str | Path) -> MusubiSummary:
    """Write every sample of a finished cache as a latents and a text file.

    A sample is called by its key, in which characters that a file name cannot have are written as `%2F` and so on.
    Clips are `KEY_00000-FRAMES`. Where a cache has both images and clips they go into folders of their own,
    `images` and `videos`, because musubi-tuner's datasets are of one kind; validation samples go into `val`.

    Args:
        cache: The cache; it must be the architecture's.
        architecture: Whose samples it holds.
        folder: Where the files go. What an earlier export of the same samples wrote is replaced.

    Raises:
        ValueError: The architecture's are not written, the cache is another model's, empty or damaged, its samples
            cannot be named, or the folder holds latents of others, which musubi-tuner would train on too.
        OSError: The folder cannot be written.
    """
    form, folder = format_of(architecture), Path(folder).expanduser()
    cache.identity().check(CacheIdentity.of(architecture, architecture.identity()), cache.folder)
    entries = list(cache.entries())
    if not entries:
        raise ValueError(f"the cache {cache.folder} has no samples")
    short = _short(form, cache, entries[0], architecture)
    jobs = _plan(cache, architecture, entries, folder)
    _check_folders(jobs, short)
    for job in jobs:
        _write(cache, architecture, form, job, short)
    folders: dict[Path, int] = {}
    for job in jobs:
        folders[job.folder] = folders.get(job.folder, 0) + 1
    masks = sum(entry.mask is not None for entry in entries)
    return MusubiSummary(folders, short, masks, tuple(_notes(entries)))


def _short(form: MusubiFormat, cache: Cache, entry: Entry, model: Architecture) -> str:
    """The short name to write under; where there are several, the width of the text tells which."""
    if len(form.names) == 1:
        return next(iter(form.names))
    (field, *_) = form.text
    width = getattr(cache.conditioning(entry, model.conditioning), field).shape[-1]
    found = [name for name in form.names if form.widths.get(name) == width]
    if not found:
        widths = " or ".join(f"{form.widths[name]} ({name})" for name in form.names if name in form.widths)
        raise ValueError(
            f"export=musubi: the cached text is {width} wide, and musubi-tuner knows {model.family} with {widths}; "
            "prepare with the published text encoder"
        )
    return found[0]


def _plan(cache: Cache, model: Architecture, entries: list[Entry], folder: Path) -> list[_Job]:
    """A place for every sample.

    Raises:
        ValueError: A latents file is damaged, or a name too long.
    """
    spec = model.latents
    clips = [spec.frames.plays(entry.shape[1]) for entry in entries]
    mixed = len(set(clips)) > 1
    jobs = []
    for entry, clip in zip(entries, clips, strict=True):
        made = made_from(cache.latents_path(entry.key), LatentsProvenance)
        if made is None:
            raise ValueError(
                f"{cache.latents_path(entry.key)} is missing or damaged; run `python -m mpp.prepare` again"
            )
        width, height = made.geometry[:2]
        target = folder / "val" if entry.split == "val" else folder
        if mixed:
            target /= "videos" if clip else "images"
        item = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", entry.key)
        frames = (entry.shape[1] - 1) * spec.temporal_stride + 1 if clip else None
        job = _Job(entry, target, item, (width, height), frames)
        if len(job.latents_path("x" * 8).name.encode()) > _LONGEST:
            raise ValueError(f"{entry.key} makes a file name of more than {_LONGEST} bytes; give it a shorter name")
        jobs.append(job)
    return jobs


def _check_folders(jobs: list[_Job], short: str) -> None:
    """Refuse folders with latents that are not written here.

    Raises:
        ValueError: Names one of them.
    """
    ours = {job.latents_path(short) for job in jobs}
    for folder in sorted({job.folder for job in jobs}):
        for path in sorted(folder.glob(f"*_{short}.safetensors")):
            if path not in ours and LatentsName.read(path.stem) is not None:
                raise ValueError(
                    f"{path} is there already and is no sample of this cache, so musubi-tuner would train on it too; "
                    "delete it or choose an empty folder"
                )


def _write(cache: Cache, model: Architecture, form: MusubiFormat, job: _Job, short: str) -> None:
    """A sample's text, then its latents: musubi-tuner looks for latents, so a sample is there whole or not at all.

    Raises:
        ValueError: A file of the cache is damaged, or a text is longer than musubi-tuner takes.
    """
    entry = job.entry
    latents, record = cache.latents(entry), cache.conditioning(entry, model.conditioning)
    stated = {"architecture": form.names[short][0], "format_version": "1.0.1"}
    try:
        text = form.text_contents(record)
    except ValueError as error:
        raise ValueError(f"{entry.key} {error}") from error
    _save(job.text_path(short), _text_keys(form, text), {**stated, "caption1": entry.caption})
    tensors = _latents_keys(form, latents, record)
    if entry.mask is not None:
        mask = cache.mask(entry)
        tensors[f"{MASK}_{_sizes(mask, form.sizes)}_float16"] = mask.half()
    size = {"width": str(job.size[0]), "height": str(job.size[1])}
    clip = {} if job.frames is None else {"frame_count": str(job.frames)}
    plain = {"cache_mask_gamma": "1", "cache_mask_min_weight": "0"}
    _save(job.latents_path(short), tensors, {**stated, **size, **clip, **plain})


def _latents_keys(form: MusubiFormat, latents: Tensor, record: Conditioning) -> dict[str, Tensor]:
    """Latents and what stands beside them, by key."""
    contents = {"latents": form.stored(latents), **form.contents(record, latents)}
    keys = {}
    for name, tensor in contents.items():
        sizes = f"_{_sizes(tensor, form.sizes)}" if name.startswith("latents") else ""
        keys[f"{name}{sizes}_{_dtype(tensor)}"] = tensor
    return keys


def _text_keys(form: MusubiFormat, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text by key."""
    start = "varlen_" if form.varlen else ""
    return {
        name if name.endswith("_mask") else f"{start}{name}_{_dtype(tensor)}": tensor
        for name, tensor in contents.items()
    }


def _sizes(tensor: Tensor, count: int) -> str:
    """The last sizes of latents; those without an axis of frames have one frame."""
    frames = 1 if tensor.ndim == 3 else tensor.shape[1]
    return "x".join(map(str, (frames, *tensor.shape[-2:])[-count:]))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    owned = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(owned, temporary, metadata=metadata))


def _notes(entries: list[Entry]) -> list[str]:
    """What the files cannot hold."""
    notes = []
    repeated = sum(entry.repeats > 1 for entry in entries)
    if repeated:
        notes.append(
            f"{repeated} samples repeat, which the files do not say: set num_repeats in musubi-tuner's dataset"
        )
    varied = sum(bool(entry.variants) for entry in entries)
    if varied:
        notes.append(f"{varied} samples have several captions, of which the files hold the first")
    return notes
