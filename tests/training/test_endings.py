"""Signals to real processes of the real command, and losses that are not finite."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpp.lora.writing import step_of_lora
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import train

REPOSITORY = Path(__file__).parents[2]
FOREVER = ["trainer.max_steps=100000", "callbacks.checkpoints.every_n_steps=100000", "trainer.log_every_n_steps=1"]


class Run:
    """`python -m mpp.train` in a process group of its own, waited for until it has taken a few steps."""

    def __init__(self, pipeline, cache, out, *settings, steps=3):
        words = [
            "model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={cache}", f"output_dir={out}",
            "lora.rank=4", "optimizer.lr=1e-3", "data.batch_size=2", "trainer.precision=32-true",
            "trainer.accelerator=cpu", "logger=csv", "trainer.enable_progress_bar=false", *FOREVER, *settings,
        ]  # fmt: skip
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mpp.train", *words], stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=environment, cwd=out.parent,
            )  # fmt: skip
        self.wait_for(lambda: self.rows() > steps)

    def wait_for(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(self.text())
            time.sleep(0.02)

    def wait_for_end_of(self, rank, seconds=20):
        end = time.monotonic() + seconds
        while Path(f"/proc/{rank}").exists() and ") Z " not in Path(f"/proc/{rank}/stat").read_text():
            assert time.monotonic() < end, "a process of the run is left over"
            time.sleep(0.1)

    def rows(self):
        return sum(len(path.read_text().splitlines()) - 1 for path in self.out.glob("csv/*/metrics.csv"))

    def text(self):
        return self.log.read_text()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ranks(self):
        """Process ids of both ranks."""
        own = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_second_rank(path, self.process.pid)]
        return [self.process.pid, *own]

    def end(self, seconds=60):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end: {self.text()}")


def _is_second_rank(process, parent):
    try:
        status, environment = (process / "status").read_text(), (process / "environ").read_bytes()
    except OSError:  # of somebody else, or gone
        return False
    return f"PPid:\t{parent}\n" in status and b"LOCAL_RANK=1" in environment


def assert_saved_and_exact(run, pipeline, prepared, straight, *settings):
    step = int(re.search(r"saved at step (\d+); go on with: python -m mpp.train (.*)", run.text())[1])
    assert read_checkpoint(run.out / "checkpoints" / "last.ckpt")["global_step"] == step
    assert step_of_lora(run.out / "lora.safetensors") == step
    train(pipeline, prepared, straight, f"trainer.max_steps={step}", *settings)
    one, two = (load_file(folder / "lora.safetensors") for folder in (straight, run.out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        (signal.SIGINT, True, 2),
        (signal.SIGTERM, True, 2),
        (signal.SIGTERM, False, 0),
        (signal.SIGINT, False, 2),
        (signal.SIGHUP, True, 0),
    ],
)
def test_a_signal_ends_a_run_after_its_step_saved(pipeline, prepared, tmp_path, number, group, workers):
    run = Run(pipeline, prepared, tmp_path / "run", f"data.num_workers={workers}")
    (os.killpg if group else os.kill)(run.process.pid, number)
    assert run.end() == 128 + number
    assert "Traceback" not in run.text()
    assert_saved_and_exact(run, pipeline, prepared, tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["rank 0", "rank 1", "the group"])
def test_a_signal_to_any_of_two_processes_ends_both_saved(pipeline, prepared, tmp_path, number, to):
    run = Run(pipeline, prepared, tmp_path / "run", "trainer.strategy=ddp", "trainer.devices=2", "data.num_workers=1")
    ranks = run.ranks()
    assert len(ranks) == 2
    if to == "the group":
        os.killpg(run.process.pid, number)
    else:
        os.kill(ranks[int(to[-1])], number)
    assert run.end() == 128 + number
    assert "Traceback" not in run.text()
    assert run.text().count("saved at step") == 1
    step = int(re.search(r"saved at step (\d+)", run.text())[1])
    assert read_checkpoint(run.out / "checkpoints" / "last.ckpt")["global_step"] == step
    assert step_of_lora(run.out / "lora.safetensors") == step
    run.wait_for_end_of(ranks[1])


@pytest.mark.slow
def test_slurms_signal_saves_and_the_run_goes_on_and_leaves_no_checkpoint_of_lightning(
    pipeline, prepared, tmp_path, monkeypatch
):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1",
                        "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run = Run(pipeline, prepared, tmp_path / "run")
    os.kill(run.process.pid, signal.SIGUSR1)
    run.wait_for((run.out / "lora.safetensors").is_file)
    rows = run.rows()
    run.wait_for(lambda: run.rows() > rows + 2)
    first = step_of_lora(run.out / "lora.safetensors")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert step_of_lora(run.out / "lora.safetensors") > first
    assert not list(tmp_path.rglob("hpc_ckpt_*"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(pipeline, prepared, tmp_path):
    """A step of 4,000 batches takes longer than the test."""
    window = ["data.batch_size=1", "trainer.accumulate_grad_batches=4000"]
    run = Run(pipeline, prepared, tmp_path / "run", *window, steps=-1)
    run.wait_for(lambda: "masked prior preservation" in run.text())
    time.sleep(1)
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.5)
    if run.process.poll() is None:
        os.kill(run.process.pid, signal.SIGINT)
    assert run.end(5) in (-signal.SIGINT, 128 + signal.SIGINT)


def test_a_run_that_is_stopped_before_its_first_step_says_so(pipeline, prepared, tmp_path):
    """The signal comes where the trainer is set up: here from a callback of the run."""
    settings = ["+callbacks.stop._target_=tests.training.test_endings.SignalAtSetup"]
    with pytest.raises(SystemExit) as ended:
        train(pipeline, prepared, tmp_path, *settings)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("*.ckpt"))


def SignalAtSetup():  # noqa: N802 (stands for a class)
    from lightning.pytorch.callbacks import LambdaCallback

    return LambdaCallback(on_fit_start=lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_process_is_one_message_of_the_other(pipeline, prepared, tmp_path, rank):
    run = Run(pipeline, prepared, tmp_path / "run", "trainer.strategy=ddp", "trainer.devices=2")
    ranks = run.ranks()
    os.kill(ranks[rank], signal.SIGKILL)
    assert run.end() == (1 if rank else -signal.SIGKILL)
    run.wait_for_end_of(ranks[1])
    assert "error: another process of this run has ended" in run.text()
    assert "No checkpoint was written" in run.text()
    assert "Traceback" not in run.text()


def test_what_killed_runs_left_is_removed_and_nothing_else(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "trainer.max_steps=2")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".csv"}
    for folder in (tmp_path, tmp_path / "lora", tmp_path / "checkpoints"):
        (folder / f".last.ckpt.{random.Random(str(folder)).randbytes(8).hex()}.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    train(pipeline, prepared, tmp_path, "trainer.max_steps=2", "ckpt_path=last", "logger.csv.version=csv/again")
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["notes.tmp"]
    assert {path: path.read_bytes() for path in kept} == kept


def test_an_output_folder_that_cannot_be_written_is_said_before_the_transformer_is_loaded(
    pipeline, prepared, tmp_path, monkeypatch
):
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output_dir=.* cannot be written \(.*choose another folder"):
        train(pipeline, prepared, tmp_path / "file" / "run")


# ---------------------------------------------------------------- numbers that are not finite


def broken_latents(cache, folder, key):
    """A copy of a cache whose loss overflows for one sample: finite latents, but of a size that squares to infinity."""
    import shutil

    shutil.copytree(cache, folder)
    path = folder / "latents" / f"{key}.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    save_file({name: tensor * 0 + 1e30 for name, tensor in tensors.items()}, path, metadata=metadata)
    return folder


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 3))])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_sample(pipeline, prepared, tmp_path, seed):
    random_ = random.Random(seed)
    key = f"p{random_.randrange(8)}"
    cache = broken_latents(prepared, tmp_path / "cache", key)
    every, window = random_.choice([1, 2, 100]), random_.choice([1, 2])
    settings = ["data.batch_size=1", f"trainer.accumulate_grad_batches={window}", "trainer.max_steps=20",
                f"callbacks.checkpoints.every_n_steps={every}", f"seed={seed}"]  # fmt: skip
    with pytest.raises(ValueError, match=rf"the loss of step \d+ is not finite \(samples: {key}\)") as error:
        train(pipeline, cache, tmp_path / "run", *settings)
    step = int(re.search(r"step (\d+) is not", str(error.value))[1])
    files = sorted((tmp_path / "run").rglob("*.safetensors"))
    for file in files:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
        assert step_of_lora(file) < step
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if every < step:
        good = read_checkpoint(last)["global_step"]
        assert good == (step - 1) // every * every
        assert f"{last} is of step {good} and good" in str(error.value)
    else:
        assert "no checkpoint was written" in str(error.value)
        assert not files


def test_an_adapter_that_is_not_finite_is_not_written_over_a_good_one(pipeline, prepared, tmp_path):
    train(pipeline, prepared, tmp_path, "trainer.max_steps=2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"not finite.*last.ckpt is of step 2 and good"):
        train(pipeline, prepared, tmp_path, "ckpt_path=last", "trainer.max_steps=3", "logger=tensorboard",
              "+callbacks.breaks._target_=tests.training.test_endings.BreaksWeights")  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before


def BreaksWeights():  # noqa: N802 (stands for a class)
    from lightning.pytorch.callbacks import LambdaCallback

    def spoil(_, module, optimizer):
        next(p for p in module.parameters() if p.requires_grad).data.fill_(float("nan"))

    return LambdaCallback(on_before_zero_grad=spoil)
