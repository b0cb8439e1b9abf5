"""Runs whose blocks wait in the CPU's memory, with a teacher in lockstep: what comes of them, and how they end."""

import os
import random
import signal
import threading

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file

from mpp.core import draws
from mpp.lora.writing import step_of_lora
from mpp.memory import streaming
from mpp.models.experts import Experts
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import prepare, train
from tests.memory.poison import Poison
from tests.training.test_chains import again, assert_equal_runs, logged_in
from tests.training.test_ddp import launch
from tests.training.test_endings import Run, assert_saved_and_exact

MORE = [pytest.mark.slow, pytest.mark.draws]
LOCKSTEP = ["memory.resident=2", "memory.teacher=lockstep"]
SAMPLES = ["sampling.width=32", "sampling.height=32", "sampling.steps=1", "sampling.prompts=[a box]"]
HERE = "tests.memory.test_streamed_runs"


class Visible(Poison):
    """One that shows what waits, as a GPU's does: whoever reads weights between passes reads the CPU's."""

    def waiting(self, kept):
        return list(kept)


@pytest.fixture
def poison(monkeypatch):
    """Weights that are not there are not numbers."""
    monkeypatch.setattr(streaming, "link_to", lambda _: Poison())


def measured(run):
    """All that was measured of training and validation, by name and step, over all parts of a run."""
    rows = [row for part in sorted(run.glob("csv/*")) for row in logged_in(part)]
    return {
        (name, row["step"]): value for row in rows for name, value in row.items() if name.startswith(("train/", "val/"))
    }


def assert_all_equal(straight, other):
    assert_equal_runs(straight, other)
    assert measured(straight) == measured(other)
    for file in straight.glob("samples/*/*.png"):
        assert file.read_bytes() == (other / file.relative_to(straight)).read_bytes(), file


def drawn(seed):
    """Settings of a run; and for each of two parts of it where blocks wait and when the teacher runs."""
    draw = random.Random(seed)
    base = draw.choice(["bf16", "fp8", "int8", "nf4"])
    settings = [
        f"memory.base={base}",
        f"lora={draw.choice(['lora'] if base == 'nf4' else ['lora', 'lokr', 'loha'])}",
        f"trainer.accumulate_grad_batches={draw.choice([1, 2])}",
        f"callbacks.ema.decay={draw.choice(['null', 0.5])}",
        f"memory.activations={draw.choice(['checkpoint', 'offload'])}",
        f"loss={draw.choice(['threshold', 'continuous'])}",
        "data.val_fraction=0.25", "trainer.val_check_interval=2", "callbacks.samples.every_n_steps=4", *SAMPLES,
    ]  # fmt: skip
    streamed = [f"memory.resident={draw.choice([2, 3])}", "memory.teacher=lockstep"]
    other = [f"memory.resident={draw.choice([2, 3, 'all'])}", f"memory.teacher={draw.choice(['apart', 'lockstep'])}"]
    return settings, (streamed, other)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "seed",
    [pytest.param(2, marks=pytest.mark.slow), *(pytest.param(seed, marks=MORE) for seed in (0, 1, *range(3, 10)))],
)
def test_a_streamed_run_and_its_resumes_are_the_resident_run_to_the_bit(deep, prepared, tmp_path, seed):
    prepare(deep, prepared.parent, *SAMPLES)
    settings, parts = drawn(seed)
    train(deep, prepared, tmp_path / "straight", *settings)
    for part, (steps, words) in enumerate(zip((2, 4), parts, strict=True)):
        train(deep, prepared, tmp_path / "parts", *settings, *words, f"trainer.max_steps={steps}", *again(part))
    assert_all_equal(tmp_path / "straight", tmp_path / "parts")
    assert list(tmp_path.glob("parts/samples/*4/*_lora.png"))


