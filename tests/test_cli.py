"""What is typed, as Hydra's overrides."""

import random
import re
import shlex
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.strategies.launchers import subprocess_script
from omegaconf import OmegaConf

from mpp import cli
from mpp.config import CONFIG_DIR, check_config, compose, explanation
from tests.helpers import config

COMMANDS = ("prepare", "train", "sample", "export", "report", "plan", "masks")


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("sample", "lora=a.safetensors", 'lora_path="a.safetensors"'),
        ("sample", "lora=[a b:0.8, 'c,d:1']", "lora_path=[\"a b:0.8\",'c,d:1']"),
        ("export", "lora=runs/a=b", 'export.lora="runs/a=b"'),
        ("export", "lora_path=a", 'export.lora="a"'),
        ("export", "++merge=true", "++export.merge=true"),
        ("export", "export.format=comfyui", "export.format=comfyui"),
        ("report", "data.cache_dir=c", 'report.cache_dir="c"'),
        ("report", "limit=3", "report.limit=3"),
        ("masks", "preview=look", 'job.preview="look"'),
        ("masks", "tool.masks=input=3", "tool.masks=input=3"),
        ("train", "export.metadata.title=A cat, and (2)", 'export.metadata.title="A cat, and (2)"'),
        ("train", "export.metadata.title='a'", "export.metadata.title='a'"),
        ("export", "export.metadata.thumbnail=my cat.png", 'export.metadata.thumbnail="my cat.png"'),
        ("train", "export.metadata.thumbnail=true", "export.metadata.thumbnail=true"),
        ("prepare", "data=folder", "source@data=folder"),
        ("prepare", "data.image_dir=data", 'data.image_dir="data"'),
        ("train", "lora=dora", "lora=dora"),
        ("train", "data=musubi", "data=musubi"),
        ("export", "--cfg", "--cfg"),
        ("prepare", "data", "data"),  # as after --config-dir
    ],
)
def test_short_words_stand_for_longer_keys(command, typed, meant):
    assert cli.overrides(command, [typed]) == [meant]
    assert cli.overrides(command, [meant]) == [meant]  # a process of DDP reads them again


# ---------------------------------------------------------------- names of files


def drawn_name(draws):
    """Any name that a disk takes."""
    return "".join(draws.choices("abcAB 019.-_,;:=~#%&+@!?*<>|()[]{}'`\"\\$éß日本\t", k=draws.randint(1, 12)))


@pytest.mark.parametrize("command", COMMANDS)
def test_any_name_is_typed_as_it_is(command):
    draws, parser = random.Random(command), OverridesParser.create()
    ours = ["null", "", '"a"', "'a b'", "''"]  # words of the grammar, which keep their meaning
    for _ in range(600):
        key, name = draws.choice(sorted(cli.PATHS)), drawn_name(draws)
        several = key in cli.LISTS and name[0] + name[-1] == "[]"
        if name in ours or name[0] == name[-1] in "'\"" or "${" in name or several:
            continue
        (word,) = cli.overrides(command, [f"{key}={name}"])
        assert parser.parse_override(word).value() == name
        assert cli.overrides(command, [word]) == [word]


def test_several_files_are_typed_as_a_list():
    draws, parser = random.Random(0), OverridesParser.create()
    for _ in range(600):
        names = [drawn_name(draws).strip() for _ in range(draws.randint(1, 4))]
        if any(not n or set(n) & set("\"'") or "${" in n or n == "null" for n in names):
            continue
        names = [name.replace(",", "") or "a" for name in names]
        key = draws.choice(["lora_path", "model.loras"])
        typed = ", ".join(draws.choice([name, f"'{name}'"]) if name[-1] != "\\" else name for name in names)
        (word,) = cli.overrides("sample", [f"{key}=[{typed}]"])
        assert parser.parse_override(word).value() == names
        assert cli.overrides("sample", [word]) == [word]


def test_quotes_null_interpolations_and_sweeps_keep_their_meaning():
    for word in ("resume=null", "data.cache_dir='a b'", 'data.cache_dir="a"', "data.image_dir=", "output_dir=???"):
        assert cli.overrides("train", [word]) == [word]
    several = ["--multirun", "data.cache_dir=a,b", "output_dir=glob(*)"]
    assert cli.overrides("train", several) == several
    parsed = OverridesParser.create().parse_override(cli.overrides("train", ["output_dir=${oc.env:HOME} 1/${seed}"])[0])
    assert parsed.value() == "${oc.env:HOME} 1/${seed}"


def test_every_setting_that_is_called_a_path_is_typed_as_it_is(helps):
    called = re.compile(
        r"^([\w.]*?\b(?:\w+_dir|\w*path|folder|input|output|preview|manifest|resume|pretrained\w*))=", re.MULTILINE
    )
    found = {key for text in helps.values() for key in called.findall(text) if not key.startswith("hydra.")}
    assert len(found) > 12
    assert not {key for key in found if not {key, key.rpartition(".")[2]} & cli.PATHS}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train", "loss.prior_weight=1.0  (float) Weight of the prior term, >= 0; 0 is plain masked training."),
        ("train", "data.preservation.replace=null  (Mapping[str, str] or null) Words and what stands for them"),
        ("train", "data.cache_dir=???  (str) The cache."),
        ("train", "trainer.max_steps=1000  (int)"),
        ("train", "seed=0  (int) adapter, noise, sigma, order: all follow from it"),
        ("train", "data.seed=${seed}  (int)"),
        ("train", "logger=csv|tensorboard|wandb (now tensorboard)"),
        ("prepare", "data.flip=false  (bool) Also prepare each training image mirrored."),
        ("prepare", "data.repeats=1  (int) How often an epoch visits each training media, >= 1."),
        ("masks", "tool.how=multiply  (multiply|min|max|subtract) `multiply` (tiers inside an instance mask)"),
        ("masks", "job.input=null  (str or null) Folder of images"),
    ],
)
def test_help_explains_settings_by_what_their_classes_say(command, shown, helps):
    assert f"\n{shown}" in helps[command]


