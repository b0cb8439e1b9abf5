"""Preservation samples: images whose whole area keeps the base model's prediction, mixed into training.

The prior sees only the captions that are trained on, so what other prompts show may still drift. A preservation
sample is a visit with a mask of zeros: nothing is learned from the image, its noisy latents only say where student
and teacher are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpp.cache.format import Cache, evenly_spread, text_name
from mpp.cache.index import Entry
from mpp.cache.reader import Reader
from mpp.sources.captions import OtherCaptions


@dataclass(frozen=True)
class Preservation(OtherCaptions):
    """Which preservation samples are mixed into training, and how many.

    Args:
        replace: See `OtherCaptions`; the captions must have been prepared with the same setting.
        caption: See `OtherCaptions`.
        rate: Share of an epoch's samples that are preservation samples, in [0, 1); 0 is none.
        cache_dir: A cache of other images, with their own captions.

    Raises:
        ValueError: A rate out of range, or one above 0 with nothing to draw from.
    """

    rate: float = 0.0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"data.preservation.rate must be at least 0 and below 1, got {self.rate}")
        named = bool(self.replace) or self.caption is not None or self.cache_dir is not None
        if self.rate > 0 and not named:
            raise ValueError(
                f"data.preservation.rate={self.rate} has nothing to draw from; set data.preservation.replace, "
                "data.preservation.caption or data.preservation.cache_dir"
            )
        if self.rate == 0 and named:
            raise ValueError("data.preservation names samples and its rate is 0; set data.preservation.rate, e.g. 0.25")

    def count(self, samples: int) -> int:
        """Preservation samples in an epoch of `samples` training samples."""
        return max(1, round(self.rate / (1 - self.rate) * samples)) if self.rate else 0

    def pool(self, cache: Reader, entries: Sequence[Entry]) -> list[tuple[Reader, Entry]]:
        """All preservation samples there are, with the caches that hold them.

        Args:
            cache: The training cache.
            entries: Its training samples.

        Raises:
            ValueError: No caption holds a word to replace, a caption was not prepared, or the other cache is the
                training cache, of another model, damaged or empty.
        """
        if self.rate == 0:
            return []
        self.check([entry.caption for entry in entries])
        found = [
            (cache, replace(entry, caption=caption, text=text_name(caption, entry.seen), mask=None))
            for entry in entries
            for caption in self.of(entry.caption)
        ]
        for entry in evenly_spread(list({entry.text: entry for _, entry in found}.values())):
            if not cache.has_text(entry.text):
                raise ValueError(
                    f"the cache {cache.folder} has no embeddings of the caption {entry.caption!r}; run "
                    "`python -m mpp.prepare` again with the same data.preservation.replace and caption"
                )
            cache.check_files(entry)
        return found + self._other_images(cache)

    def _other_images(self, training: Reader) -> list[tuple[Reader, Entry]]:
        if self.cache_dir is None:
            return []
        cache = Cache(self.cache_dir)
        if cache.folder.resolve() == training.folder.resolve():
            raise ValueError(
                f"data.preservation.cache_dir={self.cache_dir} is the training cache, whose images would be "
                "preserved under their own captions; prepare other images into a cache of their own"
            )
        cache.identity().check(training.identity(), cache.folder)
        entries = [replace(entry, mask=None) for entry in cache.entries().of_split("train")]
        if not entries:
            raise ValueError(f"data.preservation.cache_dir={self.cache_dir} has no training samples")
        cache.check_some(entries)
        return [(cache, entry) for entry in entries]
