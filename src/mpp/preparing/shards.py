"""How preparing is divided: among machines, worker processes and batches."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpp.cache.index import Entry, Index, line_of, write_index
from mpp.files import names_told_apart, write_atomically

_ENVIRONMENTS = (("RANK", "WORLD_SIZE", "torchrun"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM"))


@dataclass(frozen=True)
class Shard:
    """One of `count` processes that prepare one cache, each every `count`-th image or video.

    Attributes:
        index: From 0.
        count: Processes in all.
        said_by: Who says so, for people.
    """

    index: int = 0
    count: int = 1
    said_by: str = ""

    def __str__(self) -> str:
        """As in the setting: `0/8`."""
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Sharding:
    """`prepare` in the YAML.

    Args:
        shard: `i/n`: this process takes every n-th image or video from the i-th on, i from 0 to n - 1. None: as
            torchrun or a SLURM step says, else everything.
        workers: Processes that decode while the encoder runs; 0: none.
        batch_size: Samples of one shape that the VAE encodes at once, at most.

    Raises:
        ValueError: A shard that is none, or numbers out of range.
    """

    shard: str | None = None
    workers: int = 2
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.workers < 0 or self.batch_size < 1:
            raise ValueError(
                f"prepare.workers must be at least 0 and prepare.batch_size at least 1, got {self.workers} and "
                f"{self.batch_size}"
            )
        if self.shard is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
            if match is None or int(match[1]) >= int(match[2]):
                raise ValueError(f"prepare.shard must be i/n with i from 0 to n - 1, such as 0/8, got {self.shard!r}")

    def own_shard(self) -> Shard:
        """Which shard is this process's."""
        if self.shard is not None:
            index, count = map(int, self.shard.split("/"))
            return Shard(index, count, "prepare.shard")
        for rank, size, who in _ENVIRONMENTS:
            if rank in os.environ and int(os.environ.get(size, "1")) > 1:
                return Shard(int(os.environ[rank]), int(os.environ[size]), who)
        return Shard()


@dataclass(frozen=True)
class ShardResult:
    """What one of several processes contributes to an index."""

    entries: Sequence[Entry]
    skipped: tuple[str, ...] = ()


class ShardResults:
    """The results of one plan's index, as far as they are finished.

    Each process writes its own; whoever finds all of them complete writes the index, which comes out the same whoever
    does, so it does no harm if two do.

    Args:
        folder: The cache.
        plan: Name of what is being prepared: results of another plan do not belong together.
        count: Processes in all.
    """

    def __init__(self, folder: Path, plan: str, count: int) -> None:
        self.cache, self.folder, self.count = folder, folder / "parts" / plan, count

    def write(self, index: int, result: ShardResult) -> None:
        """Finish one shard's result."""
        header = json.dumps({"skipped": result.skipped}).encode() + b"\n"
        rows = [line_of(entry) for entry in result.entries]
        write_atomically(self._path(index), lambda temporary: temporary.write_bytes(b"".join([header, *rows])))

    def missing(self) -> list[int]:
        """Which are not finished."""
        return [index for index in range(self.count) if not self._path(index).is_file()]

    def merge(self) -> tuple[str, ...]:
        """Write the index from all results.

        Returns:
            What was skipped, over all results.

        Raises:
            ValueError: There is no sample, or two have one key.
        """
        entries: list[Entry] = []
        skipped: list[str] = []
        for index in range(self.count):
            header, *rows = self._path(index).read_bytes().splitlines(keepends=True)
            skipped += json.loads(header)["skipped"]
            entries += Index.read(rows, self._path(index))
        names = Counter(map(names_told_apart(self.cache), (entry.key for entry in entries)))
        if not entries:
            raise ValueError(f"no image or video could be used; first problem: {(skipped or ['none was there'])[0]}")
        if len(names) < len(entries):
            key, _ = names.most_common(1)[0]
            raise ValueError(f"two images or videos make the sample {key}; rename one of them")
        write_index(self.cache / "index.jsonl", entries)
        return tuple(skipped)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}-of-{self.count}.jsonl"
