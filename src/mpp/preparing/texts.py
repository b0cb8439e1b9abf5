"""Captions to embeddings in the cache."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from mpp.cache.format import Cache, are_finite, chunks, made_from, text_name, write_tensors
from mpp.cache.provenance import TextProvenance
from mpp.models.contract import Architecture, Encoders, Prompt
from mpp.preparing.failures import Failures
from mpp.preparing.frames import first_image, read_controls
from mpp.preparing.planning import Job
from mpp.preparing.unsynced import Unsynced
from mpp.sources.items import Item

_BATCH = 16


@dataclass(frozen=True)
class _Text:
    """A caption to encode, and the first sample that it is of."""

    name: str
    caption: str
    job: Job


class TextWriter:
    """Encodes captions into a cache, each once together with the images that the text encoder sees.

    Args:
        cache: Where they go.
        architecture: Whose embeddings.
        encoders: Its encoders.
        failures: What becomes of a sample whose captions cannot be encoded.
        unsynced: What an interrupted preparation may have left.

    Attributes:
        names: Of the embeddings of all captions.
        encoded: Number of captions encoded.
        current: Number of those that were there.
        unread: By key of an item the words of its caption that the text encoder does not read, where there are any.
    """

    def __init__(
        self, cache: Cache, architecture: Architecture, encoders: Encoders, failures: Failures, unsynced: Unsynced
    ) -> None:
        self.cache, self.architecture, self.encoders = cache, architecture, encoders
        self.failures, self.unsynced = failures, unsynced
        self.names: set[str] = set()
        self.encoded = self.current = 0
        self.unread: dict[str, str] = {}
        self._said: set[str] = set()

    def write(self, captions: Mapping[str, Sequence[str]], jobs: Sequence[Job]) -> list[Job]:
        """Encode what is not there.

        Args:
            captions: Those of each item, by its key.
            jobs: The samples of the items.

        Returns:
            The jobs whose captions are all encoded now.

        Raises:
            ValueError: One cannot be encoded, and failures stop.
            OSError: The disk is full or cannot be written.
        """
        wanted: dict[str, _Text] = {}
        for job in jobs:
            for caption in captions[job.item.key]:
                name = text_name(caption, job.seen)
                wanted.setdefault(name, _Text(name, caption, job))
        missing = [text for text in wanted.values() if not self._is_current(text.name)]
        self.names = set(wanted)
        if missing:
            self.unsynced.begin()
        missing.sort(key=lambda text: text.caption)
        self.current = len(wanted) - len(missing)
        failed: dict[str, Item] = {}
        with tqdm(total=len(missing), desc="captions", unit="caption", disable=None) as bar:
            for batch in chunks(missing, _BATCH):
                failed |= {text.name: text.job.item for text in self._encode(batch)}
                bar.update(len(batch))
        self.encoded = len(missing) - len(failed)
        jobs = [job for job in jobs if not self._lacks(job, captions[job.item.key], failed)] if failed else list(jobs)
        self._note_unread(jobs)
        return jobs

    def _made(self, name: str) -> TextProvenance | None:
        return made_from(self.cache.text_path(name), TextProvenance)

    def _is_current(self, name: str) -> bool:
        return self._made(name) is not None and self.unsynced.trusts(self.cache.text_path(name))

    def _note_unread(self, jobs: Sequence[Job]) -> None:
        known: dict[str, str] = {}
        for job in jobs:
            name = text_name(job.item.caption, job.seen)
            if name not in known:
                made = self._made(name)
                known[name] = made.unread if made is not None else ""
            if known[name]:
                self.unread[job.item.key] = known[name]

    def _encode(self, batch: Sequence[_Text]) -> list[_Text]:
        """Encode a batch, one by one if it fails as a whole; returns what failed alone too."""
        if len(batch) > 1:
            with contextlib.suppress(Exception):  # one of them has it again by itself, and then has a name
                self._store(batch)
                return []
        done = []
        for text in batch:
            with self.failures.of(text.job.item, "its caption cannot be encoded"):
                self._store([text])
                done.append(text)
        return [text for text in batch if text not in done]

    def _store(self, batch: Sequence[_Text]) -> None:
        prompts = [Prompt(text.caption, self._images(text.job)) for text in batch]
        unread = self.encoders.unread([text.caption for text in batch])
        for text, record, words in zip(batch, self.encoders.encode_text(prompts), unread, strict=True):
            if not are_finite(record.tensors()):
                raise ValueError(
                    f"{text.job.item.media}: the embeddings of its caption {text.caption!r} came out NaN or infinite; "
                    "use model.text_dtype=float32"
                )
            made = TextProvenance(text.caption, text.job.seen, words)
            write_tensors(self.cache.text_path(text.name), record.tensors(), made.header(), synced=False)

    def _images(self, job: Job) -> tuple[Image.Image, ...]:
        """What the text encoder sees besides the caption."""
        if not job.seen:
            return ()
        if self.architecture.images.first_frame:
            return (first_image(job.item, job.cut),)
        return tuple(read_controls(job.item, job.cut.geometry))

    def _lacks(self, job: Job, captions: Sequence[str], failed: Mapping[str, Item]) -> bool:
        """Whether one of a sample's captions could not be encoded, which is said once of each image or video."""
        first = next((failed[name] for caption in captions if (name := text_name(caption, job.seen)) in failed), None)
        if first is not None and job.item.key not in self._said | {first.key}:
            self._said.add(job.item.key)
            self.failures.reasons.append(f"{job.item.media}: its caption is that of {first.media}, which failed")
        return first is not None
