"""What a run knows of its LoRA besides its record, for the metadata of the files."""

from collections import Counter
from pathlib import Path

from lightning import Trainer

from mpp.batching.datamodule import LatentDataModule
from mpp.cache.format import evenly_spread
from mpp.lora.metadata import Facts, Metadata
from mpp.lora.record import base_name


def facts_of(trainer: Trainer, folder: Path, said: Metadata) -> Facts:
    """Look at the training samples, of large sets at some, evenly spread.

    Args:
        trainer: With the data.
        folder: The run's, whose name the LoRA has unless told otherwise.
        said: What the user says of the LoRA.
    """
    name = base_name(str(folder.resolve())) or "LoRA"
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, LatentDataModule):
        return Facts(name)
    entries, stride = evenly_spread(data.train_entries), data.architecture.latents.spatial_stride
    sizes = Counter((entry.shape[3] * stride, entry.shape[2] * stride) for entry in entries)
    words = said.words if said.trigger_phrase is not None else data.cache.notes().triggers
    counts = {word: max(1, sum(word in entry.caption for entry in entries)) for word in words}
    return Facts(name, size=max(sizes, key=sizes.__getitem__), samples=len(data.train_entries), words=counts)
