"""Images and clips to latents in the cache: worker processes decode while the encoder runs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import Cache, are_finite, chunks, write_tensors
from mpp.cache.provenance import LatentsProvenance, Source
from mpp.files import write_atomically
from mpp.models.conditioning import flat_tensors
from mpp.models.contract import Architecture, Encoders, Identity
from mpp.models.frame_axis import FrameAxis
from mpp.preparing.failures import Failures, naming
from mpp.preparing.frames import as_image, as_pixels, read_controls, read_item_frames
from mpp.preparing.planning import Job, source_files
from mpp.preparing.shards import Sharding
from mpp.workers import ReadAhead

_PREVIEW_SIDE = 512


@dataclass(frozen=True)
class Decoded:
    """What a worker hands over of one sample.

    Attributes:
        job: Which.
        frames: Bytes `(channels, f, height, width)`; None where it failed.
        controls: Its control images.
        sources: Its files, as they were before they were read.
        error: Why it could not be read.
    """

    job: Job
    frames: Tensor | None = None
    controls: tuple[Image.Image, ...] = ()
    sources: tuple[Source, ...] = ()
    error: str | None = None

    def checked(self) -> Self:
        """Itself.

        Raises:
            ValueError: It could not be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        return self


def decode_sample(job: Job) -> Decoded:
    """Decode one sample; what is wrong with it is part of the answer."""
    try:
        with naming(job.item, "it cannot be read"):
            # The fingerprints are those of the files that are read, should one change meanwhile.
            sources = Fingerprints().sources(source_files(job.item))
            frames = read_item_frames(job.item, job.cut)
            controls = tuple(read_controls(job.item, job.cut.geometry))
    except (ValueError, OSError) as error:
        return Decoded(job, error=str(error))
    return Decoded(job, frames, controls, sources)


def _decode_all(jobs: Sequence[Job]) -> list[Decoded]:
    return [decode_sample(job) for job in jobs]


class LatentWriter:
    """Encodes samples into a cache.

    Args:
        cache: Where they go.
        architecture: Whose latents.
        encoders: Its encoders.
        identity: Of their weights.
        sharding: Workers and batches.
        failures: What becomes of a sample that cannot be read, encoded or written.
        tiled: Whether the encoders' VAE works in tiles.
    """

    def __init__(
        self,
        cache: Cache,
        architecture: Architecture,
        encoders: Encoders,
        identity: Identity,
        *,
        sharding: Sharding,
        failures: Failures,
        tiled: bool = False,
    ) -> None:
        self.cache, self.architecture, self.encoders, self.identity = cache, architecture, encoders, identity
        self.sharding, self.failures, self.tiled = sharding, failures, tiled

    def write(self, jobs: Sequence[Job]) -> dict[str, Job | None]:
        """Encode all of them.

        Returns:
            By key the job as it came out, None where it was skipped.

        Raises:
            ValueError: A sample fails, and failures stop.
            OSError: The disk is full or cannot be written.
        """
        done: dict[str, Job | None] = {job.key: None for job in jobs}
        with tqdm(total=len(jobs), desc="latents", unit="sample", disable=None) as bar:
            for batch in self._decoded(jobs):
                good = []
                for decoded in batch:
                    with self.failures.of(decoded.job.item, "it cannot be read"):
                        good.append(decoded.checked())
                for decoded, latents in self._encode(good):
                    with self.failures.of(decoded.job.item, "it cannot be written to the cache"):
                        done[decoded.job.key] = self._store(decoded, latents)
                bar.update(len(batch))
        return done

    def _decoded(self, jobs: Sequence[Job]) -> Iterator[list[Decoded]]:
        """Batches of one shape, decoded ahead of the encoder by the workers."""
        if not jobs:
            return iter(())
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault((*job.shape, *job.cut.geometry.size), []).append(job)
        batches = [part for group in groups.values() for part in chunks(group, self.sharding.batch_size)]
        remote = any(not isinstance(job.item.media, Path) for job in jobs)
        # Clients of object storage do not survive a fork.
        workers = 0 if remote else min(self.sharding.workers, len(batches))
        return iter(ReadAhead(_decode_all, batches, "prepare.workers", workers=workers, ahead=1))  # clips are large

    def _encode(self, batch: Sequence[Decoded]) -> list[tuple[Decoded, Tensor]]:
        """Samples of one shape with their latents `(c, f, h, w)`: one by one if they fail together."""
        if len(batch) > 1:
            with contextlib.suppress(Exception):  # one of them has it again by itself, and then has a name
                return list(zip(batch, self._latents(batch), strict=True))
        found = []
        for decoded in batch:
            with self.failures.of(decoded.job.item, "the VAE failed on it"):
                found.append((decoded, self._latents([decoded])[0]))
        return found

    def _latents(self, batch: Sequence[Decoded]) -> Tensor:
        return self.encoders.encode_pixels(torch.stack([as_pixels(decoded.frames) for decoded in batch]))

    def _store(self, decoded: Decoded, latents: Tensor) -> Job:
        """Write previews, image conditioning, and last the latents, whose record vouches for the others."""
        job, media = decoded.job, decoded.job.item.media
        if not are_finite({"latents": latents}):
            raise ValueError(f"{media}: the VAE gave NaN or infinite latents; use model.vae_dtype=float32")
        if tuple(latents.shape) != job.shape:
            raise ValueError(f"{media}: latents are {tuple(latents.shape)}, expected {job.shape}")
        with naming(job.item, "its conditioning images cannot be encoded"):
            pixels = as_pixels(decoded.frames)[None]
            fields = flat_tensors(self.encoders.encode_images(pixels, decoded.controls))
        if not are_finite(fields):
            raise ValueError(
                f"{media}: its image conditioning came out NaN or infinite; use model.vae_dtype=float32 and "
                "model.text_dtype=float32"
            )
        self._write_previews(job, decoded.frames)
        shapes = {name: tuple(tensor.shape) for name, tensor in fields.items()}
        cut, vae = job.cut, self.identity.vae
        made = LatentsProvenance(
            decoded.sources, cut.numbers, cut.frames, vae, job.has_alpha, shapes, job.in_srgb, self.tiled
        ).header()
        if fields:
            write_tensors(self.cache.images_path(job.key), fields, made, synced=False)
        write_tensors(self.cache.latents_path(job.key), {"latents": latents.clone()}, made, synced=False)
        return replace(job, images=shapes)

    def _write_previews(self, job: Job, frames: Tensor) -> None:
        stride = self.architecture.latents.temporal_stride
        for number, path in preview_paths(self.cache, job, self.architecture.latents.frames).items():
            # of the frames that make up a latent frame, the middle one
            middle = 1 + stride * (number - 1) + stride // 2 if number else 0
            _write_preview(path, as_image(frames[:, middle]))


def preview_paths(cache: Cache, job: Job, axis: FrameAxis) -> dict[int, Path]:
    """Where the previews of a sample lie, by the latent frame that each shows."""
    return {number: cache.preview_path(job.key, axis.suffix(number)) for number in axis.shown(job.shape[1])}


def _write_preview(path: Path, image: Image.Image) -> None:
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    write_atomically(path, lambda temporary: image.save(temporary, "JPEG", quality=90), synced=False)
