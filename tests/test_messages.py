"""Mistakes in what is typed: each ends with one line a problem, which names what was probably meant."""

import logging
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from mpp.config import check_config, command
from mpp.messages import nearest

REPOSITORY = Path(__file__).parents[1]
COMMANDS = """
mpp.prepare model=wan data.image_dir=photos data.mask_dir=masks data.cache_dir=cache/mychar
mpp.report loss=threshold data.cache_dir=cache/mychar
mpp.train model=wan loss=threshold data.cache_dir=cache/mychar output_dir=outputs/mychar
mpp.train data.cache_dir=c lora=dora lora.rank=32 lora.alpha=32 lora.targets=[to_q,to_v] callbacks.ema.decay=0.999
mpp.train data.cache_dir=c schedule=cosine schedule.num_warmup_steps=100 trainer.max_steps=2000 trainer.devices=2
mpp.prepare data.cache_dir=c data.clips.frames=[49,81] data.clips.extract=uniform
mpp.sample model=wan lora=outputs/mychar sampling.prompts='[ohwx at the beach]' output_dir=outputs/generated
mpp.sample model=wan sampling.prompts='[ohwx]' sampling.width=768 sampling.height=512 output_dir=out
mpp.export model=wan lora=outputs/mychar export.format=kohya
mpp.export model=wan lora=outputs/mychar merge=true
mpp.masks tool=combine input=tiers tool.masks=instances output=masks
"""
LINES = [(line.split()[0][4:], shlex.split(line)[1:]) for line in COMMANDS.strip().splitlines()]
TRAIN = ["data.cache_dir=c"]
CHOSEN = [  # command, words, what is said
    ("train", [*TRAIN, "+lr=1e-2"], "lr is not a setting of this command; did you mean optimizer.lr?"),
    ("train", [*TRAIN, "+los.prior_weight=2"], "did you mean loss.prior_weight?"),
    ("train", [*TRAIN, "++optimzer.lr=1"], "did you mean optimizer.lr?"),
    ("train", [*TRAIN, "+optimzer._target_=torch.optim.SGD"], "did you mean optimizer"),
    ("train", [*TRAIN, "experiment=phantom_lim"], "did you mean phantom_limb? it is one of phantom_limb"),
    ("train", [*TRAIN, "+callbacks.sampels.every_n_steps=5"], "did you mean callbacks.samples.every_n_steps?"),
    ("train", [*TRAIN, "callbacks.samples=5"], "callbacks.samples must be null, or an object"),
    ("train", [*TRAIN, "loss=null"], "loss=null is not there; it is one of binary"),
    ("train", [*TRAIN, "~loss"], "~loss leaves out what the command needs"),
    ("train", [*TRAIN, "~losss"], "did you mean ~loss?"),
    ("train", [*TRAIN, "optimizer.betas=0.9,0.99"], "for a list type 'optimizer.betas=[0.9,0.99]'"),
    ("train", [*TRAIN, "lora.targets=[to_q"], "type 'lora.targets=[to_q]'"),
    ("train", [*TRAIN, "trainer.max_steps"], "trainer.max_steps: settings are typed as KEY=VALUE"),
    ("train", [*TRAIN, "schedule=cosine", "schedule._target_=torch.optim.Adam"], "torch.optim.Adam is no LRScheduler"),
    ("train", [*TRAIN, "+callbacks.x._target_=builtins.dict"], "builtins.dict is no Callback"),
    ("train", [*TRAIN, "optimizer._target_=SGD"], "its full name is needed, as torch.optim.SGD"),
    ("train", [*TRAIN, "val_sigmas=a", "compile=x"], "compile should be a valid boolean, got 'x'"),
    ("train", ["output_dir="], "data.cache_dir=... is missing (The cache)"),
    ("train", [*TRAIN, "optimizer.lr=fast"], "optimizer.lr should be a valid number, got 'fast'"),
    ("train", [*TRAIN, "--mltirun"], "did you mean --multirun?"),
    ("train", [*TRAIN, "seed=${nothing}"], "seed: Interpolation key 'nothing' not found"),
    ("masks", ["input=a", "output=b"], "tool=... is missing: it is one of clipseg, combine"),
    ("export", ["fromat=kohya", "lora=x"], "did you mean format?"),
]  # fmt: skip
MONITOR = "lightning.pytorch.callbacks.DeviceStatsMonitor"
FAST = (0, 4, 15, 22)  # of the chosen; the others take the same ways


def swapped(draws, text):
    """A text with two neighbouring letters exchanged."""
    where = draws.choice([n for n in range(len(text) - 1) if text[n] != text[n + 1] and text[n : n + 2].isalpha()])
    return text[:where] + text[where + 1] + text[where] + text[where + 2 :]


def drawn(seed):
    """A mistake in a command of the README: command, words, what is said."""
    draws = random.Random(seed)
    name, words = draws.choice(LINES)
    words = list(words)
    where = draws.randrange(len(words))
    key, value = words[where].split("=", 1)
    above, _, last = key.rpartition(".")
    how = draws.choice(["key", "key", "plus", "option", "type", "bracket"])
    if how == "option" and not above and key in ("model", "loss", "lora", "schedule", "tool") and name != "sample":
        words[where] = f"{key}={swapped(draws, value)}"
        said = f"{words[where]} is not there; did you mean {value}?"
        if (name, key) != ("export", "lora"):
            return name, words, said
    if how == "type" and value.replace(".", "").isdecimal():
        words[where] = f"{key}=many"
        return name, words, "got 'many'"
    if how == "bracket" and value.endswith("]"):
        words[where] = f"{key}={value[:-1]}"
        return name, words, f"{words[where]} cannot be read: its brackets do not fit"
    wrong = f"{above}.{swapped(draws, last)}".lstrip(".")
    words[where] = f"{'+' * draws.randint(1, 2) if how == 'plus' else ''}{wrong}={value}"
    return name, words, last


