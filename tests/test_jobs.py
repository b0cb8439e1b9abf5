"""Starts by the commands themselves: what a refused one leaves behind, and what each job of a sweep makes."""

import logging
import random
import re
import subprocess
import sys

import pytest
from lightning import Callback
from safetensors.torch import load_file

import mpp.export
import mpp.masks
import mpp.prepare
import mpp.report
import mpp.sample
import mpp.train
from mpp.files import check_writable
from mpp.models.tiny import tiny_wan
from tests.helpers import QUIET, train
from tests.test_command_line import run as run_command

MODEL = "model=tiny_wan"
RUN = [
    "data.num_workers=0", "trainer.max_steps=1", "trainer.precision=32-true", "trainer.accelerator=cpu",
    "logger=csv", "trainer.log_every_n_steps=1", *QUIET,
]  # fmt: skip
REFUSED = {  # by command: words that end it, alone or after those that each start has; and what is said
    "train": [
        (["losss=masked"], "losss is not a setting"),
        (["loss=treshold"], "loss=treshold is not there; did you mean threshold"),
        (["lora.rank=eight"], "lora.rank should be"),
        (["loss.prior_weight=-1"], "loss.prior_weight must be at least 0"),
        (["trainer.max_time=nonsense"], "is not a valid duration"),
        (["trainer.strategy=fsdp"], "is not known to train right"),
        (["trainer.limit_train_batches=0.01"], "leaves none of the"),
        (["schedule=cosine", "schedule.num_warmup_steps=2.5"], "num_warmup_steps must be"),
        (["data.cache_dir=nowhere"], "no cache at nowhere"),
        (["data.batch_size=100"], "larger than the training set"),
        (["lora=none"], "needs an adapter"),
        (["lora=none"], "needs an adapter"),
        (["lora.targets=[nothing]"], "fit no trainable module"),
        (["model.pretrained=other"], "was made"),
        (["model.pretrained=none"], "is not there"),
        (["ckpt_path=last", "output_dir=new"], "no checkpoint at"),
        (["ckpt_path=run/checkpoints/last.ckpt", "seed=3"], "seed"),
        (["ckpt_path=run/checkpoints/last.ckpt", "lora.rank=8"], "lora|adapter"),
        (["ckpt_path=photos/p0.png"], "there is no checkpoint at"),
        (["sampling.prompts=[a prompt that was not prepared]"], "prepare"),
        (["callbacks.checkpoints.every_n_steps=0"], "must be at least 1"),
        (["output_dir=photos/p0.png"], "cannot be written"),
        (["output_dir=run"], "holds a run already"),
    ],
    "prepare": [
        (["data.image_dir=nowhere"], "nowhere"),
        (["data.image_dir=photos", "data.resolution=0"], "resolution"),
        (["data.image_dir=photos", "model.pretrained=none"], "is not there"),
        (["data=musubi"], "is a cache"),
        (["data.image_dir=photos", "export=comfyui"], "export must be musubi"),
        (["data.image_dir=photos", "data.flipp=true"], "data.flipp is not a setting"),
        (["data.image_dir=photos", "prepare.shard=3/2"], "shard"),
    ],
    "sample": [
        (["output_dir=new"], "sampling.prompts is empty"),
        (["output_dir=new", "sampling.prompts=[a]", "lora=nowhere"], "nowhere"),
        (["output_dir=new", "sampling.prompts=[a]", "model.pretrained=none"], "is not there"),
        ([], "output_dir=... is missing"),
    ],
    "export": [
        (["lora=nowhere"], "choose one"),
        (["lora=nowhere", "export.format=peft"], "nowhere"),
        (["lora=run", "export.format=foo"], "format"),
    ],
    "report": [(["data.cache_dir=nowhere", "output=new/page.html"], "nowhere"), (["limit=3"], "is missing")],
    "masks": [
        (["tool=invert", "input=nowhere", "output=new"], "nowhere"),
        (["tool=invert", "input=masks", "output=photos/p0.png"], "must be a folder"),
        (["tool=tiers", "input=masks", "output=new", "tool.levels=7"], "level"),
    ],
}  # fmt: skip
STARTS = [(command, words, message) for command, found in REFUSED.items() for words, message in found]


class Early(Callback):
    """Says something before the run begins."""

    def setup(self, *_, **__):
        logging.getLogger("early").info("said before the run began")


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def start(monkeypatch, capsys, work):
    """Runs a command as its entry does, in this process: exit code, and what it said."""

    def call(command, *words):
        before = [*logging.getLogger().handlers]
        with monkeypatch.context() as patch:
            patch.chdir(work)
            patch.setattr(sys, "argv", [f"mpp-{command}", *words])
            try:
                getattr(mpp, command).main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
                if isinstance(end.code, str):
                    print(end.code)
            finally:
                logging.getLogger().handlers[:] = before
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture(scope="module")
def made(pipeline, prepared, tmp_path_factory):
    """A folder with a cache, media, a second model and a finished run."""
    work = tmp_path_factory.mktemp("made")
    for name in ("photos", "masks", "cache"):
        (work / name).symlink_to(prepared.parent / name)
    (work / "pipe").symlink_to(pipeline)
    tiny_wan(str(work / "other"), seed=5)
    train(pipeline, prepared, work / "run", "trainer.max_steps=1", "lora.rank=16")
    (work / "run" / ".hydra").mkdir()
    (work / "run" / ".hydra" / "config.yaml").write_text("as it was\n")
    (work / "run" / "train.log").write_text("what was said\n")
    return work