@pytest.mark.slow
def test_loras_that_are_written_beside_training_have_the_values_of_whole_weights(deep, prepared, tmp_path, monkeypatch):
    """For ComfyUI a DoRA is divided by the norms of weights which are not on the device between steps."""
    monkeypatch.setattr(streaming, "link_to", lambda _: Visible())
    settings = ["lora=dora", "export.formats=[comfyui]", "trainer.max_steps=2"]
    for run, words in (("resident", []), ("streamed", LOCKSTEP)):
        train(deep, prepared, tmp_path / run, *settings, *words)
    files = [path.relative_to(tmp_path / "resident") for path in tmp_path.glob("resident/**/*.safetensors")]
    assert any(file.name == "lora_comfyui.safetensors" for file in files)
    for file in files:
        wanted, found = load_file(tmp_path / "resident" / file), load_file(tmp_path / "streamed" / file)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), file


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("words", [LOCKSTEP, pytest.param(["memory.teacher=lockstep"], marks=MORE)])
def test_experts_that_share_a_device_learn_as_if_both_were_there(deep, prepared, tmp_path, monkeypatch, words):
    routes, original = [], Experts.route
    monkeypatch.setattr(Experts, "route", lambda *a: routes.append(original(*a)) or routes[-1])
    both = ["model.expert=both", "model.boundary=0.8", "validate_first=false", "trainer.max_steps=6"]
    train(deep, prepared, tmp_path / "resident", *both, "model.offload=false")
    train(deep, prepared, tmp_path / "shared", *both, "model.offload=true", *words)
    assert_all_equal(tmp_path / "resident", tmp_path / "shared")
    assert all(len(found) == 1 for found in routes)
    assert {name for found in routes for name in found} == {"low", "high"}


# ---------------------------------------------------------------- ends before the time


class Moments:
    """Whose pass each block's call belongs to, and how many steps were saved by then; something may happen in one."""

    def __init__(self, monkeypatch, out, at=None, happens=None):
        self.seen, self.threads = [], set(threading.enumerate())
        good = WanTransformerBlock.forward

        def forward(block, *args, **kwargs):
            self.seen.append((self._whose(), len(list(out.glob("lora/step-??????.safetensors")))))
            if len(self.seen) - 1 == at:
                happens()
            return good(block, *args, **kwargs)

        monkeypatch.setattr(WanTransformerBlock, "forward", forward)

    @staticmethod
    def _whose():
        if torch.is_inference_mode_enabled():
            return "validation"
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "student" if threading.current_thread() is threading.main_thread() else "teacher"

    def assert_nobody_is_left(self):
        assert set(threading.enumerate()) <= self.threads

    def drawn(self, whose, seed, *, saved):
        """The number of a call in that pass, and of the steps saved before."""
        fit = [number for number, found in enumerate(self.seen) if found[0] == whose and found[1] in saved]
        number = random.Random(f"{whose} {seed}").choice(fit)
        return number, self.seen[number][1]


