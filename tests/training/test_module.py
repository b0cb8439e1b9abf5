import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter, adapters_off
from mpp.memory.settings import Memory
from mpp.training.step import Position
from mpp.training.teacher import Teacher
from tests.helpers import (
    batch,
    corrupted,
    four_masks,
    loss_of,
    module,
    randomise_adapter,
    student_of,
    teacher_of,
)

THRESHOLD = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
CONTINUOUS = MaskedPriorLoss(1.0, None, 0.7, normalization="per_sample")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def train(built, data, steps, autocast=None):
    optimizer = built.configure_optimizers()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = loss_of(built, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("autocast", [None, "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [THRESHOLD, CONTINUOUS], ids=["threshold", "continuous"])
def test_student_at_init_has_zero_prior_loss(pipeline, loss, dtype, autocast):
    from tests.helpers import architecture

    built = module(architecture(pipeline, f"model.dtype={dtype}"), loss)
    masks = four_masks()
    masks[[1, 3]] = masks[[0, 2]]  # all four have something to preserve, so the teacher sees the whole batch
    data = batch(masks)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        noisy = corrupted(built, data)
        prior = teacher_of(built, noisy, data)
        pred = student_of(built, noisy, data)
    assert torch.equal(prior, pred)
    assert built.loss(pred, noisy.target, data.mask, prior).prior.detach() == 0


def test_teacher_is_the_unadapted_base_bit_for_bit_after_50_steps(architecture):
    built = module(architecture, THRESHOLD, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = batch(four_masks()[[0, 2]])
    noisy = corrupted(built, data)
    with torch.no_grad():
        base = architecture.velocity(architecture.load_transformer(), noisy.latents, noisy.sigma, data.conditioning)
    train(built, data, 50)
    with torch.no_grad():
        student = student_of(built, noisy, data)
    assert torch.equal(teacher_of(built, noisy, data), base)
    assert not torch.allclose(student, base, atol=1e-2)


def test_what_a_window_divides_by_is_counted_and_reduced_once(architecture, monkeypatch):
    built, counted, reduced = module(architecture, CONTINUOUS), [], []
    good = MaskedPriorLoss.normalizers

    def reduce(sums, reduce_op):
        assert reduce_op == "sum"
        reduced.append(sums)
        return 2 * sums  # the other rank has the same

    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3, strategy=SimpleNamespace(reduce=reduce))
    monkeypatch.setattr(MaskedPriorLoss, "normalizers", lambda *a: counted.append(a) or good(*a))
    built._trainer = trainer
    windows = [[batch(four_masks().roll(number, 0), seed=number) for number in range(3)] for _ in range(2)]
    for window in windows:
        masks = tuple(data.mask for data in window)
        parts = [replace(data, window=masks).to("cpu") for data in window]
        found = [built.effective_batch(built.step(data, Position(0, 0)), data) for data in parts]
        alone = [built.loss.sums(t := data.latents, t, built.loss.weights(data.mask)) for data in window]
        for over, count in found:
            assert count == 6
            assert over.target_weight == 2 * sum(sums.target_weight for sums in alone)
            assert over.prior_weight == 2 * sum(sums.prior_weight for sums in alone)
    assert len(counted) == 6
    assert len(reduced) == 2
    built._trainer = None


def test_base_weights_never_change(architecture):
    built = module(architecture, THRESHOLD)
    before = weights(built.transformer)
    train(built, batch(four_masks()), 5)
    after = weights(built.transformer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_training_lowers_the_target_loss(architecture):
    built = module(architecture, THRESHOLD, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = batch(four_masks())
    first = train(built, data, 1)
    assert train(built, data, 40) < first * 0.9


def test_teacher_carries_no_graph_and_pins_no_memory(architecture):
    built = module(architecture, THRESHOLD, memory=Memory(activations="checkpoint"))
    data = batch(four_masks()[[0, 2]])
    noisy = corrupted(built, data)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        prior = teacher_of(built, noisy, data)
    assert not prior.requires_grad
    assert saved == []


def test_adapter_is_on_again_before_the_student_also_after_an_error(architecture):
    built = module(architecture, THRESHOLD)
    randomise_adapter(built.transformer)
    data = batch(four_masks())
    noisy = corrupted(built, data)
    with torch.no_grad():
        adapted = student_of(built, noisy, data)
        teacher_of(built, noisy, data)
        assert torch.equal(student_of(built, noisy, data), adapted)
        broken = replace(data.conditioning, text=data.conditioning.text[:, :, :5])
        with pytest.raises(RuntimeError):
            teacher_of(built, noisy, replace(data, conditioning=broken))
        assert torch.equal(student_of(built, noisy, data), adapted)


def test_both_passes_see_one_draw(architecture, monkeypatch):
    built = module(architecture, THRESHOLD)
    seen = []
    good = type(architecture).velocity

    def spy(self, transformer, noisy, sigma, conditioning):
        seen.append((noisy, sigma, conditioning.text))
        return good(self, transformer, noisy, sigma, conditioning)

    monkeypatch.setattr(type(architecture), "velocity", spy)
    loss_of(built, batch(four_masks()[[0, 2]]))
    teacher, student = seen
    assert all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))


@pytest.mark.parametrize(("loss", "samples"), [(THRESHOLD, [0, 2]), (CONTINUOUS, [0, 2])])
def test_teacher_runs_for_exactly_the_samples_with_something_to_preserve(architecture, monkeypatch, loss, samples):
    built = module(architecture, loss)
    randomise_adapter(built.transformer)
    sizes = []
    good = type(architecture).velocity

    def spy(self, transformer, noisy, sigma, conditioning):
        sizes.append(len(noisy))
        return good(self, transformer, noisy, sigma, conditioning)

    monkeypatch.setattr(type(architecture), "velocity", spy)
    data = batch(four_masks())
    noisy = corrupted(built, data)
    prior = built.step(data, Position(0, 0)).prior
    assert sizes == [2, 4]  # the teacher's, then the student's
    with torch.no_grad(), adapters_off(built.transformer):
        whole = good(architecture, built.transformer, noisy.latents, noisy.sigma, data.conditioning)
    torch.testing.assert_close(prior[samples], whole[samples], rtol=1e-4, atol=1e-5)
    assert prior[[1, 3]].abs().sum() == 0


def test_a_part_of_the_batch_gives_the_loss_of_the_whole(architecture):
    built = module(architecture, THRESHOLD)
    randomise_adapter(built.transformer)
    data = batch(four_masks())
    noisy = corrupted(built, data)
    with torch.no_grad():
        pred = student_of(built, noisy, data)
        part = built.loss(pred, noisy.target, data.mask, teacher_of(built, noisy, data))
        everyone = built.teacher.predict(architecture, built.transformer, noisy, data.conditioning, range(4))
        whole = built.loss(pred, noisy.target, data.mask, everyone)
    torch.testing.assert_close(part.total, whole.total, rtol=1e-5, atol=1e-6)
    assert part.prior > 0


BLURRED = [replace(CONTINUOUS, mask_blur=kernel) for kernel in (7, 13, 31, 33)]


@pytest.mark.parametrize("loss", [THRESHOLD, CONTINUOUS, *BLURRED])
def test_full_masks_and_no_prior_run_no_teacher(architecture, loss):
    data = batch(torch.ones(2, 1, 1, 8, 8))
    built = module(architecture, loss)
    output = built.step(data, Position(0, 0))
    assert output.prior is None
    assert output.taught == 0
    off = module(architecture, replace(loss, prior_weight=0.0))
    masked = batch(four_masks())
    assert off.step(masked, Position(0, 0)).prior is None


def test_gradients_reach_every_adapter_and_equal_with_checkpointing(architecture):
    data = batch(four_masks())
    grads = []
    for checkpointing in (False, True):
        built = module(architecture, THRESHOLD, memory=Memory(activations="checkpoint" if checkpointing else "keep"))
        randomise_adapter(built.transformer)
        loss_of(built, data).backward()
        grads.append({n: p.grad for n, p in built.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_train_and_eval_mode_are_left_alone_unless_asked(architecture):
    built = module(architecture, THRESHOLD, teacher=Teacher(eval_mode=True))
    built.transformer.blocks[0].eval()
    before = [m.training for m in built.transformer.modules()]
    inside = []
    built.transformer.blocks[1].register_forward_hook(lambda m, *_: inside.append(m.training))
    data = batch(four_masks())
    noisy = corrupted(built, data)
    teacher_of(built, noisy, data)
    built.teacher = Teacher()
    teacher_of(built, noisy, data)
    assert inside == [False, True]
    assert [m.training for m in built.transformer.modules()] == before


def test_what_a_sample_sees_depends_on_neither_batch_nor_order(architecture):
    built = module(architecture, THRESHOLD)
    data = batch(four_masks())
    whole = corrupted(built, data)
    for rows in ([2], [3, 1]):
        part = replace(
            data,
            keys=tuple(data.keys[r] for r in rows),
            latents=data.latents[rows],
            mask=data.mask[rows],
            conditioning=data.conditioning.select(rows),
        )
        got = corrupted(built, part)
        assert torch.equal(got.latents, whole.latents[rows])
        assert torch.equal(got.sigma, whole.sigma[rows])
    later = corrupted(built, data, epoch=1)
    assert not torch.equal(later.target, whole.target)  # the target follows the noise alone
    assert not torch.equal(later.sigma, whole.sigma)


def test_target_and_noisy_latents_belong_together(architecture):
    built = module(architecture, THRESHOLD)
    data = batch(four_masks())
    noisy = corrupted(built, data)
    clean = noisy.latents - noisy.sigma.view(-1, 1, 1, 1, 1) * noisy.target
    torch.testing.assert_close(clean, data.latents, rtol=1e-4, atol=1e-5)


def test_a_prior_without_an_adapter_is_refused(architecture):
    with pytest.raises(ValueError, match=r"lora=none: loss.prior_weight=1.0 needs an adapter"):
        module(architecture, THRESHOLD, adapter=None)
    with pytest.raises(ValueError, match="nothing to train"):
        module(architecture, MaskedPriorLoss(), adapter=None)


def test_validation_sigmas_out_of_range_are_refused(architecture):
    with pytest.raises(ValueError, match=r"val_sigmas must lie in \[0, 1\]"):
        module(architecture, THRESHOLD, val_sigmas=[0.5, 1.5])


def test_validation_is_the_same_every_time_and_measures_drift_without_a_prior(architecture):
    built = module(architecture, MaskedPriorLoss(mask_min_weight=0.05))
    data = batch(four_masks())
    values = []
    for _ in range(2):
        built.validation_step(data, 0)
        values.append(built.val_metrics.compute())
        built.val_metrics.reset()
    assert values[0] == values[1]
    assert values[0]["drift"] < 1e-12  # two of four samples have a region: rounding of another batch size
    assert values[0]["prior_loss"] == 0
    randomise_adapter(built.transformer)
    built.validation_step(data, 0)
    assert built.val_metrics.compute()["drift"] > 0


def test_drift_is_the_relative_squared_distance_over_the_prior_region(architecture):
    built = module(architecture, THRESHOLD)
    randomise_adapter(built.transformer)
    data = batch(four_masks()[[0]])
    built.val_sigmas = [0.5]
    built.validation_step(data, 0)
    noisy = corrupted(built, data, "validation 0", 0.5)
    with torch.no_grad():
        pred = student_of(built, noisy, data).double()
        base = teacher_of(built, noisy, data).double()
    outside = (data.mask < 0.1).expand_as(pred)
    want = ((pred - base)[outside] ** 2).sum() / (base[outside] ** 2).sum()
    assert built.val_metrics.compute()["drift"] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("loss", BLURRED)
def test_a_blurred_white_mask_has_no_drift(architecture, loss):
    built = module(architecture, loss)
    built.validation_step(batch(torch.ones(1, 1, 1, 8, 8)), 0)
    found = built.val_metrics.compute()
    assert (found["prior_mask_mean"], found["teacher_fraction"], found["prior_loss"]) == (0, 0, 0)
    assert "drift" not in found


def test_the_module_keeps_only_the_adapter_in_its_state(architecture):
    built = module(architecture, THRESHOLD)
    state = built.state_dict()
    assert state
    assert all("lora_" in name for name in state)
    other = module(architecture, THRESHOLD, seed=4)
    other.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_schedule_free_weights_are_exported_evaluated_and_trained_on_unchanged(architecture):
    schedulefree = pytest.importorskip("schedulefree")
    built = module(architecture, THRESHOLD)
    optimizer = schedulefree.AdamWScheduleFree([p for p in built.parameters() if p.requires_grad], lr=1e-2)
    optimizer.train()
    for _ in range(3):
        loss_of(built, batch(four_masks())).backward()
        optimizer.step()
        optimizer.zero_grad()

    class Trainer:
        optimizers = [optimizer]  # noqa: RUF012

    built._trainer = Trainer()
    before = {n: t.clone() for n, t in built.state_dict().items()}
    with built.evaluated_adapter() as state:
        exported = {n: t.clone() for n, t in state.items()}
    assert any(not torch.equal(before[n], exported[n]) for n in before)
    assert all(torch.equal(before[n], t) for n, t in built.state_dict().items())
    built._trainer = None


def test_a_layers_own_draw_is_not_compiled(architecture):
    adapter = Adapter(kind="loha", dropout=0.5)
    with pytest.raises(ValueError, match=r"compile=true does not go with lora.dropout=0.5 of lora=loha"):
        module(architecture, THRESHOLD, adapter=adapter, compile_blocks=True)


@pytest.mark.slow  # compiles for about a minute
@pytest.mark.filterwarnings("ignore")  # the compiler raises warnings of its own while tracing
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_compiled_blocks_train_like_eager_ones_without_recompiling(architecture, kind):
    data = batch(four_masks())
    grads = []
    torch.compiler.reset()
    for compiled in (False, True):
        settings = {"compile_blocks": compiled}
        built = module(architecture, THRESHOLD, adapter=Adapter(kind=kind, rank=4, alpha=4), **settings)
        randomise_adapter(built.transformer)
        for _ in range(2):
            built.zero_grad()
            with torch.compiler.set_stance("default" if not grads or _ == 0 else "fail_on_recompile"):
                loss_of(built, data).backward()
        grads.append({n.replace("_orig_mod.", ""): p.grad for n, p in built.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-6)
