"""One file for a job: what it says to each command, and how mistakes in it are named."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

import mpp.init
import mpp.run
from mpp import cli
from mpp.job_file import COMMANDS, KEYS, SHARED_ROOTS, STARTS, commands_of, read_job
from tests.helpers import config, draw_photos
from tests.test_cli import drawn_name
from tests.test_command_line import REPOSITORY, run

JOB = """\
model: tiny_wan
loss: masked
data: {images: my photos, masks: masks, cache: cache/a, resolution: 64}
train:
  steps: 3
  lr: 1e-3
samples:
  - a red box, a dog --w 64
  - "'quoted': #1"
output: outputs/a
set:
  sampling.width: 32
  data.flip: true
  data.batch_size: 2
  data.preservation.rate: 0.0
  optimizer.betas: [0.8, 9e-1]
  ++data.caption_variants: {trigger: zarp}
  export.formats: [comfyui]
"""
MEANT = {  # written by hand
    "prepare": {
        "model": "tiny_wan", "data.image_dir": "my photos", "data.mask_dir": "masks", "data.cache_dir": "cache/a",
        "data.resolution": 64, "sampling.prompts": ["a red box, a dog --w 64", "'quoted': #1"], "sampling.width": 32,
        "data.flip": True, "data.caption_variants": {"trigger": "zarp"},
    },
    "report": {"loss": "masked", "report.cache_dir": "cache/a"},
    "plan": {
        "model": "tiny_wan", "loss": "masked", "plan.cache_dir": "cache/a", "optimizer.betas": [0.8, 0.9],
    },
    "train": {
        "model": "tiny_wan", "loss": "masked", "data.cache_dir": "cache/a", "trainer.max_steps": 3,
        "optimizer.lr": 0.001, "sampling.prompts": ["a red box, a dog --w 64", "'quoted': #1"],
        "output_dir": "outputs/a", "sampling.width": 32, "data.batch_size": 2, "data.preservation.rate": 0.0,
        "optimizer.betas": [0.8, 0.9], "export.formats": ["comfyui"],
    },
    "sample": {
        "model": "tiny_wan", "sampling.prompts": ["a red box, a dog --w 64", "'quoted': #1"],
        "lora_path": "outputs/a", "output_dir": "outputs/a/generated", "sampling.width": 32,
    },
    "export": {"model": "tiny_wan", "export.lora": "outputs/a"},
}  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job file in the working directory, with other lines where they are given."""
    monkeypatch.chdir(tmp_path)

    def write(text=JOB, name="a.yaml"):
        Path(name).write_text(text, "utf-8")
        return name

    return write


