import json
import shutil
from collections import Counter

import pytest
import torch

from mpp.batching.batch import Collate
from mpp.batching.datamodule import LatentDataModule
from mpp.batching.loader import BatchOrder
from mpp.batching.preservation import Preservation
from mpp.batching.visits import Visit
from mpp.cache.format import Cache, text_name
from mpp.core.loss import MaskedPriorLoss
from mpp.models.contract import Prompt
from mpp.sources.captions import OtherCaptions
from tests import helpers

TRAIN = [(16, 1, 8, 8)] * 7 + [(16, 1, 4, 8)] * 4
POOL = [(16, 1, 8, 8)] * 5 + [(16, 1, 8, 4)] * 3


@pytest.fixture(scope="module")
def other_captions(tmp_path_factory, pipeline):
    """A cache whose images can also be shown under `a yellow thing N` and the empty caption."""
    root = tmp_path_factory.mktemp("captions")
    helpers.draw_photos(root / "photos", root / "masks")
    helpers.prepare(pipeline, root, "data.preservation.replace={box: thing}", "data.preservation.caption=''")
    return root / "cache"


def datamodule(architecture, cache, batch_size=2, **settings):
    built = LatentDataModule(
        architecture=architecture, cache_dir=str(cache), batch_size=batch_size, preservation=Preservation(**settings)
    )
    built.setup()
    return built


def picks(order):
    return [index for batch in order.epoch_batches() for index in batch if index >= len(TRAIN)]


@pytest.mark.parametrize("count", [1, 4, 8, 21])
@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_has_every_training_sample_and_the_share_of_the_pool(count, world):
    for epoch in range(5):
        seen = Counter()
        lengths = set()
        for rank in range(world):
            order = BatchOrder(TRAIN, 2, 0, rank, world, pool=POOL, pool_count=count)
            order.set_epoch(epoch)
            batches = order.epoch_batches()
            lengths.add(len(batches))
            assert len(batches) == len(order)
            seen.update(index for batch in batches for index in batch)
            for batch in batches:
                shapes = {TRAIN[i] if i < len(TRAIN) else POOL[(i - len(TRAIN)) % len(POOL)] for i in batch}
                assert len(shapes) == 1
        assert len(lengths) == 1
        assert set(range(len(TRAIN))) <= set(seen)
        assert sum(index >= len(TRAIN) for index in seen) == max(count, 2)  # the pool's two shapes, at least one each


def test_successive_epochs_go_through_the_whole_pool_evenly():
    order = BatchOrder(TRAIN, 2, 0, pool=POOL, pool_count=3)
    seen = Counter()
    for epoch in range(8):
        order.set_epoch(epoch)
        seen.update((index - len(TRAIN)) % len(POOL) for index in picks(order))
    assert set(seen) == set(range(len(POOL)))
    of_shape = [seen[i] for i in range(5)], [seen[i] for i in range(5, 8)]
    assert all(max(counts) - min(counts) <= 1 for counts in of_shape)


def test_an_image_visited_twice_in_an_epoch_is_another_sample_with_other_noise(architecture, other_captions):
    data = datamodule(architecture, other_captions, rate=0.8, caption="")
    keys = [key for batch in data.train_dataloader() for key in batch.keys if "#" in key]
    assert len(keys) == data.pool_picks == 32  # 8 images, 0.8 / 0.2 * 8 visits
    assert len(set(keys)) == 32


def test_rare_shapes_of_the_pool_are_seen_too():
    shapes = [(16, 1, 8, 8)] * 50 + [(16, 1, 8, 4)] * 20 + [(16, 1, 4, 8)] * 5
    order = BatchOrder(TRAIN, 2, 0, pool=shapes, pool_count=2)
    assert sum(order.quota.values()) == 3
    seen = set()
    for epoch in range(50):
        order.set_epoch(epoch)
        seen.update((index - len(TRAIN)) % len(shapes) for index in picks(order))
    assert seen == set(range(75))


def test_without_a_pool_the_order_is_what_it_was():
    plain, pooled = BatchOrder(TRAIN, 2, 0), BatchOrder(TRAIN, 2, 0, pool=POOL, pool_count=0)
    assert plain.epoch_batches() == pooled.epoch_batches()


def test_preservation_samples_keep_the_base_everywhere_under_their_own_caption(architecture, other_captions):
    data = datamodule(architecture, other_captions, rate=0.5, replace={"box": "thing"})
    cache = Cache(other_captions)
    captions = {entry.key: entry.caption for entry in cache.entries()}
    encoders = architecture.load_encoders("cpu")
    for _, entry in data.pool:
        (expected,) = encoders.encode_text([Prompt(captions[entry.key].replace("box", "thing"))])
        assert torch.equal(cache.conditioning(entry, architecture.conditioning).text, expected.text)
    assert {e.caption for _, e in data.pool} == {c.replace("box", "thing") for c in captions.values()}
    count = 0
    for batch in data.train_dataloader():
        kept = [row for row, key in enumerate(batch.keys) if "#" in key]
        assert batch.preserved == len(kept)
        for row in kept:
            assert not batch.mask[row].any()
            own = cache.latents(next(e for e in cache.entries() if e.key == batch.keys[row].split("#")[0]))
            assert torch.equal(batch.latents[row], own)
            count += 1
    assert count == 8


def test_other_images_come_with_their_own_captions(architecture, prepared, other_captions):
    data = datamodule(architecture, prepared, rate=0.25, cache_dir=str(other_captions))
    assert {cache.folder for cache, _ in data.pool} == {other_captions}
    assert {entry.caption for _, entry in data.pool} == {f"a yellow box {n}" for n in range(3)}


