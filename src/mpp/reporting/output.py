"""Where the page of a report goes, and which samples it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from mpp.cache.format import Cache, evenly_spread
from mpp.core.loss import MaskedPriorLoss
from mpp.files import check_writable, write_atomically
from mpp.reporting.findings import Finding, find
from mpp.reporting.page import MARK, Subject, render
from mpp.reporting.rows import ReportRow, look_at


@dataclass(frozen=True)
class Report:
    """Where the page goes, and how much of the cache it holds.

    Args:
        cache_dir: The cache.
        output: The page, `.html`; None: `NAME_report.html` beside the cache folder. An older report is replaced.
        limit: Samples that the page shows at most, >= 1.
        scanned: Samples that are measured at most, >= 1.

    Raises:
        ValueError: A setting is out of its range.
    """

    cache_dir: str | None = None
    output: str | None = None
    limit: int = 2000
    scanned: int = 20_000

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.cache_dir is None:
            raise ValueError("data.cache_dir=... is missing: give a cache made by `python -m mpp.prepare`")
        if self.limit < 1 or self.scanned < 1:
            raise ValueError(f"limit and scanned must be at least 1, got {self.limit} and {self.scanned}")
        if self.output is not None and Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"output={self.output} must end in .html")

    @property
    def path(self) -> Path:
        """Where the page goes."""
        if self.output is not None:
            return Path(self.output).expanduser()
        folder = Path(self.cache_dir).expanduser().resolve()
        return folder.with_name(f"{folder.name}_report.html")

    def run(
        self, loss: MaskedPriorLoss, preset: tuple[str, MaskedPriorLoss] | None = None
    ) -> tuple[Path, list[Finding]]:
        """Write the page.

        Args:
            loss: Whose regions are shown.
            preset: The preset's name and the preset itself, for the page's head and the commands that it shows.

        Returns:
            The page, and what looked wrong.

        Raises:
            ValueError: No finished cache, an empty one, or something else lies where the page should go.
            OSError: The page cannot be written; what was there before is untouched.
        """
        check_replaceable(self.path)
        check_writable(self.path.parent, "output")
        cache = Cache(self.cache_dir)
        identity, notes, entries = cache.identity(), cache.notes(), cache.entries()
        if not len(entries):
            raise ValueError(f"the cache {cache.folder} holds no samples; run `python -m mpp.prepare` again")
        chosen = evenly_spread(entries, self.scanned)
        bar = tqdm(chosen, desc="masks", unit="sample", total=len(chosen), disable=None)
        samples = [look_at(cache, row, loss, identity) for row in bar]
        findings = find(samples, loss, notes)
        made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        subject = Subject(cache, identity, loss, preset, len(entries), made)
        page = render(subject, samples, findings, choose(samples, findings, self.limit))
        write_atomically(self.path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
        return self.path, findings


def check_replaceable(path: Path) -> None:
    """Refuse to write over anything but an older report.

    Raises:
        ValueError: A folder or another file lies there.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise ValueError(f"output={path} is a folder; name a file, such as {path / 'report.html'}")
    with path.open("rb") as handle:
        if MARK.encode() not in handle.read(1024):
            raise ValueError(f"{path} is there already and is no report of mpp; choose another output=")


def choose(samples: Sequence[ReportRow], findings: Sequence[Finding], limit: int) -> list[int]:
    """Numbers of the samples that the page shows: some with each finding, the others evenly spread.

    Findings take half of the room at most, each the same part of it.
    """
    if len(samples) <= limit:
        return list(range(len(samples)))
    concerned = [finding.samples for finding in findings if finding.samples]
    each = limit // 2 // max(1, len(concerned))
    kept = {number for numbers in concerned for number in _spread(numbers, each)}
    rest = [number for number in range(len(samples)) if number not in kept]
    return sorted(kept | set(_spread(rest, limit - len(kept))))


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[position * len(numbers) // most] for position in range(most)]
