"""From images, videos, masks and captions to a cache: checks first, then text, latents, masks, and the index last."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import Cache, CacheIdentity, Notes, are_finite, evenly_spread, text_name, write_tensors
from mpp.cache.index import Entry, Index
from mpp.cache.mask_facts import MaskDoubts
from mpp.core.loss import MaskedPriorLoss
from mpp.files import check_writable, names_told_apart, remove_leftovers
from mpp.memory.settings import EncoderMemory
from mpp.models.contract import Architecture, Encoders, Identity
from mpp.preparing.encoding import LatentWriter, preview_paths
from mpp.preparing.failures import Failures
from mpp.preparing.frames import mask_sources, read_item_masks
from mpp.preparing.planning import Job, Planner, mask_provenance
from mpp.preparing.shards import Sharding, ShardResult, ShardResults
from mpp.preparing.summary import Summary
from mpp.preparing.texts import TextWriter
from mpp.preparing.unsynced import Unsynced
from mpp.sampling.prompts import Prompts
from mpp.sources.items import Item
from mpp.sources.source import FolderSource
from mpp.wording import few

_MASKS_AT_ONCE = 8
_SHOWN = 20


class Preparation:
    """Brings a cache up to date with its sources; what is current is left alone, so it resumes where it stopped.

    Args:
        source: Images, videos, masks, captions.
        architecture: Whose latents and text are cached.
        device: Where the encoders run.
        prompts: What will be generated during training, encoded as well; None: nothing.
        sharding: Shard of this process, workers and batches.
        memory: How the encoders fit.
    """

    def __init__(
        self,
        source: FolderSource,
        architecture: Architecture,
        device: torch.device | str,
        prompts: Prompts | None = None,
        sharding: Sharding | None = None,
        *,
        memory: EncoderMemory | None = None,
    ) -> None:
        self.source = source
        self.architecture = architecture
        self.device = device
        self.memory = memory or EncoderMemory()
        self.prompts = prompts or Prompts()
        self.sharding = sharding or Sharding(workers=0)
        self.shard = self.sharding.own_shard()
        self.cache = Cache(source.cache_dir)
        self.fingerprints = Fingerprints()
        self.failures = Failures(source.on_error)
        self.unsynced = Unsynced(self.cache.folder, self.shard)
        self.texts: set[str] = set()  # names of the embeddings that this process's samples may ask for
        self.summary = Summary(shard=self.shard, skipped=self.failures.reasons)

    def run(self, began: float | None = None) -> Summary:
        """Check everything, then encode what is not current, then write the index.

        Args:
            began: What the summary's time is counted from, by `time.monotonic`; None: now.

        Raises:
            ValueError: Bad input (see `FolderSource`), or a cache of another model; nothing has been encoded yet.
            OSError: The cache cannot be written.
        """
        start = time.monotonic()
        if began is not None:
            self.summary.spent("start", began)
        self.prompts.check(self.architecture)
        encoders = self.architecture.load_encoders(self.device, self.memory)
        items = self.source.items(with_layers=self.architecture.latents.frames.has_layers)
        self.source.preservation.check([item.caption for item in items if item.split == "train"])
        identity = self.architecture.identity(fetch=True)
        new = self._is_new(identity)
        mine = items[self.shard.index :: self.shard.count]
        jobs = self._plan(mine, identity)
        if new:
            self.cache.write_identity(self._identity(identity))
        layered = self.architecture.latents.frames.has_layers
        self.summary.left_over = self.source.left_over(items, with_layers=layered)
        self.summary.spent("check", start)
        jobs = self._encode_text(jobs, encoders)
        self._retire_index(jobs, items)
        jobs = self._encode_latents(jobs, encoders, identity)
        jobs = self._write_masks(jobs)
        self.summary.count(mine, jobs)
        self._look_at_masks(jobs)
        self._finish(jobs, items)
        if self.shard.index == 0:
            self._encode_prompts(encoders, identity)
        encoders.release()
        self.summary.seconds_loading = encoders.seconds_loading
        self.summary.seconds = time.monotonic() - (start if began is None else began)
        return self.summary

    def _is_new(self, identity: Identity) -> bool:
        """Whether no model has this cache yet; refuses one that belongs to another, or cannot be written."""
        check_writable(self.cache.folder, "data.cache_dir")
        if not (self.cache.folder / "cache.json").exists():
            return True
        self.cache.identity().check(self._identity(identity), self.cache.folder)
        remove_leftovers(self.cache.folder)
        return False

    def _identity(self, identity: Identity) -> CacheIdentity:
        return CacheIdentity.of(self.architecture, identity, self.memory.text_weights)

    def _plan(self, items: Sequence[Item], identity: Identity) -> list[Job]:
        """Jobs for all usable images and videos."""
        planner = Planner(
            self.source, self.architecture, self.cache, identity, self.fingerprints, unsynced=self.unsynced
        )
        jobs, checked = [], Failures("skip")  # all are named at once
        for item in tqdm(items, desc="checking", unit="file", disable=None):
            with checked.of(item, "it cannot be prepared"):
                jobs += planner.jobs(item)
        problems = checked.reasons
        if problems and self.source.on_error == "stop":
            raise ValueError("\n".join([*few(problems, _SHOWN), "(data.on_error=skip leaves such media out)"]))
        self.failures.reasons += problems
        self._check_keys(jobs)
        if not jobs and problems and self.shard.count == 1:
            raise ValueError(f"none of {len(items)} images and videos could be used; first problem: {problems[0]}")
        return jobs

    def _retire_index(self, jobs: Sequence[Job], items: Sequence[Item]) -> None:
        """Remove an index before anything that it names is written anew: it vouches for samples that are whole.

        Where several processes prepare shards it goes before any of them has finished, unless all had already.
        """
        stale = any(
            (not job.latents_current and self.cache.latents_path(job.key).exists())
            or (job.mask_kind is not None and not job.mask_current and self.cache.mask_path(job.key).exists())
            for job in jobs
        )
        if stale or (self.shard.count > 1 and self._results(items).missing()):
            (self.cache.folder / "index.jsonl").unlink(missing_ok=True)

    def _results(self, items: Sequence[Item]) -> ShardResults:
        return ShardResults(self.cache.folder, self._plan_name(items), self.shard.count)

    def _encode_text(self, jobs: Sequence[Job], encoders: Encoders) -> list[Job]:
        """Encode captions; returns the jobs that have all of theirs now."""
        start = time.monotonic()
        captions = {job.item.key: self._captions(job.item) for job in jobs}
        writer = TextWriter(self.cache, self.architecture, encoders, self.failures, self.unsynced)
        jobs = writer.write(captions, jobs)
        self.texts = writer.names
        self.summary.texts_encoded, self.summary.texts_current = writer.encoded, writer.current
        self.summary.unread = writer.unread
        encoders.release()
        self.summary.spent("captions", start)
        return jobs

    def _captions(self, item: Item | Entry) -> list[str]:
        """All captions of a sample that training may ask for."""
        found = [item.caption, *item.variants]
        if item.split == "train":
            found += self.source.preservation.of(item.caption)
            found += [""] if self.source.empty_caption else []
        return found

    def _encode_latents(self, jobs: Sequence[Job], encoders: Encoders, identity: Identity) -> list[Job]:
        """Encode what is stale; returns the jobs that have latents now."""
        start = time.monotonic()
        writer = LatentWriter(
            self.cache,
            self.architecture,
            encoders,
            identity,
            sharding=self.sharding,
            failures=self.failures,
            tiled=self.memory.vae == "tiled",
        )
        stale = [job for job in jobs if not job.latents_current]
        if stale:
            self.unsynced.begin()
        done = writer.write(stale)
        kept = [found for job in jobs if (found := done.get(job.key, job)) is not None]
        self.summary.spent("latents", start)
        return kept

    def _write_masks(self, jobs: Sequence[Job]) -> list[Job]:
        """Write stale masks; returns the jobs whose masks are there now."""
        start = time.monotonic()
        stale = [job for job in jobs if job.mask_kind is not None and not job.mask_current]
        if stale:
            self.unsynced.begin()
        failed = {job.key for job, failures in zip(stale, self._average_masks(stale), strict=True) if failures.reasons}
        self.summary.spent("masks", start)
        return [job for job in jobs if job.key not in failed]

    def _look_at_masks(self, jobs: Sequence[Job]) -> None:
        """Count masks that look wrong, whatever the loss."""
        start = time.monotonic()
        masked = Index.of([job.entry() for job in evenly_spread([job for job in jobs if job.mask_kind is not None])])
        self.summary.doubts = MaskDoubts.of(self.cache, masked, MaskedPriorLoss(), self.architecture.given_frames)
        self.summary.stages["masks"] += time.monotonic() - start

    def _average_masks(self, jobs: Sequence[Job]) -> Iterator[Failures]:
        """Write masks; what failed of each, in their order."""
        with ThreadPoolExecutor(_MASKS_AT_ONCE) as pool:  # most of the time is waiting for the disk
            try:
                for found in tqdm(pool.map(self._write_mask, jobs), total=len(jobs), desc="masks", disable=None):
                    self.failures.reasons += found.reasons
                    yield found
            finally:  # after an error the rest is not waited for
                pool.shutdown(cancel_futures=True)

    def _write_mask(self, job: Job) -> Failures:
        failures = Failures(self.source.on_error)
        with failures.of(job.item, "its mask cannot be written"):
            self._average_mask(job)
        return failures

    def _average_mask(self, job: Job) -> None:
        sources = self.fingerprints.sources(mask_sources(job.item))
        made = mask_provenance(job.item, job.cut, str(job.mask_kind), job.shape, sources)
        mask = read_item_masks(job.item, job.cut, job.shape, self.architecture.latents)
        if not are_finite({"mask": mask}):
            raise ValueError(f"{job.item.media}: its mask came out NaN or infinite")
        write_tensors(self.cache.mask_path(job.key), {"mask": mask}, made.header(), synced=False)

    def _encode_prompts(self, encoders: Encoders, identity: Identity) -> None:
        start = time.monotonic()
        weights = self.memory.text_weights
        self.summary.prompts = self.prompts.encode(
            self.architecture, encoders, self.cache, identity, text_weights=weights
        )
        self.summary.spent("prompts", start)

    def _finish(self, jobs: Sequence[Job], items: Sequence[Item]) -> None:
        """Write the index, or this process's part of it."""
        self.unsynced.sync(self._files(jobs))
        entries, skipped = [job.entry() for job in jobs], tuple(self.summary.skipped)
        if self.shard.count > 1:
            results = self._results(items)
            results.write(self.shard.index, ShardResult(entries, skipped))
            self.summary.waiting = tuple(results.missing())
            if self.summary.waiting:
                self.unsynced.end(everything=False)
                return
            skipped = results.merge()
        elif not entries:
            raise ValueError(f"nothing is left to train on; first problem: {skipped[0]}")
        else:
            self.cache.write_index(entries)
        self.unsynced.end(everything=True)
        self.summary.texts_removed = self._remove_texts()
        unused = tuple(self.summary.left_over.unused)
        self.cache.write_notes(Notes(self.source.sources_record(), unused, skipped))

    def _files(self, jobs: Sequence[Job]) -> Iterator[Path]:
        """The files of this process's samples."""
        yield from map(self.cache.text_path, self.texts)
        for job in jobs:
            yield from (
                self.cache.latents_path(job.key),
                self.cache.mask_path(job.key),
                self.cache.images_path(job.key),
            )
            yield from preview_paths(self.cache, job, self.architecture.latents.frames).values()

    def _remove_texts(self) -> int:
        """Remove embeddings of captions that no sample has any more; returns how many."""
        wanted = self.texts | {
            text_name(caption, entry.seen) for entry in self.cache.entries() for caption in self._captions(entry)
        }
        gone = [path for path in self.cache.text_path("").parent.glob("*.safetensors") if path.stem not in wanted]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def _plan_name(self, items: Sequence[Item]) -> str:
        """The same for all processes that prepare the same things in the same way."""
        described = (self.shard.count, self.source.sources_record(), [repr(item) for item in items])
        return hashlib.sha256(repr(described).encode()).hexdigest()[:16]

    def _check_keys(self, jobs: Sequence[Job]) -> None:
        """Refuse two samples whose files would be one, such as of an image that is called like a clip.

        Raises:
            ValueError: Names both.
        """
        known: dict[str, Job] = {}
        told_apart = names_told_apart(self.cache.folder)
        for job in jobs:
            other = known.setdefault(told_apart(job.key), job)
            if other is not job:
                makes = f"both make the sample {job.key}"
                if other.key != job.key:
                    makes = f"make the samples {other.key} and {job.key}, one file name for the disk of data.cache_dir"
                raise ValueError(f"{other.item.media} and {job.item.media} {makes}; rename one")