@pytest.fixture
def work(made):
    return made


def words_of(command, words):
    """A start that would work but for the words that are drawn."""
    common = {
        "train": [MODEL, "model.pretrained=pipe", "data.cache_dir=cache", "output_dir=new", *RUN],
        "prepare": [MODEL, "model.pretrained=pipe", "data.cache_dir=new", "data.resolution=64", "device=cpu"],
        "sample": [MODEL, "model.pretrained=pipe", "device=cpu"],
        "export": [MODEL, "model.pretrained=pipe"],
    }
    return [*common.get(command, []), *words]


def drawn(number, count):
    return random.Random(number).sample(STARTS, count)


@pytest.mark.parametrize("starts", [drawn(0, 2), pytest.param(drawn(3, len(STARTS)), marks=pytest.mark.slow)])
def test_a_start_that_is_refused_leaves_everything_as_it_was(start, work, starts):
    before = tree(work)
    for command, words, message in starts:
        code, said = start(command, *words_of(command, words))
        assert code == 1, (command, words, said)
        assert re.search(message, said), (command, words, said)
        assert tree(work) == before, (command, words)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, len(STARTS), 9))
def test_so_does_a_process_of_its_own(work, number):
    before, (command, words, _) = tree(work), STARTS[number]
    ended = run_command(f"mpp.{command}", *words_of(command, words), cwd=work)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert tree(work) == before


@pytest.mark.slow
def test_a_sweep_that_is_refused_leaves_nothing_either(start, work):
    before = tree(work)
    for command, word in (("train", "loss.prior_weight=-1,-2"), ("sample", "sampling.seed=1,2")):
        code, _ = start(command, "--multirun", *words_of(command, [word, "output_dir=new"]))
        assert code == 1
        assert tree(work) == before


@pytest.mark.slow
def test_a_run_has_its_record_and_all_that_was_said(made):
    words = words_of("train", [f"+callbacks.early={{_target_: {__name__}.Early}}", "output_dir=told"])
    path = f"{mpp.__path__[0]}/..:{mpp.__path__[0]}/../.."
    ended = run_command("mpp.train", *words, cwd=made, path=path)
    assert ended.returncode == 0, ended.stderr
    log = (made / "told" / "train.log").read_text()
    assert (
        log.index("said before the run began")
        < log.index("masked prior preservation")
        < log.index("LoRA for diffusers: ")
    )
    assert log.count("said before") == ended.stdout.count("said before")
    assert '- output_dir="told"' in (made / "told" / ".hydra" / "overrides.yaml").read_text()
    assert "rank: 16" in (made / "told" / ".hydra" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("named", [pytest.param(True, marks=pytest.mark.draws), False])
def test_each_job_of_a_sweep_has_its_own_folder_and_can_be_resumed(made, tmp_path, named):
    words = [
        MODEL,
        f"model.pretrained={made / 'pipe'}",
        f"data.cache_dir={made / 'cache'}",
        *RUN,
        "optimizer.lr=1e-3,1e-2",
    ]
    ended = run_command("mpp.train", *words, "--multirun", *(["output_dir=sweep"] if named else []), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (folder,) = [tmp_path / "sweep"] if named else (tmp_path / "outputs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.relative_to(tmp_path).parts[0]]
    for number, rate in enumerate(("1e-3", "1e-2")):
        alone = [word for word in words if not word.startswith("optimizer.lr")] + [f"optimizer.lr={rate}"]
        assert run_command("mpp.train", *alone, "output_dir=alone", cwd=tmp_path).returncode == 0
        one, other = (
            load_file(folder / str(number) / "lora.safetensors"),
            load_file(tmp_path / "alone/lora.safetensors"),
        )
        assert all((one[name] == other[name]).all() for name in other)
        subprocess.run(["rm", "-r", str(tmp_path / "alone")], check=True)
    more = ["trainer.max_steps=2", "logger=tensorboard", "ckpt_path=last", f"output_dir={folder}"]
    ended = run_command("mpp.train", *words, *more, "--multirun", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(list(folder.glob("*/lora/step-000002.safetensors"))) == 2


@pytest.mark.slow
def test_all_processes_of_a_run_share_the_folder_that_its_clock_named(made, tmp_path):
    words = [MODEL, f"model.pretrained={made / 'pipe'}", f"data.cache_dir={made / 'cache'}", *RUN]
    ddp = ["trainer.strategy=ddp", "trainer.devices=2"]
    ended = run_command("mpp.train", *words, *ddp, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert {path.name for path in folder.iterdir()} >= {".hydra", "train.log", "lora.safetensors", "checkpoints"}
    ended = run_command("mpp.train", *words, *ddp, "--multirun", "seed=1,2", "output_dir=sweep", cwd=tmp_path)
    assert ended.returncode == 1
    assert "--multirun with several processes" in ended.stderr
    assert not (tmp_path / "sweep").exists()


def test_looking_whether_a_folder_can_be_written_makes_none(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir=.*file/b cannot be written"):
        check_writable(tmp_path / "file" / "b", "output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
