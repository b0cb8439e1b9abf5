"""A run that starts from a LoRA: exactly, or with what its rank cannot hold said."""

import logging
import random

import pytest
import torch
from safetensors.torch import save_file

from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.lora.files import updates
from mpp.lora.starting import Start
from mpp.lora.writing import save_lora
from tests.helpers import architecture as tiny
from tests.helpers import randomise_adapter, train
from tests.lora import foreign
from tests.lora.test_export import predict
from tests.lora.test_reading import delta


def started(arch, adapter, seed=7):
    """A model whose fresh adapter was filled."""
    model = arch.load_transformer()
    inject(model, adapter, arch.lora_targets, seed=seed)
    Start.read(adapter, arch).fill(model)
    return model


def finished(arch, folder, **settings):
    """A model with a random adapter, and its file."""
    model = arch.load_transformer()
    inject(model, Adapter(**settings), arch.lora_targets, seed=0)
    randomise_adapter(model, 0.2)
    (file,) = save_lora(folder / "lora.safetensors", model, adapter_state(model), {"family": arch.family})
    return model, file


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr", "loha"])
@pytest.mark.parametrize("alpha", [pytest.param(4, marks=pytest.mark.slow), 7])
def test_a_start_from_a_finished_run_is_its_student_bit_for_bit(pipeline, tmp_path, kind, alpha):
    arch, settings = tiny(pipeline), {"kind": kind, "rank": 4, "alpha": alpha}
    model, file = finished(arch, tmp_path, **settings)
    again = started(arch, Adapter(**settings, init=str(file)))
    assert torch.equal(predict(arch, again), predict(arch, model))
    for name, tensor in adapter_state(model).items():
        assert torch.equal(adapter_state(again)[name], tensor), name


def matrices(model):
    return {name: u.scale * delta(u.factors) for name, u in updates(model, adapter_state(model)).items()}


@pytest.mark.parametrize("seed", [0, 4, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 7))])
def test_another_rank_and_scale_is_the_nearest_update_and_its_error_is_said(pipeline, tmp_path, caplog, seed):
    draws, arch = random.Random(seed), tiny(pipeline)
    was, now = draws.sample(range(1, 9), 2)
    kinds = draws.choices(["lora", "rslora"], k=2)
    model, file = finished(arch, tmp_path, kind=kinds[0], rank=was, alpha=draws.randint(1, 20))
    with caplog.at_level(logging.INFO):
        again = started(arch, Adapter(kind=kinds[1], rank=now, alpha=draws.randint(1, 20), init=str(file)))
    wanted, got = matrices(model), matrices(again)
    assert got.keys() == wanted.keys()
    squares = []
    for name, matrix in wanted.items():
        values = torch.linalg.svdvals(matrix.double())
        lost = values[now:].norm()  # the least that any matrix of that rank can miss (Eckart and Young)
        torch.testing.assert_close((got[name].double() - matrix).norm(), lost, rtol=1e-3, atol=1e-4)
        squares.append(float(lost / values.norm()) ** 2)
    error = (sum(squares) / len(squares)) ** 0.5
    assert ("its rank is cut" in caplog.text) == (now < was)
    if now < was:
        said = float(caplog.text.split("the updates change by ")[1].split()[0])
        assert said == pytest.approx(error, rel=0.06)
    else:  # the ranks beyond the file's can learn: one of their factors is not 0
        fresh = arch.load_transformer()
        inject(fresh, Adapter(rank=now), arch.lora_targets, seed=7)
        for name, tensor in adapter_state(again).items():
            if name.endswith("lora_A.weight"):
                assert torch.equal(tensor[was:], adapter_state(fresh)[name][was:])


def test_modules_that_the_file_lacks_start_fresh_and_those_that_the_run_lacks_are_named(pipeline, tmp_path, caplog):
    arch = tiny(pipeline)
    names = foreign.drawn({"blocks.0.attn1.to_q": (64, 64), "blocks.1.attn2.to_k": (64, 64)})
    path = tmp_path / "some.safetensors"
    save_file({n: t.contiguous() for n, t in foreign.FORMS["diffusers with alpha"](names).items()}, path)
    with caplog.at_level(logging.INFO):
        model = started(arch, Adapter(rank=6, alpha=3, init=str(path)))
    got = matrices(model)
    for name, matrix in got.items():
        wanted = names[name][2] * names[name][1] @ names[name][0] if name in names else torch.zeros_like(matrix)
        torch.testing.assert_close(matrix, wanted, rtol=1e-4, atol=1e-5)
    assert f"{len(got) - 2} modules have no LoRA there" in caplog.text
    with pytest.raises(
        ValueError, match=r"lora.init=.*some.*has blocks.1.attn2.to_k, for which this run has no adapter"
    ):
        Start.read(Adapter(targets=["attn1.to_q"], init=str(path)), arch)


@pytest.mark.parametrize(("theirs", "ours", "message"), [
    ({"kind": "lora"}, {"kind": "dora"}, "is a lora, this run trains a dora; choose lora=lora"),
    ({"kind": "dora"}, {"kind": "lora"}, "is a dora, this run trains a lora; choose lora=dora"),
    ({"kind": "lokr", "rank": 4}, {"kind": "lora"}, "is a lokr"),
    ({"kind": "dora", "rank": 4}, {"kind": "dora", "rank": 8}, "is a DoRA of rank 4; set lora.rank=4"),
    ({"kind": "lokr", "rank": 2}, {"kind": "lokr", "rank": 3}, r"is \(.*\), this run's \(.*set lora.rank"),
])  # fmt: skip
def test_what_cannot_be_taken_is_refused_before_anything_loads(pipeline, tmp_path, monkeypatch, theirs, ours, message):
    arch = tiny(pipeline)
    finished(arch, tmp_path, **theirs)
    monkeypatch.setattr(type(arch), "load_transformer", None)
    with pytest.raises(ValueError, match=message):
        Start.read(Adapter(**ours, init=str(tmp_path)), arch)


def test_a_run_starts_from_a_lora_and_goes_on_without_the_file(pipeline, prepared, tmp_path):
    first = train(pipeline, prepared, tmp_path / "first", "optimizer.lr=0.01", "trainer.max_steps=3")[1]
    file = tmp_path / "a first.safetensors"
    (tmp_path / "first" / "lora.safetensors").rename(file)
    second = ("optimizer.lr=0", f"lora.init={file}", "seed=4")
    module = train(pipeline, prepared, tmp_path / "second", *second, "trainer.max_steps=1")[1]
    for name, tensor in adapter_state(first.transformer).items():
        assert torch.equal(adapter_state(module.transformer)[name], tensor), name
    assert not module.trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].isnan().any()  # a fresh optimizer
    file.unlink()
    train(
        pipeline,
        prepared,
        tmp_path / "second",
        *second[::2],
        f"resume={tmp_path / 'second'}",
        "logger.csv.version=2",
        "trainer.max_steps=2",
    )
    with pytest.raises(ValueError, match=r"lora=.*first.safetensors is not there"):
        train(pipeline, prepared, tmp_path / "third", *second)