@pytest.mark.parametrize(
    "command",
    [name if name in ("masks", "report") else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS],
)
def test_help_has_a_usage_examples_that_work_and_pages_that_are_there(command, helps):
    head = helps[command].partition("groups:")[0]
    assert head.startswith(f"usage: python -m mpp.{command} ")
    examples = re.findall(rf"^python -m mpp.{command} (.*)", head, re.MULTILINE)
    assert len(examples) == 5
    for example in examples:
        words = [word.partition(",")[0] if "lr=" in word else word for word in shlex.split(example)]
        needed = ["data.cache_dir=c"] if "resume=" in example else []
        check_config(config(command, [*needed, *(word for word in words if word != "--multirun")]))
    pages = re.search(r"^read on: (.*)", head, re.MULTILINE)[1].split(", ")
    assert all((CONFIG_DIR.parent / page).is_file() for page in pages)


@pytest.fixture(scope="module")
def helps():
    """What `--help` prints."""
    return {name: explanation(name, ["schedule=cosine"] if name == "train" else []) for name in COMMANDS}


@pytest.mark.parametrize("command", cli.SHORT)
def test_every_short_word_is_a_key_of_its_command(command):
    words = [f"{short}={'folder' if short == 'data' else 'null'}" for short in cli.SHORT[command]]
    needed = {"prepare": ["data.cache_dir=x"], "masks": ["tool=invert"], "sample": ["output_dir=o"]}
    cfg = config(command, [*needed.get(command, []), *words])
    for short, key in cli.SHORT[command].items():
        if short == "data":
            assert cfg.data._target_.endswith(".Source") or "image_dir" in cfg.data
        else:
            assert OmegaConf.select(cfg, key, default="absent") is None, key


@pytest.mark.parametrize(
    ("command", "word", "way"),
    [
        ("prepare", "data=musubi", r"data=musubi is a cache.*python -m mpp.train data=musubi data.cache_dir=CACHE"),
        ("prepare", "data=cached", r"data=cached is a cache.*set data.image_dir"),
        (
            "train",
            "data=folder",
            r"data=folder is what caches are made of: python -m mpp.prepare data.image",
        ),
    ],
)
def test_kinds_of_data_of_the_other_command_are_refused_with_the_way(command, word, way):
    with pytest.raises(ValueError, match=way):
        cli.overrides(command, ["model=wan", word])


def test_processes_that_are_started_by_this_one_repeat_what_was_meant(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mpp-export", "lora=a", "model=wan"])
    cli.rewrite_arguments("export")
    assert sys.argv == ["mpp-export", 'export.lora="a"', "model=wan"]
    assert subprocess_script._basic_subprocess_cmd()[-2:] == ['export.lora="a"', "model=wan"]


@pytest.mark.parametrize("flag", ["--multirun", "-m"])
def test_a_sweep_may_be_asked_for_anywhere(flag):
    assert cli.overrides("train", ["a=1", flag, "b=1,2"]) == [flag, "a=1", "b=1,2"]


def test_a_mistake_ends_with_one_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mpp-train", "data=folder"])
    with pytest.raises(SystemExit, match=r"^error: data=folder is what caches are made of"):
        cli.rewrite_arguments("train")


def test_reading_words_imports_nothing_heavy_and_makes_nothing(tmp_path):
    script = (
        "import sys, mpp.cli; mpp.cli.rewrite_arguments('sample'); "
        "print(sys.argv[1:], {'torch', 'hydra', 'lightning', 'numpy'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", script, "lora=a", "output_dir=out"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['lora_path=\"a\"', 'output_dir=\"out\"'] set()"
    assert not list(tmp_path.iterdir())


OLDER_WORDS = [
    ("gradient_checkpointing=true", ["memory.activations=checkpoint"]),
    ("++gradient_checkpointing=False", ["memory.activations=keep"]),
    ("gradient_checkpointing=null", ["gradient_checkpointing=null"]),
    ("gradient_checkpointing=some", ["gradient_checkpointing=some"]),  # which is refused with the other values
]


@pytest.mark.parametrize(("typed", "meant"), OLDER_WORDS)
def test_the_older_word_for_activations_is_that_of_now(typed, meant):
    assert cli.overrides("train", [typed]) == meant


def test_a_sweep_over_the_older_word_is_one_over_that_of_now():
    assert (
        cli.overrides("train", ["-m", "gradient_checkpointing=true,false"])[1] == "memory.activations=checkpoint,keep"
    )


def test_both_words_for_activations_are_refused_where_they_disagree():
    assert cli.overrides("train", ["gradient_checkpointing=false", "memory.activations=keep"])
    with pytest.raises(ValueError, match=r"^gradient_checkpointing=true is the older word for memory.activations=chec"):
        cli.overrides("train", ["gradient_checkpointing=true", "memory.activations=offload"])


def test_a_yaml_of_the_users_own_may_have_the_older_word(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "own.yaml"
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=own", "data.cache_dir=x"]
    for said, typed, found in (("false", [], "keep"), ("false", ["memory.activations=offload"], "offload")):
        file.write_text(f"# @package _global_\ngradient_checkpointing: {said}\n")
        assert compose("train", [*words, *typed]).memory.activations == found
    file.write_text("# @package _global_\ngradient_checkpointing: false\nmemory: {activations: checkpoint}\n")
    with pytest.raises(ValueError, match="gradient_checkpointing=false is the older word for memory.activations=keep"):
        compose("train", words)
