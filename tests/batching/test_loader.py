"""What goes to the processes that read ahead."""

import io
import pickle
import random
import shutil

import torch
from lightning import LightningDataModule, LightningModule, Trainer

from mpp.batching.datamodule import LatentDataModule
from mpp.batching.preservation import Preservation
from tests import helpers

HEAVY = (torch.nn.Module, torch.Tensor, Trainer, LightningModule, LightningDataModule)


class Watching(pickle.Pickler):
    """Looks at everything that is pickled on its way."""

    def persistent_id(self, obj):
        assert not isinstance(obj, HEAVY), f"{type(obj).__name__} goes to every worker"


def pickled(thing):
    stream = io.BytesIO()
    Watching(stream).dump(thing)
    return stream.getvalue()


def same(one, other):
    tensors = [(one.latents, other.latents), (one.mask, other.mask), (one.conditioning.text, other.conditioning.text)]
    return one.keys == other.keys and all(torch.equal(*pair) for pair in tensors)


def test_a_worker_is_given_neither_model_nor_trainer_and_little_else(pipeline, prepared, tmp_path):
    draws, other = random.Random(4), shutil.copytree(prepared, tmp_path / "other")
    for _ in range(6):
        architecture = helpers.architecture(pipeline)
        settings = {"batch_size": draws.randint(1, 3), "seed": draws.randrange(9), "num_workers": 2}
        if draws.random() < 0.5:
            settings["preservation"] = Preservation(rate=0.3, cache_dir=str(other))
        data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), **settings)
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        model = helpers.module(architecture)  # as it is while a run goes on
        data.setup()
        sent = data.train_dataloader()._loader._loader
        parts = (sent.dataset, sent.collate_fn, sent.worker_init_fn)
        content = pickled(parts)
        assert len(content) < 30_000
        dataset, *_ = pickle.loads(content)
        for group in list(sent.sampler)[:3]:
            assert same(dataset[group], sent.dataset[group])
        del model
