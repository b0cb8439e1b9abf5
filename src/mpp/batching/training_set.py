"""What a run trains on, as its checkpoints say it: a run that goes on must find the same samples in the same order."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from mpp.cache.format import evenly_spread
from mpp.cache.index import Entry
from mpp.cache.reader import Reader

NAMED = (
    10_000  # samples that are looked at; where there are no more, a checkpoint keeps their keys, to say which are gone
)
_LOOKED_AT = 4  # samples whose latents are hashed
_SHOWN = 5


@dataclass(frozen=True)
class TrainingSet:
    """Training samples in the order of the index.

    Attributes:
        count: How many.
        order: Hash of what decides the order of batches: keys, shapes and repeats, preservation samples included.
        words: Hash of captions, and of which samples have a mask.
        latents: Hashes of the latents of a few, by key.
        kinds: Hashes of shape and repeats, by key; None of more than `NAMED`.
    """

    count: int
    order: str
    words: str
    latents: Mapping[str, str]
    kinds: Mapping[str, str] | None

    @classmethod
    def of(cls, cache: Reader, entries: Sequence[Entry], pool: Sequence[tuple[Reader, Entry]]) -> Self:
        """Look at the index, and at the latents of a few samples.

        Of a large set evenly spread rows are looked at; a sample more or less moves those after it.

        Args:
            cache: Where the training samples lie.
            entries: They.
            pool: Preservation samples.

        Raises:
            ValueError: Latents are missing or damaged.
        """
        order, words, kinds = hashlib.sha256(), hashlib.sha256(), {}
        for part in (entries, [entry for _, entry in pool]):
            order.update(b"%d\0" % len(part))
            for entry in evenly_spread(part, NAMED):
                kind = repr((entry.shape, sorted(entry.images.items()), entry.repeats)).encode()
                order.update(b"%s\0%s\0" % (entry.key.encode(), kind))
                words.update(repr((entry.caption, entry.variants, entry.mask is not None)).encode())
                if part is entries:
                    kinds[entry.key] = _short(kind)
        named = len(entries) <= NAMED
        looked_at = evenly_spread(entries, _LOOKED_AT)
        latents = {entry.key: _short(cache.latents(entry).numpy().tobytes()) for entry in looked_at}
        return cls(len(entries), order.hexdigest(), words.hexdigest(), latents, kinds if named else None)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `record`."""
        return cls(**record)

    def check(self, now: Self) -> list[str]:
        """Compare with what there is now.

        Returns:
            What is another and does no harm, in words.

        Raises:
            ValueError: The samples or their order are others; names some of them.
        """
        found = []
        if self.order != now.order:
            found = _differences(self, now)
        else:
            other = [key for key, value in self.latents.items() if now.latents.get(key, value) != value]
            found = [f"other latents: {_list(other)}"] if other else []
        if found:
            raise ValueError(
                f"the samples are not those that the run began with ({'; '.join(found)}), so it cannot go on as it "
                "began; set data.cache_dir to a cache of them, or begin a run of its own with another output_dir"
            )
        return [] if self.words == now.words else ["captions, or which samples have a mask, are not what they were"]


def _differences(was: TrainingSet, now: TrainingSet) -> list[str]:
    counts = f"{was.count} then, {now.count} now"
    if was.kinds is None or now.kinds is None:
        return [counts]
    gone = [key for key in was.kinds if key not in now.kinds]
    new = [key for key in now.kinds if key not in was.kinds]
    other = [key for key, kind in was.kinds.items() if now.kinds.get(key, kind) != kind]
    named = {"gone": gone, "new": new, "of another shape or number of repeats": other}
    return [counts, *(f"{what}: {_list(keys)}" for what, keys in named.items() if keys)]


def _list(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