DRAWN = [drawn(seed) for seed in range(20)]


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """Types words after a command, whose work is to check its configuration: exit code, and what it says on stderr."""

    def call(name, words):
        before = [*logging.getLogger().handlers]
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [f"mpp-{name}", *words])
            patch.setattr(Hydra, "get_mode", lambda *_, **__: None)  # composes once more, for hydra.mode alone
            try:
                command(name, check_config)()
                code = 0
            except SystemExit as end:
                code = end.code
                if isinstance(code, str):  # as the interpreter does
                    print(code, file=sys.stderr)
                    code = 1
            finally:
                logging.getLogger().handlers[:] = before
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [pytest.param(*case, marks=() if number in FAST else pytest.mark.slow) for number, case in enumerate(CHOSEN)]
    + [pytest.param(*case, marks=() if number % 10 == 0 else pytest.mark.slow) for number, case in enumerate(DRAWN)],
)
def test_a_mistake_is_one_line_a_problem_that_names_the_way(name, words, said, typed, tmp_path):
    code, err = typed(name, words)
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    lines = err.strip().splitlines()
    assert len(lines) <= 2  # a word that is misspelt may also be missing
    assert not any(line[:1].isspace() or "hydra.cc" in line or "Traceback" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", [f"+callbacks.mine._target_={MONITOR}", "+callbacks.mine.cpu_stats=true"]),
        ("train", ["+experiment=phantom_limb", "++loss=masked", "+seed=3", "+optimizer.betas=[0.8,0.9]"]),
        pytest.param("train", ["+run=a", "output_dir=outputs/${run}", "hydra.verbose=true"], marks=pytest.mark.slow),
        pytest.param("train", ["+mine={_target_: mpp.core.loss.MaskedPriorLoss}", "~logger"], marks=pytest.mark.slow),
        pytest.param("train", ["schedule=cosine", "schedule.num_warmup_steps=0.1"], marks=pytest.mark.slow),
        pytest.param("train", [f"optimizer._target_={__name__}.anything", "+optimizer.any=1"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_new_and_meant_stays_possible(name, words, typed):
    assert typed(name, [*TRAIN, *words]) == (0, "")


def anything(params, **settings):
    """An optimizer, as far as its signature tells."""
    return params, settings


def test_all_that_can_be_known_is_said_at_once(typed):
    words = ["los=masked", "model=wann", "val_sigmas=[a (b]", "+lr=1", "lora.rank=many", "trainer.accelerator=gpu"]
    code, err = typed("train", words)
    assert code == 1
    for said in (
        "los is not a setting", "model=wann is not there", "cannot be read", "lr is not a setting",
        "lora.rank should be a valid integer", "data.cache_dir=... is missing",
    ):  # fmt: skip
        assert said in err


@pytest.mark.slow
def test_what_this_machine_lacks_is_said_with_the_way(typed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    _, err = typed("train", [*TRAIN, "trainer.accelerator=gpu"])
    assert err.startswith("error: trainer.accelerator=gpu: torch finds no GPU here; trainer.accelerator=auto takes")
    _, err = typed("sample", ["output_dir=o", "device=cuda"])
    assert err.startswith("error: device=cuda: torch finds no GPU here; device=auto takes what there is")
    _, err = typed("sample", ["output_dir=o", "device=gpu"])
    assert err.startswith("error: device=gpu is no device")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    _, err = typed("train", [*TRAIN, "logger=wandb"])
    assert err == "error: logger.wandb needs the package wandb, which is not installed; pip install 'mpp[wandb]'\n"


@pytest.mark.slow
def test_experiments_and_mistakes_in_a_folder_of_ones_own_are_found(typed, tmp_path):
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "cats.yaml").write_text("# @package _global_\noptimizer: {lr: 3e-4}\n")
    (mine / "dogs.yaml").write_text("# @package _global_\noptimzer: {lr: 3e-4}\n")
    (mine / "cows.yaml").write_text("# @package _global_\noptimizer: {lr: 3e-4\n")
    folder = f"--config-dir={mine.parent}"
    assert typed("train", [folder, *TRAIN, "experiment=cats"]) == (0, "")
    assert "did you mean cats? it is one of cats, cows" in typed("train", [folder, "experiment=cast"])[1]
    assert "did you mean optimizer.lr?" in typed("train", [folder, *TRAIN, "experiment=dogs"])[1]
    code, err = typed("train", [folder, *TRAIN, "experiment=cows"])
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.slow
def test_the_traceback_is_shown_where_it_is_asked_for(typed, monkeypatch):
    monkeypatch.setenv("MPP_TRACEBACK", "1")
    with pytest.raises(Exception, match="did you mean loss"):
        typed("train", [*TRAIN, "los=masked"])


def test_the_nearest_key_has_the_last_word_or_is_close():
    keys = ["loss", "optimizer", "optimizer.lr", "lora", "lora.rank", "seed", "data.seed", "trainer.max_steps"]
    meant = {
        "lr": "optimizer.lr", "los": "loss", "rank": "lora.rank", "trainer.sed": "data.seed", "lora.seed": "data.seed",
        "max_step": "trainer.max_steps", "optimzer.lr": "optimizer.lr", "photos": None,
    }  # fmt: skip
    assert {key: nearest(key, keys) for key in meant} == meant


@pytest.mark.slow
def test_processes_end_with_one_line_and_help_explains_what_must_be_chosen(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )  # fmt: skip

    shown = run("mpp.masks", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\ntool.how=multiply" in shown.stdout
    refused = run("mpp.report", "+lss=x", "data.cache_dir=c")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: lss is not a setting of this command; did you mean loss?")