def test_a_preservation_sample_teaches_only_the_prior(architecture, other_captions):
    data = datamodule(architecture, other_captions, batch_size=1, rate=0.5, caption="")
    samples = data.visits()
    sample = samples[Visit(len(data.train_entries), 0)]
    batch = Collate(architecture)([sample])
    for threshold in (None, 0.1):
        loss = MaskedPriorLoss(prior_weight=1.0, prior_threshold=threshold, normalization="per_sample")
        assert loss.weights(batch.mask).needs_prior().all()
        pred, target, prior = (torch.randn_like(batch.latents, requires_grad=True) for _ in range(3))
        terms = loss(pred, target, batch.mask, prior)
        assert terms.target == 0
        assert terms.prior.item() == pytest.approx(((pred - prior) ** 2).mean().item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(terms.total, target, allow_unused=True)
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("zarp on grass", ["person on grass", ""]),
        ("a zarp, smiling", ["a person, smiling", ""]),
        ("zarps and xzarp", [""]),
        ("ZARP zarp", ["ZARP person", ""]),
    ],
)
def test_words_are_replaced_whole(caption, expected):
    assert OtherCaptions(replace={"zarp": "person"}, caption="").of(caption) == expected


def test_longer_words_are_replaced_first_and_special_characters_are_plain():
    assert OtherCaptions(replace={"a": "x", "a b": "y", "c++": "z"}).of("a b a c++") == ["y x z"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0, "caption": ""}, "at least 0 and below 1"),
        ({"rate": -0.1, "caption": ""}, "at least 0 and below 1"),
        ({"rate": 0.5}, "nothing to draw from"),
        ({"caption": ""}, "its rate is 0"),
        ({"rate": 0.5, "replace": {" ": "x"}}, "empty word"),
        ({"rate": 0.5, "replace": {"x": "x"}}, "stands for itself"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preservation(**settings)


def test_captions_that_were_not_prepared_and_words_that_do_not_occur_are_refused(architecture, prepared):
    with pytest.raises(ValueError, match=r"no embeddings of the caption 'a yellow thing 0'; run"):
        datamodule(architecture, prepared, rate=0.5, replace={"box": "thing"})
    with pytest.raises(ValueError, match="none of zarp occurs as a word in any caption"):
        datamodule(architecture, prepared, rate=0.5, replace={"zarp": "thing"})
    with pytest.raises(ValueError, match="no cache at"):
        datamodule(architecture, prepared, rate=0.5, cache_dir="nowhere")
    with pytest.raises(ValueError, match="is the training cache"):
        datamodule(architecture, prepared, rate=0.5, cache_dir=f"{prepared}/../cache")


def test_a_damaged_caption_and_a_cache_of_another_text_encoder_are_refused(architecture, other_captions, tmp_path):
    damaged, foreign = tmp_path / "damaged", tmp_path / "foreign"
    shutil.copytree(other_captions, damaged)
    name = text_name("")
    (damaged / "text" / f"{name}.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{name}.safetensors is damaged or cut short"):
        datamodule(architecture, damaged, rate=0.5, caption="")
    shutil.copytree(other_captions, foreign)
    identity = json.loads((foreign / "cache.json").read_text())
    (foreign / "cache.json").write_text(json.dumps(identity | {"text_encoder": "another"}))
    with pytest.raises(ValueError, match="was made with another text_encoder"):
        datamodule(architecture, other_captions, rate=0.5, cache_dir=str(foreign))


def test_preparing_refuses_words_that_no_caption_has(pipeline, tmp_path):
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", count=2)
    with pytest.raises(ValueError, match="none of zarp occurs as a word in any caption, such as 'a yellow box"):
        helpers.prepare(pipeline, tmp_path, "data.preservation.replace={zarp: thing}")
    assert not (tmp_path / "cache" / "latents").exists()


def test_a_loss_that_would_not_preserve_is_refused_before_the_model_loads(
    pipeline, other_captions, tmp_path, monkeypatch
):
    monkeypatch.setattr("mpp.models.families.wan.Wan.load_transformer", lambda self: pytest.fail("loaded"))
    settings = ["data.preservation.rate=0.5", "data.preservation.caption=''"]
    with pytest.raises(ValueError, match="needs a prior"):
        helpers.train(pipeline, other_captions, tmp_path, "loss=masked", *settings)
    with pytest.raises(ValueError, match="would train on the images of the preservation samples"):
        helpers.train(pipeline, other_captions, tmp_path, "loss=binary", "loss.mask_min_weight=0.05", *settings)
    with pytest.raises(ValueError, match="scales by the mask's mean over the batch"):
        uneven = ["loss.area_scale_beta=0.5", "loss.normalization=global"]
        helpers.train(pipeline, other_captions, tmp_path, "loss=binary", *uneven, *settings)


@pytest.mark.slow
def test_training_with_preservation_lowers_the_drift_of_the_other_captions(pipeline, other_captions, tmp_path, caplog):
    architecture = helpers.architecture(pipeline)

    def drift(out, *settings):
        _, module = helpers.train(
            pipeline, other_captions, out, "loss=threshold", "trainer.max_steps=30", "optimizer.lr=1e-2", *settings
        )
        data = datamodule(architecture, other_captions, rate=0.5, caption="")
        samples = data.visits()
        found = [samples[Visit(i, 0)] for i in (8, 10)]
        batch = Collate(architecture)(found)
        module.val_metrics.reset()
        module.validation_step(batch, 0)
        return module.val_metrics.compute()["drift"]

    caplog.set_level("INFO", logger="mpp")
    without = drift(tmp_path / "without")
    kept = drift(tmp_path / "with", "data.preservation.rate=0.5", "data.preservation.caption=''")
    assert kept < 0.7 * without
    assert "preservation: 8 more samples per epoch (50%) from a pool of 8" in caplog.text
    assert "nothing is learned" not in caplog.text
