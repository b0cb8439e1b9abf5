"""`trainer.limit_train_batches`: the batches that run are those that count."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mpp.train
from mpp.batching.batch import Collate
from mpp.batching.loader import BatchOrder
from mpp.batching.visits import Visit
from mpp.config import build
from mpp.training.step import Position
from tests import helpers

RATE = 0.1


@pytest.fixture(scope="module")
def seven(pipeline, tmp_path_factory):
    """A cache of seven samples of one shape, so that any of them make up one big batch."""
    root = tmp_path_factory.mktemp("seven")
    draw = np.random.default_rng(0)
    for folder in ("photos", "masks"):
        (root / folder).mkdir()
    for number in range(7):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(root / "photos" / f"p{number}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[: 8 * (number + 1), 8 * number :] = 255
        Image.fromarray(mask).save(root / "masks" / f"p{number}.png")
    helpers.prepare(pipeline, root)
    return root / "cache"


def words(size, accumulate, limit, loss):
    return [
        f"loss={loss}", f"data.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.limit_train_batches={limit}", "optimizer._target_=torch.optim.SGD", f"optimizer.lr={RATE}",
        "optimizer.weight_decay=0", "trainer.gradient_clip_val=null", "trainer.max_steps=-1", "validate_first=false",
        "callbacks.report=null", "callbacks.samples=null", "memory.activations=keep",
    ]  # fmt: skip


def by_hand(pipeline, cache, out, epochs, size, accumulate, limit, loss):
    """Plain descent along the gradient of one big batch for each window of the batches that run, and their number."""
    cfg = helpers.train_config(pipeline, cache, out, *words(size, accumulate, limit, loss))
    model = build(cfg.model)
    built = helpers.module(model, build(cfg.loss), adapter=build(cfg.lora), seed=cfg.seed)
    data = build(cfg.data, architecture=model)
    data.setup()
    samples, steps = data.visits(), 0
    order = BatchOrder([()] * 7, size, cfg.seed)
    order.groups = {data.train_entries.signatures(model.given_frames)[0]: list(range(7))}
    parameters = [p for p in built.parameters() if p.requires_grad]
    for epoch in range(epochs):
        order.set_epoch(epoch)
        batches = order.epoch_batches()
        batches = batches[: int(len(batches) * limit) if isinstance(limit, float) else limit]
        for first in range(0, len(batches), accumulate):
            numbers = [number for batch in batches[first : first + accumulate] for number in batch]
            ones = [samples[Visit(number, epoch)] for number in numbers]
            big = Collate(model)(ones)
            total = built.loss.terms(built.step(big, Position(cfg.seed, epoch)).sums).total
            for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
                parameter.data -= RATE * gradient
            steps += 1
    return {f"transformer.{name}": tensor for name, tensor in built.state_dict().items()}, steps


def drawn(number):
    draw = random.Random(number)
    size, accumulate = draw.choice([1, 1, 2]), draw.randint(2, 4)
    count = -(-7 // size)
    limit = draw.choice([draw.randint(1, count + 1), round(draw.uniform(1 / count + 0.01, 1.0), 3)])
    return size, accumulate, limit, draw.choice(["continuous", "threshold", "masked"])


@pytest.mark.parametrize("number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, *range(4, 20)))])
def test_a_limited_epoch_has_the_gradients_of_the_batches_that_run(pipeline, seven, tmp_path, number):
    settings = drawn(number)
    wanted, steps = by_hand(pipeline, seven, tmp_path, 2, *settings)
    trainer, module = helpers.train(pipeline, seven, tmp_path, *words(*settings), "trainer.max_epochs=2")
    assert trainer.global_step == steps
    found = {f"transformer.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_a_limited_run_that_was_stopped_goes_on_bit_for_bit(pipeline, seven, tmp_path, number):
    settings = words(*drawn(number))
    draw = random.Random(number)
    stop, workers = draw.randint(1, 4), 2 if number == 1 else 0
    settings += [f"data.num_workers={workers}"]
    helpers.train(pipeline, seven, tmp_path / "straight", *settings, "trainer.max_steps=5")
    helpers.train(pipeline, seven, tmp_path / "parts", *settings, f"trainer.max_steps={stop}")
    helpers.train(
        pipeline, seven, tmp_path / "parts", *settings, "trainer.max_steps=5", "ckpt_path=last", "logger=tensorboard"
    )
    one, other = (load_file(tmp_path / run / "lora.safetensors") for run in ("straight", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_share_that_leaves_no_batch_is_refused_before_anything_is_loaded(pipeline, seven, tmp_path):
    cfg = helpers.train_config(pipeline, seven, tmp_path / "out", *words(2, 2, 0.2, "masked"), "trainer.max_epochs=1")
    with pytest.raises(ValueError, match=r"limit_train_batches=0.2 leaves none of the 4 batches of an epoch; set"):
        mpp.train.run(cfg)
    assert not (tmp_path / "out").exists()