BRIEF = ["trainer.max_steps=3", "callbacks.checkpoints.every_n_steps=1", *LOCKSTEP]
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(scope="module")
def undisturbed(deep, prepared, tmp_path_factory):
    """A run's folder, and its moments."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "link_to", lambda _: Poison())
        moments = Moments(patch, out)
        train(deep, prepared, out, *BRIEF, *again(0))
    return out, moments


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("whose", "error", "said"), [
    pytest.param("teacher", RuntimeError("drawn"), "drawn", marks=pytest.mark.slow),
    pytest.param("backward", RuntimeError("drawn"), "drawn", marks=MORE),
    pytest.param("student", RuntimeError("drawn"), "drawn", marks=MORE),
    pytest.param("teacher", torch.OutOfMemoryError(FULL), "out of memory", marks=pytest.mark.slow),
    pytest.param("backward", torch.OutOfMemoryError(FULL), "out of memory", marks=MORE),
])  # fmt: skip
def test_an_error_in_a_block_ends_the_run_with_what_was_saved_and_it_goes_on_as_if_nothing_happened(
    deep, prepared, undisturbed, tmp_path, whose, error, said
):
    at, saved = undisturbed[1].drawn(whose, said, saved=(1, 2))

    def fail():
        raise error

    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, tmp_path, at, fail)
        with pytest.raises(RuntimeError if said == "drawn" else ValueError, match=said):
            train(deep, prepared, tmp_path, *BRIEF, *again(0))
    assert moments.seen[: at + 1] == undisturbed[1].seen[: at + 1]
    moments.assert_nobody_is_left()
    assert read_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == saved
    assert step_of_lora(tmp_path / "lora.safetensors") == saved
    train(deep, prepared, tmp_path, *BRIEF, *again(1))
    assert_equal_runs(undisturbed[0], tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("whose", ["teacher", *(pytest.param(whose, marks=MORE) for whose in ("student", "backward"))])
def test_ctrl_c_in_a_block_ends_the_run_after_its_step(deep, prepared, undisturbed, tmp_path, whose):
    at, saved = undisturbed[1].drawn(whose, "signal", saved=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, tmp_path, at, interrupt)
        with pytest.raises(SystemExit) as ended:
            train(deep, prepared, tmp_path, *BRIEF, *again(0))
    assert ended.value.code == 128 + signal.SIGINT
    moments.assert_nobody_is_left()
    assert read_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == saved + 1
    train(deep, prepared, tmp_path, *BRIEF, *again(1))
    assert_equal_runs(undisturbed[0], tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=MORE) for seed in range(1, 6))])
def test_ctrl_c_in_the_first_validation_ends_at_once(deep, prepared, tmp_path, monkeypatch, seed):
    moments = Moments(monkeypatch, tmp_path, at := random.Random(seed).randrange(30), interrupt)
    with pytest.raises(SystemExit) as ended:
        train(deep, prepared, tmp_path, *BRIEF, "data.val_fraction=0.25", *again(0))
    assert ended.value.code == 128 + signal.SIGINT
    assert {whose for whose, _ in moments.seen} == {"validation"}
    assert len(moments.seen) == at + 1
    moments.assert_nobody_is_left()
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_process_that_is_interrupted_ends_saved(deep, prepared, tmp_path):
    run = Run(deep, prepared, tmp_path / "run", *LOCKSTEP, steps=random.Random(0).randint(0, 9))
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end(20) == 128 + signal.SIGINT
    assert "Traceback" not in run.text()
    assert_saved_and_exact(run, deep, prepared, tmp_path / "straight")


# ---------------------------------------------------------------- several processes, and what is refused


class Poisoned(Callback):
    """Poison in each process of a run; DDP is to leave alone what is not trained."""

    def __init__(self):
        streaming.link_to = lambda _: Poison()

    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy):
            frozen = {name for name, p in pl_module.named_parameters() if not p.requires_grad}
            assert frozen
            assert frozen <= trainer.strategy.model.parameters_to_ignore


@pytest.mark.slow
@pytest.mark.draws  # half a minute
def test_two_processes_have_the_gradient_of_one_whose_blocks_all_stay(deep, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(draws, "order", lambda count, *_: list(range(count)))
    base = [
        "loss=continuous", "trainer.max_steps=2", "trainer.gradient_clip_val=null",
        "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1",
    ]  # fmt: skip
    train(deep, prepared, tmp_path / "alone", *base, "data.batch_size=1", "trainer.accumulate_grad_batches=2")
    ranks = ["data.batch_size=1", "trainer.strategy=ddp", "trainer.devices=2"]
    ranks += [f"+callbacks.poison._target_={HERE}.Poisoned"]
    ended = launch([deep, str(prepared), str(tmp_path / "ranks"), *base, *ranks, *LOCKSTEP], 2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    wanted, found = (load_file(tmp_path / run / "lora.safetensors") for run in ("alone", "ranks"))
    for name in wanted:
        torch.testing.assert_close(wanted[name], found[name], rtol=1e-4, atol=1e-7)


def test_blocks_that_wait_with_kept_activations_are_refused_before_anything_is_loaded(
    deep, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"^memory.resident=2 needs memory.activations=checkpoint or offload.*$"):
        train(deep, prepared, tmp_path / "run", "memory.resident=2", "memory.activations=keep")
    assert not list(tmp_path.iterdir())
