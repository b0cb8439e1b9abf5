"""Images and clips to latents in the cache: worker processes decode while the encoder runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import Cache, chunks, write_tensors
from mpp.cache.provenance import LatentsProvenance, Source
from mpp.files import is_out_of_space, write_atomically
from mpp.models.conditioning import flat_tensors
from mpp.models.contract import Architecture, Encoders, Identity
from mpp.preparing.frames import as_image, as_pixels, read_controls, read_item_frames
from mpp.preparing.planning import Job, source_files
from mpp.preparing.shards import Sharding

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


class Decoding(Dataset[Decoded]):
    """Samples decoded by number."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.jobs)

    def __getitem__(self, index: int) -> Decoded:
        """Decode one; what is wrong with it is part of the answer."""
        job = self.jobs[index]
        try:
            # The fingerprints are those of the files that are read, should one change meanwhile.
            sources = Fingerprints().sources(source_files(job.item))
            frames = read_item_frames(job.item, job.cut)
            controls = tuple(read_controls(job.item, job.cut.geometry))
        except (ValueError, OSError) as error:
            return Decoded(job, error=str(error))
        except Exception as error:  # noqa: BLE001 (in a worker it would end the run without a name)
            return Decoded(job, error=f"{job.item.media}: {type(error).__name__}: {error}")
        return Decoded(job, frames, controls, sources)


class LatentWriter:
    """Encodes samples into a cache.

    Args:
        cache: Where they go.
        architecture: Whose latents.
        encoders: Its encoders.
        identity: Of their weights.
        sharding: Workers and batches.
        on_error: `stop` at the first sample that fails, or `skip` it.
    """

    def __init__(
        self,
        cache: Cache,
        architecture: Architecture,
        encoders: Encoders,
        identity: Identity,
        *,
        sharding: Sharding,
        on_error: str,
    ) -> None:
        self.cache, self.architecture, self.encoders, self.identity = cache, architecture, encoders, identity
        self.sharding, self.on_error = sharding, on_error
        self.skipped: list[str] = []

    def write(self, jobs: Sequence[Job]) -> dict[str, Job | None]:
        """Encode all of them.

        Returns:
            By key the job as it came out, None where it was skipped.

        Raises:
            ValueError: A sample fails and `on_error` is `stop`.
            OSError: The disk is full or cannot be written.
        """
        done: dict[str, Job | None] = {}
        with tqdm(total=len(jobs), desc="latents", unit="sample", disable=None) as bar:
            for batch in self._decoded(jobs):
                good = []
                for decoded in batch:
                    if decoded.error is None:
                        good.append(decoded)
                    else:
                        done[decoded.job.key] = self._failed(ValueError(decoded.error))
                for decoded, latents in zip(good, self._encode(good), strict=True):
                    try:
                        done[decoded.job.key] = self._store(decoded, latents)
                    except (ValueError, OSError) as error:
                        done[decoded.job.key] = self._failed(error)
                bar.update(len(batch))
        return done

    def _failed(self, error: Exception) -> None:
        if self.on_error == "stop" or is_out_of_space(error):
            raise error
        self.skipped.append(str(error))

    def _decoded(self, jobs: Sequence[Job]) -> Iterator[list[Decoded]]:
        """Batches of one shape, decoded ahead of the encoder by the workers."""
        if not jobs:
            return iter(())
        groups: dict[tuple[int, ...], list[int]] = {}
        for index in range(len(jobs)):
            groups.setdefault((*jobs[index].shape, *jobs[index].cut.geometry.size), []).append(index)
        batches = [part for group in groups.values() for part in chunks(group, self.sharding.batch_size)]
        remote = any(not isinstance(job.item.media, Path) for job in jobs)
        # Clients of object storage do not survive a fork.
        workers = 0 if remote else min(self.sharding.workers, len(batches))
        dataset = Decoding(jobs)
        ahead = {"prefetch_factor": 1} if workers else {}  # clips are large
        return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=workers, **ahead))

    def _encode(self, batch: Sequence[Decoded]) -> list[Tensor]:
        """Latents `(c, f, h, w)` of samples of one shape."""
        if not batch:
            return []
        pixels = torch.stack([as_pixels(decoded.frames) for decoded in batch])
        return list(self.encoders.encode_pixels(pixels))

    def _store(self, decoded: Decoded, latents: Tensor) -> Job:
        """Write previews, image conditioning, and last the latents, whose record vouches for the others."""
        job, media = decoded.job, decoded.job.item.media
        if not torch.isfinite(latents).all():
            raise ValueError(f"{media}: the VAE gave NaN or infinite latents; use model.vae_dtype=float32")
        if tuple(latents.shape) != job.shape:
            raise ValueError(f"{media}: latents are {tuple(latents.shape)}, expected {job.shape}")
        try:
            pixels = as_pixels(decoded.frames)[None]
            fields = flat_tensors(self.encoders.encode_images(pixels, decoded.controls))
        except ValueError as error:
            raise ValueError(f"{media}: its conditioning images: {error}") from error
        self._write_previews(job, decoded.frames)
        shapes = {name: tuple(tensor.shape) for name, tensor in fields.items()}
        cut, vae = job.cut, self.identity.vae
        made = LatentsProvenance(decoded.sources, cut.numbers, cut.frames, vae, job.has_alpha, shapes).header()
        if fields:
            write_tensors(self.cache.images_path(job.key), fields, made)
        write_tensors(self.cache.latents_path(job.key), {"latents": latents.clone()}, made)
        return replace(job, images=shapes)

    def _write_previews(self, job: Job, frames: Tensor) -> None:
        axis, stride = self.architecture.latents.frames, self.architecture.latents.temporal_stride
        for number in axis.shown(job.shape[1]):
            # of the frames that make up a latent frame, the middle one
            middle = 1 + stride * (number - 1) + stride // 2 if number else 0
            _write_preview(self.cache.preview_path(job.key, axis.suffix(number)), as_image(frames[:, middle]))


def _write_preview(path: Path, image: Image.Image) -> None:
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    write_atomically(path, lambda temporary: image.save(temporary, "JPEG", quality=90))
