"""The module under Lightning's own Trainer, on batches given by hand: what is counted, said, measured and restored."""

from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from mpp.core.loss import MaskedPriorLoss
from mpp.training.teacher import Teacher
from tests.helpers import batch, corrupted, four_masks, module

pytestmark = pytest.mark.filterwarnings("ignore:You (defined a `validation_step`|are trying to `validate`)")
THRESHOLD = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
FULL = torch.ones(2, 1, 1, 4, 4)


class TwoEqualRanks(SingleDeviceStrategy):
    """What one of two processes sees whose batches are the same: every sum over both is twice its own."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.world_size = 2

    def reduce(self, tensor, *_args, **_settings):
        return 2 * tensor


class Given:
    """Batches by hand; Lightning takes a list for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Reports(Callback):
    """What was logged, by batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(**settings):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"max_epochs": 1, "log_every_n_steps": 1, **settings}
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **settings)


def fit(built, batches, *, ckpt_path=None, **settings):
    reports = Reports()
    trainer(callbacks=[reports], **settings).fit(built, Given(batches), ckpt_path=ckpt_path, weights_only=True)
    return reports.rows


def validate(built, batches):
    (values,) = trainer().validate(built, Given(batches), verbose=False)
    return values


@pytest.fixture
def passes(architecture, monkeypatch):
    """Sigmas of each pass through the transformer, and whether it was the teacher's."""
    seen, good = [], type(architecture).velocity

    def spy(self, transformer, noisy, sigma, conditioning):
        seen.append(sigma.tolist())
        return good(self, transformer, noisy, sigma, conditioning)

    monkeypatch.setattr(type(architecture), "velocity", spy)
    return seen


def test_each_report_is_of_the_batches_since_the_last_one(architecture):
    means = (0.25, 1.0, 0.5, 0.75)
    batches = [batch(torch.full((2, 1, 1, 4, 4), mean)) for mean in means]
    rows = fit(module(architecture), batches)
    assert [row["train/mask_mean"] for row in rows] == pytest.approx(means)
    rows = fit(module(architecture), batches, log_every_n_steps=2)
    assert [row["train/mask_mean"] for row in rows[1::2]] == pytest.approx([0.625, 0.625])
    assert "train/mask_mean" not in rows[0]


def test_learning_nothing_is_said_once_and_only_where_something_was_meant_to_teach(architecture, caplog):
    nothing = batch(torch.zeros(2, 1, 1, 4, 4))
    fit(module(architecture), [nothing] * 3)
    assert caplog.text.count("nothing is learned: every mask since the last report is empty") == 1
    caplog.clear()
    fit(module(architecture), [replace(nothing, preserved=2)])
    fit(module(architecture), [nothing, batch(FULL)], log_every_n_steps=2)
    assert "nothing is learned" not in caplog.text


def test_samples_of_all_ranks_are_counted_and_two_equal_ranks_learn_what_one_does(architecture):
    batches, found = [batch(four_masks(), seed=seed) for seed in (0, 1)], []
    for strategy, ranks in (("auto", 1), (TwoEqualRanks(), 2)):
        built = module(architecture, THRESHOLD)
        rows = fit(built, batches, strategy=strategy)
        assert built.samples_seen == 8 * ranks
        found.append(([row["train/loss"] for row in rows], built.state_dict()))
    (one, alone), (two, both) = found
    assert two == pytest.approx(one, rel=1e-6)
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-5, atol=1e-7)


def test_validation_does_not_count_what_only_keeps_the_ranks_in_step(architecture):
    built = module(architecture, THRESHOLD)
    one, other = (batch(four_masks(), seed=seed) for seed in (0, 1))
    alone = validate(built, [one])
    assert validate(built, [one, replace(other, counted=False)]) == alone
    assert validate(built, [one, other])["val/loss"] != alone["val/loss"]


def test_whether_the_teacher_runs_is_decided_on_the_hosts_copy_of_the_mask(architecture, passes):
    keeps, learns = four_masks()[[0]], torch.ones(1, 1, 1, 8, 8)
    for device, host, count in ((keeps, keeps, 2), (learns, keeps, 2), (keeps, learns, 1)):
        passes.clear()
        data = replace(batch(device), host_mask=host)
        fit(module(architecture, THRESHOLD), [data])
        assert len(passes) == count
        assert data.to("meta").host_mask is host


def test_a_validation_is_of_its_own_batches_alone(architecture):
    half = FULL.clone()
    half[..., :2] = 0
    built, first, second = module(architecture, THRESHOLD), [batch(FULL)], [batch(half, seed=1)]
    validate(built, first)
    assert validate(built, second) == validate(module(architecture, THRESHOLD), second)


def test_validation_sees_exactly_the_sigmas_that_were_asked_for(architecture, passes):
    validate(module(architecture, THRESHOLD, val_sigmas=[0.3, 0.7]), [batch(FULL)])
    assert passes == [pytest.approx([sigma] * 2, rel=1e-7) for sigma in (0.3, 0.7)]


def test_validation_sees_the_middles_of_four_equally_likely_ranges_by_default(architecture, passes):
    validate(module(architecture, THRESHOLD), [batch(FULL)])
    odds = [torch.tensor(NormalDist().inv_cdf(q)).double().exp().item() for q in (0.125, 0.375, 0.625, 0.875)]
    shifted = [3 * odd / (1 + 3 * odd) for odd in odds]  # WAN's law: logit-normal, shifted by 3
    assert passes == [pytest.approx([sigma] * 2, rel=1e-6) for sigma in shifted]


def test_each_epoch_draws_anew(architecture, passes):
    fit(module(architecture, THRESHOLD), [batch(FULL)], max_epochs=3)
    assert len(passes) == 3
    assert len({sigma for sigmas in passes for sigma in sigmas}) == 6


def test_a_teacher_in_eval_mode_leaves_train_mode_behind_also_after_an_error(architecture):
    built, data = module(architecture, THRESHOLD), batch(four_masks())
    noisy = corrupted(built, data)
    before = [part.training for part in built.transformer.modules()]
    broken = replace(data.conditioning, text=data.conditioning.text[:, :, :5])
    with pytest.raises(RuntimeError):
        Teacher(eval_mode=True).predict(architecture, built.transformer, noisy, broken, range(4))
    assert all(before)
    assert [part.training for part in built.transformer.modules()] == before


def test_a_checkpoint_of_another_base_is_refused_also_where_nothing_looked_at_it_before(architecture, tmp_path):
    built, batches = module(architecture, THRESHOLD), [batch(four_masks())]
    made = trainer(max_steps=1)
    made.fit(built, Given(batches))
    made.save_checkpoint(tmp_path / "good.ckpt")
    content = torch.load(tmp_path / "good.ckpt", weights_only=True)
    content["mpp"]["base"] = content["mpp"]["base"][::-1]
    torch.save(content, tmp_path / "other.ckpt")
    fit(module(architecture, THRESHOLD), batches, ckpt_path=tmp_path / "good.ckpt", max_epochs=2)
    with pytest.raises(ValueError, match="trained on another base model"):
        fit(module(architecture, THRESHOLD), batches, ckpt_path=tmp_path / "other.ckpt")