def parsed(words):
    """What Hydra's own parser makes of words."""
    found = OverridesParser.create().parse_overrides(words)
    assert len({override.key_or_group for override in found}) == len(found)  # nothing is said twice
    return {override.key_or_group: override.value() for override in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_reads_its_own_part(job, command):
    words = cli.overrides(command, [job()])
    assert parsed(words) == MEANT[command]
    assert cli.overrides(command, words) == words  # processes of DDP read them again
    config(command, [*words, *(["export.format=peft"] if command == "export" else [])])  # and composes


def test_what_is_typed_wins(job):
    typed = ["loss=plain", "+trainer.max_steps=5", "sampling.prompts=a, b", "trainer.precision=32-true"]
    got = parsed(cli.overrides("train", [job(), *typed]))
    plain = {"loss": "plain", "trainer.max_steps": 5, "sampling.prompts": "a, b", "trainer.precision": "32-true"}
    assert got == MEANT["train"] | plain
    assert parsed(cli.overrides("sample", [job(), "lora=b"]))["lora_path"] == "b"
    flags = cli.overrides("train", [job(), "--config-dir", "conf", "loss=plain", "--cfg", "job"])
    assert (flags[:2], flags[-3:]) == (["--config-dir", "conf"], ["loss=plain", "--cfg", "job"])
    sweep = cli.overrides("train", [job(), "--multirun", "optimizer.lr=1e-4,3e-4"])
    assert sweep[0] == "--multirun"
    assert 'sampling.prompts=["a red box, a dog --w 64","\'quoted\': #1"]' in sweep


def test_a_run_that_goes_on_keeps_its_record(job):
    assert cli.overrides("train", [job(), "resume=outputs/a"]) == ['resume="outputs/a"']
    assert cli.overrides("train", [job(), "ckpt_path=last"]) == ['output_dir="outputs/a"', 'ckpt_path="last"']
    assert len(cli.overrides("train", [job(), "resume=null"])) == len(MEANT["train"]) + 1
    assert len(cli.overrides("prepare", [job(), "sampling.seed=3"])) == len(MEANT["prepare"]) + 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_of_settings_is_that_of_the_commands(command):
    needed = {"prepare": ["data.image_dir=y"], "sample": ["output_dir=o"], "export": ["export.format=peft"]}
    cfg = config(command, [*needed.get(command, []), *(["data.cache_dir=x"] if "p" in command[:2] else [])])
    theirs = {"export", "export_dir"} if command == "prepare" else set()  # typed there, when a cache is exported
    for key in set(cfg) - STARTS - theirs - {"lora_path", "hydra"}:
        inner = set(cfg[key]) - {"_target_"} if key in SHARED_ROOTS else set()
        if inner:
            left = {"lora", "metadata"} if command == "export" else set()  # `output`, and that of training
            assert SHARED_ROOTS[key][command] == inner - left
        else:
            assert command in commands_of(key)
    if "preservation" in cfg.get("data", ()):
        assert SHARED_ROOTS["data.preservation"][command] == set(cfg.data.preservation) - {"_target_"}


def test_the_file_in_the_documentation_has_all_keys(job):
    text = (REPOSITORY / "docs" / "job.md").read_text().split("```yaml\n")[1].split("```")[0]
    found = read_job(job(text))
    assert set(found.said) == set(KEYS)
    assert parsed(cli.overrides("sample", ["a.yaml"]))["sampling.prompts"][1] == "a sign: open"
    assert parsed(cli.overrides("export", ["a.yaml"]))["model.pretrained"] == "${oc.env:HOME}/models/wan"


# ---------------------------------------------------------------- mistakes


def test_drawn_misspellings_name_the_line_and_the_nearest(job):
    draws = random.Random(0)
    for _ in range(100):
        key = draws.choice([key for key in KEYS if len(key.rpartition(".")[2]) > 3])
        section, _, name = key.rpartition(".")
        at = draws.randrange(1, len(name))
        wrong = draws.choice([name[:at] + name[at + 1 :], name[:at] + "x" + name[at:]])
        line = f"  {wrong}: 3" if section else f"{wrong}: 3"
        text = "# one\n# two\n" + (f"{section}:\n" if section else "") + line + "\n"
        with pytest.raises(ValueError, match=rf"^a.yaml, line {4 if section else 3}: .*nearest is {name}; "):
            read_job(job(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 3", "steps: many"), r"line 5: train.steps must be a whole number, got 'many'"),
        (("steps: 3", "steps: 2.5"), r"line 5: train.steps must be a whole number, got 2.5"),
        (("steps: 3", "steps: true"), r"line 5: train.steps must be a whole number, got True"),
        (("masks: masks", "masks: auto"), r"line 3: data.masks is a folder; mpp.init masks=auto"),
        (("lr: 1e-3", "lr: [1]"), r"line 6: train.lr must be a number, got \[1\]"),
        (("model: tiny_wan", "model: 3"), r"line 1: model must be a text, got 3; quotes around it make it a text"),
        (("- a red", "- 3\n  - a red"), r"line 8: samples must be a prompt, a list of them or a .txt file, got \[3,"),
        (("- a red box", "- a sign: open"), r"line 8: samples must be a prompt, .*quotes around it"),
        (("model: tiny_wan\n", ""), r"a.yaml: model is missing; a job file needs model, data.cache, output"),
        (("cache: cache/a, ", ""), r"a.yaml: data.cache is missing"),
        (("loss: masked", "loss: masked\nloss: plain"), r"line 3: loss is there twice"),
        (("train:\n", "train: 3\nmore:\n"), r"line 4: train should hold keys and values on lines of their own"),
        (("data.flip", "trainer.max_steps"), r"line 13: trainer.max_steps says what train.steps says"),
        (("data.flip", "output_dir"), r"line 13: output_dir says what output says"),
        (("data.flip", "data.filp"), r"line 13: data.filp is not a setting of data; nearest is flip; there are"),
        (("data.flip", "data.preservation.rat"), r"line 13: data.preservation.rat is .*nearest is rate;"),
        (("data.flip", "trainr.max_steps"), r"line 13: trainr.max_steps is not .*any command; nearest is trainer"),
        (("data.flip", "data"), r"line 13: data is not a setting of any command"),
        (("data.flip", "a b"), r"line 13: 'a b' under set is no name of a setting"),
        (("loss: masked", "loss: a: b"), r"line 2: not YAML \(mapping values.*needs quotes"),
        (("loss: masked", "\tloss: masked"), r"line \d: not YAML"),
        (("loss: masked", "loss: &a [*a]"), r"line 2: loss holds itself"),
        ((JOB, "- a"), r"a.yaml should hold keys and values"),
        ((JOB, ""), r"a.yaml should hold keys and values"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_line(job, change, message):
    assert change[0] in JOB
    with pytest.raises(ValueError, match=message):
        read_job(job(JOB.replace(*change)))


def test_files_that_cannot_be_read_and_words_in_the_wrong_order_are_said(job):
    Path("u.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ValueError, match="u.yaml cannot be read as UTF-8 text"):
        read_job("u.yaml")
    with pytest.raises(ValueError, match="none.yaml is not there; python -m mpp.init"):
        cli.overrides("train", ["none.yaml"])
    with pytest.raises(ValueError, match="a.yaml must be the first word behind mpp.train"):
        cli.overrides("train", ["loss=plain", job()])
    with pytest.raises(ValueError, match="mpp.masks takes no job file; mpp.prepare"):
        cli.overrides("masks", [job()])
    assert cli.overrides("train", ["--config-name", "other.yaml"]) == ["--config-name", "other.yaml"]


# ---------------------------------------------------------------- init and run


def test_any_name_survives_from_init_to_hydra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws = random.Random(3)
    for _ in range(50):
        names = {
            key: drawn_name(draws).replace("$", "").strip() or "a" for key in ("images", "masks", "cache", "output")
        }
        said = {"model": "tiny_wan", "samples": drawn_name(draws).replace("$", "").strip() or "a", **names}
        Path("j.yaml").write_text(mpp.init.job_text("j.yaml", said), "utf-8")
        got = parsed(cli.overrides("prepare", ["j.yaml"]))
        assert [got["data.image_dir"], got["data.mask_dir"], got["data.cache_dir"]] == list(names.values())[:3]
        assert got["sampling.prompts"] == said["samples"]
        assert parsed(cli.overrides("export", ["j.yaml"]))["export.lora"] == names["output"]


def test_init_writes_a_file_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my photos").mkdir()
    monkeypatch.setattr(sys, "argv", ["mpp-init", "model=wan", "images=my photos", "steps=7", "lr=2e-5"])
    mpp.init.main()
    assert capsys.readouterr().out.endswith("then: python -m mpp.run 'my photos.yaml'\n")
    before = Path("my photos.yaml").read_text()
    got = parsed(cli.overrides("train", ["my photos.yaml"]))
    assert (got["trainer.max_steps"], got["optimizer.lr"], got["output_dir"]) == (7, 2e-5, "outputs/my photos")
    with pytest.raises(SystemExit, match="error: my photos.yaml is there and stays as it is"):
        mpp.init.main()
    assert Path("my photos.yaml").read_text() == before
    for words, message in (
        (["model=wan"], "images=... is missing"),
        (["model=wan", "images=none"], "images=none is not a folder"),
        (["model=wan", "image=x"], "image=x is not understood; type KEY=VALUE with one of model, loss"),
        (["model=wan", "images=my photos", "rank=big"], "rank must be a whole number, got 'big'"),
        (["model=wann", "images=my photos"], r"model=wann is not there; did you mean wan\? it is one of flux"),
        (["model=wan", "images=my photos", "schedule=cosin"], r"schedule=cosin is not there; did you mean cosine\?"),
    ):
        with pytest.raises(ValueError, match=message):
            mpp.init.write(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos", "my photos.yaml"]


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    mpp.init.write(["model=tiny_wan", "images=photos"])
    called = []
    monkeypatch.setattr(mpp.run, "call", lambda command, words: called.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["mpp-run", "photos.yaml"])
    mpp.run.main()
    assert called == ["prepare", "report", "train"]
    last = Path("outputs/photos/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    last.touch()
    with pytest.raises(SystemExit, match="error: output_dir=outputs/photos holds a run already; go on with resume="):
        mpp.run.main()
    assert called == ["prepare", "report", "train"]


def test_masks_that_are_to_be_made_are_made_first_and_their_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my photos").mkdir()
    calls, code = [], 1
    monkeypatch.setattr(mpp.init, "call", lambda name, words: calls.append((name, words)) or code)
    words = ["model=tiny_wan", "images=my photos", "masks=auto", "output=outputs/me"]
    with pytest.raises(ValueError, match="not all masks could be made, so no job file was written; what is done is"):
        mpp.init.write(words)
    assert not Path("me.yaml").exists()
    code = 0
    monkeypatch.setattr(sys, "argv", ["mpp-init", *words])
    mpp.init.main()
    assert "correct those that are wrong" in capsys.readouterr().out
    assert read_job("me.yaml").said.get("data.masks") is None  # none were written: all lie beside their images
    Path("me.yaml").unlink()
    Path("masks/me").mkdir(parents=True)
    mpp.init.write(words)
    tool = ["tool=salient", "input=my photos", "output=masks/me", "keep=true"]
    assert calls == [("masks", tool)] * 3
    assert read_job("me.yaml").said["data.masks"] == "masks/me"
    (typed,) = [line for line in Path("me.yaml").read_text().splitlines() if "mpp.masks" in line]
    assert shlex.split(typed.partition(": ")[2]) == ["python", "-m", "mpp.masks", *tool]
    with pytest.raises(ValueError, match="me.yaml is there and stays as it is"):
        mpp.init.write(words)
    monkeypatch.chdir("my photos")
    with pytest.raises(ValueError, match="masks=auto writes masks/me, which would lie in images=.; .*images=my photos"):
        mpp.init.write(["model=tiny_wan", "images=.", *words[2:]])
    assert len(calls) == 3


def test_run_checks_the_words_of_all_commands_before_the_first_begins(job, monkeypatch, capsys):
    monkeypatch.setattr(mpp.run, "call", lambda name, words: pytest.fail(f"mpp.{name} began"))
    monkeypatch.setattr(sys, "argv", ["mpp-run", job(), "optimizer.lrr=1", "loss=maskd", "data.resolution=much"])
    with pytest.raises(SystemExit) as ended:
        mpp.run.main()
    lines = str(ended.value.code).splitlines()
    assert [line.split()[1 if line.startswith("error: ") else 0] for line in lines] == [
        "data.resolution", "loss=maskd", "optimizer.lrr",
    ]  # fmt: skip
    assert "did you mean masked?" in lines[1]  # which report and train would both have said
    assert "did you mean optimizer.lr?" in lines[2]


@pytest.mark.parametrize("key", [key for key in KEYS if key not in KEYS[key].settings.values()])
def test_a_key_of_the_file_that_is_typed_behind_it_names_its_setting(job, key):
    told = {
        "data.cache": ["data.cache_dir", "report.cache_dir", "plan.cache_dir"],
        "train.batch": ["data.batch_size", "plan.batch_size"],
        "output": ["output_dir", "lora_path", "export.lora"],
    }
    with pytest.raises(ValueError, match=f"^{key} is a key of job files; its setting is ") as refused:
        mpp.run.commands([job(), f"{key}=1"])
    named = str(refused.value).rpartition(" is ")[2].split(" or ")
    assert named == told.get(key, [next(iter(KEYS[key].settings.values()))])
    for command in set(KEYS[key].settings) - {"report"}:  # whose own short word `output` is
        with pytest.raises(ValueError, match=f"its setting is {KEYS[key].settings[command]}$"):
            cli.overrides(command, [job(), f"{key}=1"])


def test_run_calls_three_commands_and_stops_at_the_first_that_fails(job, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(mpp.run, "call", lambda name, words: calls.append((name, words)) or 7 * (name == "report"))
    monkeypatch.setattr(sys, "argv", ["mpp-run", job(), "device=cpu", "loss=plain", "resume=x"])
    with pytest.raises(SystemExit) as ended:
        mpp.run.main()
    assert ended.value.code == 7
    assert [name for name, _ in calls] == ["prepare", "report"]
    assert parsed(calls[0][1]) == MEANT["prepare"] | {"device": "cpu"}
    assert parsed(calls[1][1]) == MEANT["report"] | {"loss": "plain"}
    assert "mpp.report ended with exit code 7; not started: mpp.train" in capsys.readouterr().err
    for words, message in (
        (
            [job(), "--multirun"],
            "mpp.run takes KEY=VALUE, --show, --quiet and --json behind the job file, got --multirun",
        ),
        ([job(), "trainr.x=1"], "trainr.x is not a setting of any command; nearest is trainer"),
        ([job(), "export.format=kohya"], "is for mpp.export, which mpp.run does not call"),
        (["model=wan"], "mpp.run wants a job file as its first word"),
    ):
        with pytest.raises(ValueError, match=message):
            mpp.run.commands(words)


def test_show_prints_what_can_be_typed_instead(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mpp-train", job(), "--show", "seed=3"])
    with pytest.raises(SystemExit) as ended:
        cli.rewrite_arguments("train")
    assert ended.value.code == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "mpp.train"]
    assert words[3:] == cli.overrides("train", [job(), "seed=3"])
    monkeypatch.setattr(sys, "argv", ["mpp-run", job(), "--show"])
    mpp.run.main()
    assert [w for w in shlex.split(capsys.readouterr().out.replace("\\\n", "")) if w[:4] == "mpp."] == [
        f"mpp.{n}" for n in mpp.run.STAGES
    ]


@pytest.mark.parametrize("module", [mpp.init, mpp.run])
def test_help_is_short_and_no_words_are_an_error(monkeypatch, capsys, module):
    for words, code in ((["--help"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["mpp", *words])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == code
        assert len(capsys.readouterr().out.splitlines()) < 20


QUICK = [
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "data.num_workers=0",
    "device=cpu",
    "prepare.workers=0",
]


@pytest.mark.slow
def test_a_newcomer_from_init_to_samples(tmp_path):
    draw_photos(tmp_path / "meine Fotos, 1", tmp_path / "masks", count=2)
    words = ["model=tiny_wan", "images=meine Fotos, 1", "masks=masks", "resolution=64", "steps=2", "output=outputs/ich"]
    assert run("mpp.init", *words, "samples=a red box, a dog --w 32 --h 32 --s 1", cwd=tmp_path).returncode == 0
    done = run("mpp.run", "ich.yaml", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "outputs" / "ich"
    assert (out / "lora.safetensors").is_file()
    assert (tmp_path / "cache" / "ich_report.html").is_file()
    assert (out / "samples" / "step-000002" / "0_a_red_box_a_dog.png").is_file()
    again = run("mpp.run", "ich.yaml", *QUICK, cwd=tmp_path)
    assert again.returncode == 1
    assert "outputs/ich holds a run already; go on with resume=outputs/ich" in again.stderr
    job = tmp_path / "ich.yaml"
    job.write_text(job.read_text().replace("lr: 1e-4", "lr: 5e-4"))  # of which the run's record knows nothing
    more = run("mpp.train", "ich.yaml", "resume=outputs/ich", "trainer.max_steps=3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "ich.yaml is set aside: a run goes on as it was begun" in more.stderr
    assert (out / "checkpoints" / "last.ckpt").is_file()
    sampled = run("mpp.sample", "ich.yaml", "device=cpu", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert (out / "generated" / "0_a_red_box_a_dog.png").is_file()
    exported = run("mpp.export", "ich.yaml", "format=peft", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr


@pytest.mark.slow
def test_a_first_run_needs_neither_masks_nor_a_hub(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in (REPOSITORY / "tests" / "masking" / "photos").glob("c*.jpg"):
        shutil.copy(photo, photos)
    words = ["model=tiny_wan", "images=photos", "masks=auto", "resolution=64", "steps=2"]
    made = run("mpp.init", *words, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "2 written to masks/photos, 0 there already" in made.stdout
    corrected = tmp_path / "masks" / "photos" / "cat.png"
    with Image.open(photos / "cat.jpg") as photo:
        Image.new("L", photo.size, 255).save(corrected)
    mine = corrected.read_bytes()
    (tmp_path / "photos.yaml").unlink()
    shutil.copy(photos / "coffee.jpg", photos / "more.jpg")
    again = run("mpp.init", *words, cwd=tmp_path)
    assert "1 written to masks/photos, 2 there already" in again.stdout
    done = run("mpp.run", "photos.yaml", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "masks: 3 of 3 (3 from folder)" in done.stdout
    assert (tmp_path / "outputs" / "photos" / "lora.safetensors").is_file()
    assert corrected.read_bytes() == mine


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_to_run_ends_training_as_it_ends_training_alone(tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=2)
    words = ["model=tiny_wan", "images=photos", "masks=masks", "resolution=64", "steps=100000"]
    assert run("mpp.init", *words, cwd=tmp_path).returncode == 0
    script = [sys.executable, "-m", "mpp.run", "photos.yaml", *QUICK]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    heard = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, cwd=tmp_path, env=environment, **heard) as process:
        log = tmp_path / "outputs" / "photos" / "train.log"
        for _ in range(1200):
            if log.is_file() and "step     10/100000, loss" in log.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "resume=outputs/photos" in log.read_text()
