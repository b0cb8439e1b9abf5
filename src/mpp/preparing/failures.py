"""Samples that fail: named by their media, whatever raised it; the first one stops, or all are left out and counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpp.files import is_out_of_space
from mpp.media.paths import short
from mpp.models.weights import WeightsError
from mpp.sources.items import Item


@contextmanager
def naming(item: Item, doing: str) -> Iterator[None]:
    """Raise what is raised inside as a ValueError that names the item's file.

    A full disk, and weights that cannot be loaded, come out as they are: they are no fault of a sample.

    Args:
        item: What is worked on.
        doing: What cannot be done if something is raised, for people.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WeightsError) or is_out_of_space(error):
            raise
        if isinstance(error, ValueError | OSError):  # written for people, and often with the file's name
            files = (item.media, item.mask, *item.layers, *item.layer_masks, *item.controls)
            named = any(str(file) in str(error) for file in files if file is not None)
            reason = str(error) if named else f"{item.media}: {doing} ({error})"
        else:
            reason = f"{item.media}: {doing} ({type(error).__name__}: {short(error)}){_remedy(error)}"
        raise ValueError(reason) from error


def _remedy(error: Exception) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "; memory is short: set a lower data.resolution, shorter data.clips.frames or fewer prepare.workers"
    return ""


class Failures:
    """What failed so far.

    Args:
        on_error: `stop` at the first sample that fails, or `skip` it.

    Attributes:
        reasons: Why samples were left out, each with its file.
    """

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.reasons: list[str] = []

    @contextmanager
    def of(self, item: Item, doing: str) -> Iterator[None]:
        """Note what is raised inside and go on behind the block, or raise it where the first failure stops.

        Raises:
            ValueError: As `naming`.
            OSError: The disk is full.
        """
        try:
            with naming(item, doing):
                yield
        except WeightsError:
            raise
        except ValueError as error:
            if self.on_error == "stop":
                raise
            self.reasons.append(str(error))
