"""From a folder of pictures to a cache: checks first, then text, latents, masks, and the index last."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from mpp.data.cache import Cache, Manifest, made_from, text_name, write_tensors
from mpp.data.frames import (
    check_controls,
    check_masks,
    frame_files,
    mask_files,
    read_controls,
    read_frames,
    read_mask_frames,
    transparent,
)
from mpp.data.index import Entry
from mpp.data.media import Buckets, Geometry, crop_picture, picture_size, read_picture
from mpp.data.prompts import Prompts
from mpp.data.source import FolderSource, Item
from mpp.files import content_hash, is_out_of_space, write_atomically
from mpp.models.base import Architecture, Encoders, Identity, Prompt, flat_tensors

_PREVIEW_SIDE = 512
_TEXT_BATCH = 16
_SHOWN = 20


@dataclass
class Summary:
    """What a preparation did, counted per picture."""

    encoded: int = 0
    current: int = 0
    masks_written: int = 0
    masks_current: int = 0
    masks: Counter[str] = field(default_factory=Counter)
    texts_encoded: int = 0
    texts_current: int = 0
    no_caption: int = 0
    enlarged: int = 0
    validation: int = 0
    prompts: int = 0
    skipped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The summary in words."""
        with_mask = sum(n for kind, n in self.masks.items() if kind != "none")
        kinds = ", ".join(f"{n} from {kind}" for kind, n in sorted(self.masks.items()) if kind != "none")
        total = self.encoded + self.current
        found = [
            f"pictures: {total} ({self.encoded} encoded, {self.current} already current, {self.validation} for "
            f"validation), {len(self.skipped)} skipped",
            f"masks: {with_mask} of {total}{f' ({kinds})' if kinds else ''}, {self.masks_written} written, "
            f"{self.masks_current} already current; {total - with_mask} pictures train everywhere",
            f"captions: {self.texts_encoded + self.texts_current} distinct ({self.texts_encoded} encoded, "
            f"{self.texts_current} already current), {self.no_caption} pictures without one (empty caption)",
            "buckets: " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(self.buckets.items())),
            f"time: {self.seconds:.1f} s",
        ]
        if self.prompts:
            found.insert(3, f"prompts for samples: {self.prompts}")
        if self.enlarged:
            found.insert(1, f"enlarged: {self.enlarged} pictures are smaller than their bucket")
        found += [f"skipped: {reason}" for reason in self.skipped]
        if self.unused:
            found.append(f"masks or control pictures without a picture: {', '.join(self.unused[:_SHOWN])}")
        return found


@dataclass(frozen=True)
class _Job:
    """One cache sample to make sure of."""

    key: str
    item: Item
    geometry: Geometry
    shape: tuple[int, int, int, int]
    mask_kind: str | None
    latents_current: bool
    mask_current: bool
    has_alpha: bool
    pictures: dict[str, tuple[int, ...]]
    seen: tuple[str, ...]


