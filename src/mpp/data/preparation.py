"""From a folder of pictures to a cache: checks first, then text, latents, masks, and the index last."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mpp.data.cache import Cache, Entry, Manifest, made_from, text_name, write_tensors
from mpp.data.media import (
    Buckets,
    Geometry,
    Picture,
    check_aspect,
    crop_picture,
    latent_mask,
    picture_size,
    picture_tensor,
    read_mask,
    read_picture,
)
from mpp.data.source import FolderSource, Item
from mpp.files import content_hash, is_out_of_space, write_atomically
from mpp.models.base import Architecture, Encoders, Identity

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
    skipped: list[str] = field(default_factory=list)
    unused_masks: list[str] = field(default_factory=list)
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
        if self.enlarged:
            found.insert(1, f"enlarged: {self.enlarged} pictures are smaller than their bucket")
        found += [f"skipped: {reason}" for reason in self.skipped]
        if self.unused_masks:
            found.append(f"masks without a picture: {', '.join(self.unused_masks[:_SHOWN])}")
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


class Preparation:
    """Brings a cache up to date with a folder; what is current is left alone, so it resumes where it stopped.

    Args:
        source: Pictures, masks, captions.
        architecture: Whose latents and text are cached.
        device: Where the encoders run.
    """

    def __init__(self, source: FolderSource, architecture: Architecture, device: torch.device | str) -> None:
        self.source = source
        self.architecture = architecture
        self.device = device
        self.cache = Cache(source.cache_dir)
        self.summary = Summary()

    def run(self) -> Summary:
        """Check everything, then encode what is not current, then write the index.

        Raises:
            ValueError: Bad input (see `FolderSource`), or a cache of another model; nothing has been encoded yet.
            OSError: The cache cannot be written.
        """
        start = time.monotonic()
        items = self.source.items()
        identity = self.architecture.identity(fetch=True)
        self._claim(identity)
        jobs = self._plan(items, identity)
        self.source.preservation.check([item.caption for item in items if item.split == "train"])
        self._count(items, jobs)
        encoders = self.architecture.load_encoders(self.device)
        self._encode_text(jobs, encoders)
        jobs = self._encode_latents(jobs, encoders, identity)
        encoders.release()
        self._write_masks(jobs)
        self.cache.write_index([_entry(job) for job in jobs])
        self.summary.seconds = time.monotonic() - start
        return self.summary

    def _claim(self, identity: Identity) -> None:
        """Record the model in a new cache, or refuse one that belongs to another."""
        model = self.architecture
        if (self.cache.folder / "cache.json").exists():
            self.cache.manifest().check(model.family, model.latents, identity, self.cache.folder)
        else:
            self.cache.write_manifest(Manifest(model.family, model.latents, identity.vae, identity.text_encoder))

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
        size = picture_size(item.picture)
        flips = [False, True] if self.source.flip and item.split == "train" else [False]
        geometries = {flip: Geometry(size, buckets.choose(*size), flip) for flip in flips}
        current = {flip: self._latents_current(item, g, identity) for flip, g in geometries.items()}
        known = next((record for record in current.values() if record), None)
        if all(current.values()) and known:
            has_alpha = bool(known["alpha"])
        else:
            has_alpha = _transparent(read_picture(item.picture))
        kind = item.mask_kind or ("alpha" if has_alpha and "alpha" in self.source.mask_sources else None)
        if kind is None and self.source.require_mask:
            raise ValueError(f"{item.picture}: no mask, and data.require_mask=true; add one or drop the picture")
        spec, jobs = self.architecture.latents, []
        for flip, geometry in geometries.items():
            key = f"{item.key}@flip" if flip else item.key
            mask_current = kind is not None and self._mask_current(key, item, geometry, kind)
            if item.mask is not None and not mask_current:
                mask = read_mask(item.mask)
                check_aspect((mask.shape[1], mask.shape[0]), size, f"{item.picture} and {item.mask}")
            shape = spec.shape(1, geometry.size[1], geometry.size[0])
            jobs.append(_Job(key, item, geometry, shape, kind, bool(current[flip]), mask_current, has_alpha))
        return jobs

    def _latents_current(self, item: Item, geometry: Geometry, identity: Identity) -> dict[str, object] | None:
        key = f"{item.key}@flip" if geometry.flip else item.key
        record = made_from(self.cache.latents_path(key))
        if record is None or not self.cache.preview_path(key).is_file():
            return None
        same = record["geometry"] == _geometry(geometry) and record["vae"] == identity.vae
        return record if same and _unchanged(item.picture, record) else None

    def _mask_current(self, key: str, item: Item, geometry: Geometry, kind: str) -> bool:
        record = made_from(self.cache.mask_path(key))
        if record is None or record["geometry"] != _geometry(geometry) or record["kind"] != kind:
            return False
        return _unchanged(item.mask or item.picture, record)

    def _count(self, items: Sequence[Item], jobs: Sequence[_Job]) -> None:
        summary = self.summary
        used = {job.item.key for job in jobs}
        summary.no_caption = sum(not item.captioned for item in items if item.key in used)
        summary.unused_masks = self.source.unused_masks(items)
        for job in jobs:
            summary.masks[job.mask_kind or "none"] += 1
            summary.buckets[job.geometry.size] += 1
            summary.enlarged += job.geometry.scale > 1
            summary.validation += job.item.split == "val"

    def _encode_text(self, jobs: Sequence[_Job], encoders: Encoders) -> None:
        own = {job.item.caption for job in jobs}
        trained = {job.item.caption for job in jobs if job.item.split == "train"}
        captions = sorted(own.union(*(self.source.preservation.of(caption) for caption in trained)))
        missing = [c for c in captions if made_from(self.cache.text_path(text_name(c))) is None]
        self.summary.texts_encoded, self.summary.texts_current = len(missing), len(captions) - len(missing)
        with tqdm(total=len(missing), desc="captions", unit="caption", disable=None) as bar:
            for start in range(0, len(missing), _TEXT_BATCH):
                batch = missing[start : start + _TEXT_BATCH]
                for caption, record in zip(batch, encoders.encode_text(batch), strict=True):
                    write_tensors(self.cache.text_path(text_name(caption)), record.tensors(), {"caption": caption})
                bar.update(len(batch))
        encoders.release()

    def _encode_latents(self, jobs: Sequence[_Job], encoders: Encoders, identity: Identity) -> list[_Job]:
        """Encode stale pictures; returns the jobs that have latents now."""
        stale = [job for job in jobs if not job.latents_current]
        failed = set()
        for job in tqdm(stale, desc="pictures", unit="picture", disable=None):
            try:
                self._encode(job, encoders, identity)
            except (ValueError, OSError) as error:
                if self.source.on_error == "stop" or is_out_of_space(error):
                    raise
                failed.add(job.key)
                self.summary.skipped.append(str(error))
        kept = [job for job in jobs if job.key not in failed]
        self.summary.encoded = len(stale) - len(failed)
        self.summary.current = len(kept) - self.summary.encoded
        return kept

    def _encode(self, job: _Job, encoders: Encoders, identity: Identity) -> None:
        before = _stamp(job.item.picture)
        image = crop_picture(read_picture(job.item.picture).rgb, job.geometry)
        latents = encoders.encode_pixels(picture_tensor(image)[None])[0]
        if not torch.isfinite(latents).all():
            raise ValueError(f"{job.item.picture}: the VAE gave NaN or infinite latents; use model.vae_dtype=float32")
        if tuple(latents.shape) != job.shape:
            raise ValueError(f"{job.item.picture}: latents are {tuple(latents.shape)}, expected {job.shape}")
        image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        preview = self.cache.preview_path(job.key)
        write_atomically(preview, lambda temporary: image.save(temporary, "JPEG", quality=90))
        record = {
            **before,
            "content": content_hash(job.item.picture),
            "source": str(job.item.picture),
            "geometry": _geometry(job.geometry),
            "vae": identity.vae,
            "alpha": job.has_alpha,
        }
        write_tensors(self.cache.latents_path(job.key), {"latents": latents}, record)

    def _write_masks(self, jobs: Sequence[_Job]) -> None:
        masked = [job for job in jobs if job.mask_kind is not None]
        stale = [job for job in masked if not job.mask_current]
        self.summary.masks_written, self.summary.masks_current = len(stale), len(masked) - len(stale)
        for job, mask in _masks(tqdm(stale, desc="masks", unit="mask", disable=None)):
            file = job.item.mask or job.item.picture
            record = {
                **_stamp(file),
                "content": content_hash(file),
                "source": str(file),
                "geometry": _geometry(job.geometry),
                "kind": job.mask_kind,
            }
            cells = latent_mask(mask, job.geometry, (job.shape[2], job.shape[3]))
            write_tensors(self.cache.mask_path(job.key), {"mask": cells}, record)


def _masks(jobs: Iterator[_Job]) -> Iterator[tuple[_Job, np.ndarray]]:
    for job in jobs:
        if job.item.mask is not None:
            yield job, read_mask(job.item.mask)
        else:
            alpha = read_picture(job.item.picture).alpha
            if alpha is None:
                raise ValueError(f"{job.item.picture} changed while it was prepared; run `python -m mpp.prepare` again")
            yield job, alpha


def _transparent(picture: Picture) -> bool:
    return picture.alpha is not None and bool(picture.alpha.min() < 1)


def _geometry(geometry: Geometry) -> list[object]:
    return [*geometry.source, *geometry.size, geometry.flip]


def _stamp(path: Path) -> dict[str, object]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _unchanged(path: Path, record: dict[str, object]) -> bool:
    """Whether a file is what a cache file was made from: by size and time, or else by content."""
    stamp = _stamp(path)
    if stamp["bytes"] != record["bytes"]:
        return False
    return stamp["mtime_ns"] == record["mtime_ns"] or content_hash(path) == record["content"]


def _entry(job: _Job) -> Entry:
    return Entry(
        key=job.key,
        split=job.item.split,
        shape=job.shape,
        text=text_name(job.item.caption),
        caption=job.item.caption,
        mask=job.mask_kind,
        flip=job.geometry.flip,
    )