class Preparation:
    """Brings a cache up to date with a folder; what is current is left alone, so it resumes where it stopped.

    Args:
        source: Pictures, masks, captions.
        architecture: Whose latents and text are cached.
        device: Where the encoders run.
        prompts: What will be painted during training, encoded as well; None: nothing.
    """

    def __init__(
        self,
        source: FolderSource,
        architecture: Architecture,
        device: torch.device | str,
        prompts: Prompts | None = None,
    ) -> None:
        self.source = source
        self.architecture = architecture
        self.device = device
        self.prompts = prompts or Prompts()
        self.cache = Cache(source.cache_dir)
        self.summary = Summary()

    def run(self) -> Summary:
        """Check everything, then encode what is not current, then write the index.

        Raises:
            ValueError: Bad input (see `FolderSource`), or a cache of another model; nothing has been encoded yet.
            OSError: The cache cannot be written.
        """
        start = time.monotonic()
        self.prompts.check(self.architecture)
        self._check_frames()
        items = self.source.items(layered=self.architecture.latents.layered)
        identity = self.architecture.identity(fetch=True)
        self._claim(identity)
        jobs = self._plan(items, identity)
        self.source.preservation.check([item.caption for item in items if item.split == "train"])
        self._count(items, jobs)
        encoders = self.architecture.load_encoders(self.device)
        self._encode_text(jobs, encoders)
        jobs = self._encode_latents(jobs, encoders, identity)
        self._write_masks(jobs)
        self.cache.write_index([_entry(job) for job in jobs])
        self.summary.prompts = self.prompts.encode(self.architecture, encoders, self.cache, identity)
        encoders.release()
        self.summary.seconds = time.monotonic() - start
        return self.summary

    def _check_frames(self) -> None:
        """Pictures have one latent frame, which is no task for a model that sees the first."""
        if self.architecture.least_frames > 1 and not self.architecture.latents.layered:
            raise ValueError(
                f"this model sees the first frame and learns from clips of at least {self.architecture.least_frames} "
                "latent frames; pictures hold nothing for it to learn: choose a model that starts from text"
            )

    def _claim(self, identity: Identity) -> None:
        """Record the model in a new cache, or refuse one that belongs to another."""
        model = self.architecture
        if (self.cache.folder / "cache.json").exists():
            self.cache.manifest().check(Manifest.of(model, identity), self.cache.folder)
        else:
            self.cache.write_manifest(Manifest.of(model, identity))

    def _plan(self, items: Sequence[Item], identity: Identity) -> list[_Job]:
        """Jobs for all usable pictures; decodes those that are not current, so that errors come before encoding."""
        step = self.architecture.latents.pixel_step
        buckets = Buckets(self.source.resolution, step, self.source.max_aspect)
        jobs, problems = [], []
        for item in tqdm(items, desc="checking", unit="picture", disable=None):
            try:
                jobs += self._jobs(item, buckets, identity)
            except ValueError as error:
                problems.append(str(error))
        if problems and self.source.on_error == "stop":
            more = f"\n(and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            raise ValueError("\n".join(problems[:_SHOWN]) + more + "\n(data.on_error=skip leaves such pictures out)")
        self.summary.skipped += problems
        if not jobs:
            raise ValueError(f"none of {len(items)} pictures could be used; first problem: {problems[0]}")
        return jobs

    def _jobs(self, item: Item, buckets: Buckets, identity: Identity) -> list[_Job]:
        spec, inputs = self.architecture.latents, self.architecture.pictures
        check_controls(item, inputs)
        files = frame_files(item, spec)
        size = picture_size(item.media)
        flips = [False, True] if self.source.flip and item.split == "train" else [False]
        geometries = {flip: Geometry(size, buckets.choose(*size), flip) for flip in flips}
        current = {flip: self._latents_current(item, files, g, identity) for flip, g in geometries.items()}
        known = next((record for record in current.values() if record), None)
        if all(current.values()) and known:
            has_alpha = bool(known["alpha"])
        else:
            has_alpha = transparent(read_picture(item.media))
            for path in (*files[1:], *item.controls):
                read_picture(path)
        kind = self._mask_kind(item, has_alpha=has_alpha)
        jobs = []
        for flip, geometry in geometries.items():
            key = f"{item.key}@flip" if flip else item.key
            shape = spec.shape(len(files), geometry.size[1], geometry.size[0])
            mask_current = kind is not None and self._mask_current(key, item, geometry, kind, shape)
            if not mask_current:
                check_masks(item, spec)
            record = current[flip]
            pictures = {n: tuple(s) for n, s in record["pictures"].items()} if record else {}
            seen = self._seen(item, geometry)
            jobs.append(_Job(key, item, geometry, shape, kind, bool(record), mask_current, has_alpha, pictures, seen))
        return jobs

    def _mask_kind(self, item: Item, *, has_alpha: bool) -> str | None:
        kind, layered = item.mask_kind, self.architecture.latents.layered
        if kind is None and layered and any(item.layer_masks):
            kind = "folder"
        if kind is None and has_alpha and "alpha" in self.source.mask_sources and not layered:
            kind = "alpha"
        if kind is None and self.source.require_mask:
            raise ValueError(f"{item.media}: no mask, and data.require_mask=true; add one or drop the picture")
        return kind

    def _seen(self, item: Item, geometry: Geometry) -> tuple[str, ...]:
        """Identities of the pictures that the text encoder sees, () where it sees none."""
        inputs = self.architecture.pictures
        if not inputs.in_text:
            return ()
        if inputs.first_frame:
            return (f"{content_hash(item.media)} {_geometry(geometry)}",)
        return tuple(f"{content_hash(path)} {_geometry(geometry)}" for path in item.controls)

    def _latents_current(
        self, item: Item, files: Sequence[Path], geometry: Geometry, identity: Identity
    ) -> dict[str, Any] | None:
        key = f"{item.key}@flip" if geometry.flip else item.key
        record = made_from(self.cache.latents_path(key))
        if record is None or not self.cache.preview_path(key).is_file():
            return None
        if record["pictures"] and made_from(self.cache.pictures_path(key)) != record:
            return None
        same = record["geometry"] == _geometry(geometry) and record["vae"] == identity.vae
        return record if same and _unchanged((*files, *item.controls), record) else None

    def _mask_current(self, key: str, item: Item, geometry: Geometry, kind: str, shape: Sequence[int]) -> bool:
        record = made_from(self.cache.mask_path(key))
        made = {"geometry": _geometry(geometry), "kind": kind, "shape": list(shape[1:])}
        if record is None or any(record[name] != value for name, value in made.items()):
            return False
        return _unchanged(self._mask_files(item), record)

    def _mask_files(self, item: Item) -> tuple[Path, ...]:
        return mask_files(item, self.architecture.latents) or (item.media,)

    def _count(self, items: Sequence[Item], jobs: Sequence[_Job]) -> None:
        summary = self.summary
        used = {job.item.key for job in jobs}
        summary.no_caption = sum(not item.captioned for item in items if item.key in used)
        summary.unused = self.source.unused(items)
        for job in jobs:
            summary.masks[job.mask_kind or "none"] += 1
            summary.buckets[job.geometry.size] += 1
            summary.enlarged += job.geometry.scale > 1
            summary.validation += job.item.split == "val"

    def _encode_text(self, jobs: Sequence[_Job], encoders: Encoders) -> None:
        wanted: dict[str, tuple[str, _Job]] = {}
        for job in jobs:
            others = self.source.preservation.of(job.item.caption) if job.item.split == "train" else []
            for caption in (job.item.caption, *others):
                wanted.setdefault(text_name(caption, job.seen), (caption, job))
        missing = [
            (name, caption, job)
            for name, (caption, job) in sorted(wanted.items(), key=lambda row: row[1][0])
            if made_from(self.cache.text_path(name)) is None
        ]
        self.summary.texts_encoded, self.summary.texts_current = len(missing), len(wanted) - len(missing)
        with tqdm(total=len(missing), desc="captions", unit="caption", disable=None) as bar:
            for start in range(0, len(missing), _TEXT_BATCH):
                batch = missing[start : start + _TEXT_BATCH]
                prompts = [Prompt(caption, self._text_pictures(job)) for _, caption, job in batch]
                for (name, caption, job), record in zip(batch, encoders.encode_text(prompts), strict=True):
                    made = {"caption": caption, "seen": job.seen}
                    write_tensors(self.cache.text_path(name), record.tensors(), made)
                bar.update(len(batch))
        encoders.release()

    def _text_pictures(self, job: _Job) -> tuple[Image.Image, ...]:
        if not job.seen:
            return ()
        if self.architecture.pictures.first_frame:
            return (crop_picture(read_picture(job.item.media).rgb, job.geometry),)
        return tuple(read_controls(job.item, job.geometry))

    def _encode_latents(self, jobs: Sequence[_Job], encoders: Encoders, identity: Identity) -> list[_Job]:
        """Encode stale pictures; returns the jobs that have latents now."""
        stale = [job for job in jobs if not job.latents_current]
        done: dict[str, _Job | None] = {}
        for job in tqdm(stale, desc="pictures", unit="picture", disable=None):
            try:
                done[job.key] = self._encode(job, encoders, identity)
            except (ValueError, OSError) as error:
                if self.source.on_error == "stop" or is_out_of_space(error):
                    raise
                done[job.key] = None
                self.summary.skipped.append(str(error))
        kept = [found for job in jobs if (found := done.get(job.key, job)) is not None]
        self.summary.encoded = sum(found is not None for found in done.values())
        self.summary.current = len(kept) - self.summary.encoded
        return kept

    def _encode(self, job: _Job, encoders: Encoders, identity: Identity) -> _Job:
        """Write previews, picture conditioning, and last the latents, whose record vouches for the others."""
        spec = self.architecture.latents
        files = frame_files(job.item, spec)
        before = [_stamp(path) for path in (*files, *job.item.controls)]
        pixels, images = read_frames(files, job.geometry, layered=spec.layered)
        latents = encoders.encode_pixels(pixels[None])[0]
        if not torch.isfinite(latents).all():
            raise ValueError(f"{job.item.media}: the VAE gave NaN or infinite latents; use model.vae_dtype=float32")
        if tuple(latents.shape) != job.shape:
            raise ValueError(f"{job.item.media}: latents are {tuple(latents.shape)}, expected {job.shape}")
        controls = read_controls(job.item, job.geometry)
        try:
            fields = flat_tensors(encoders.encode_pictures(pixels[None], controls))
        except ValueError as error:
            raise ValueError(f"{job.item.media}: its conditioning pictures: {error}") from error
        for number, image in enumerate(images):
            self._write_preview(self.cache.preview_path(job.key, number - 1 if number else None), image)
        shapes = {name: tuple(tensor.shape) for name, tensor in fields.items()}
        record = {
            "sources": [stamp | {"content": content_hash(Path(stamp["source"]))} for stamp in before],
            "geometry": _geometry(job.geometry),
            "vae": identity.vae,
            "alpha": job.has_alpha,
            "pictures": shapes,
        }
        if fields:
            write_tensors(self.cache.pictures_path(job.key), fields, record)
        write_tensors(self.cache.latents_path(job.key), {"latents": latents}, record)
        return replace(job, pictures=shapes)

    @staticmethod
    def _write_preview(path: Path, image: Image.Image) -> None:
        image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        write_atomically(path, lambda temporary: image.save(temporary, "JPEG", quality=90))

    def _write_masks(self, jobs: Sequence[_Job]) -> None:
        masked = [job for job in jobs if job.mask_kind is not None]
        stale = [job for job in masked if not job.mask_current]
        self.summary.masks_written, self.summary.masks_current = len(stale), len(masked) - len(stale)
        for job in tqdm(stale, desc="masks", unit="mask", disable=None):
            files = self._mask_files(job.item)
            record = {
                "sources": [_stamp(path) | {"content": content_hash(path)} for path in files],
                "geometry": _geometry(job.geometry),
                "kind": job.mask_kind,
                "shape": list(job.shape[1:]),
            }
            mask = read_mask_frames(job.item, job.geometry, job.shape, self.architecture.latents)
            write_tensors(self.cache.mask_path(job.key), {"mask": mask}, record)


def _geometry(geometry: Geometry) -> list[object]:
    return [*geometry.source, *geometry.size, geometry.flip]


def _stamp(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "source": str(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,  # files of one size and time may trade names
    }


def _unchanged(paths: Sequence[Path], record: dict[str, Any]) -> bool:
    """Whether files are what a cache file was made from: by size and time, or else by content."""
    known = record["sources"]
    return len(known) == len(paths) and all(_same(path, was) for path, was in zip(paths, known, strict=True))


def _same(path: Path, was: dict[str, Any]) -> bool:
    stamp = _stamp(path)
    if stamp["bytes"] != was["bytes"]:
        return False
    return all(stamp[name] == was[name] for name in stamp) or content_hash(path) == was["content"]


def _entry(job: _Job) -> Entry:
    return Entry(
        key=job.key,
        split=job.item.split,
        shape=job.shape,
        text=text_name(job.item.caption, job.seen),
        caption=job.item.caption,
        mask=job.mask_kind,
        flip=job.geometry.flip,
        pictures=job.pictures,
        seen=job.seen,
    )
