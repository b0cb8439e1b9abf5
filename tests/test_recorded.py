"""Runs that go on by `resume=`: from their own recorded configuration, with what is typed besides."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import mpp.train
from mpp.config import compose, plain_values
from mpp.recorded import MOVED, recorded_settings
from mpp.settings import locate
from tests.helpers import train

REPOSITORY = Path(__file__).parents[1]
OLD = Path(__file__).parent / "fixtures" / "v0"
CONSTANT = ["trainer.max_steps=2", "data.batch_size=1", "callbacks.checkpoints.every_n_steps=1"]


def go_on(out, *words):
    """`python -m mpp.train resume=OUT ...`, in this process; logs of one second would lie in one folder."""
    logger = [] if any(word.startswith("logger") for word in words) else ["logger=tensorboard"]
    return mpp.train.run(compose("train", [f"resume={out}", *logger, *words]))


def last(out):
    return torch.load(Path(out) / "checkpoints" / "last.ckpt", weights_only=True)


def config_of(out):
    return last(out)["mpp"]["config"]


def refused(out, *words):
    """What is said."""
    with pytest.raises(ValueError) as error:
        go_on(out, *words)
    return str(error.value)


def same_adapters(one, other):
    a, b = (load_file(Path(folder) / "lora.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def begun(pipeline, prepared, tmp_path_factory):
    """A run of two steps with settings of its own; copied by whoever goes on with it."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(pipeline, prepared, out, *CONSTANT, "optimizer.lr=2e-3", "lora.rank=3", "loss=continuous", "data.seed=0")
    return out


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


# ---------------------------------------------------------------- the base


def test_alone_it_goes_on_with_the_recorded_configuration_bit_for_bit(pipeline, prepared, tmp_path):
    draw = random.Random(3)
    at = draw.randint(1, 4)
    own = [f"lora.rank={draw.randint(2, 5)}", "loss=binary", "data.batch_size=3", f"seed={draw.randint(1, 99)}"]
    own += ["trainer.max_steps=5", "logger=tensorboard", "callbacks.report=null"]
    every = ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_all=true"]
    train(pipeline, prepared, tmp_path / "straight", *own, *every)
    stopped = tmp_path / "straight" / "checkpoints" / f"step-{at:06d}.ckpt"
    (tmp_path / "moved" / "checkpoints").mkdir(parents=True)
    shutil.copy(stopped, tmp_path / "moved" / "checkpoints" / "last.ckpt")
    go_on(tmp_path / "moved")
    assert same_adapters(tmp_path / "straight", tmp_path / "moved")
    was, now = config_of(tmp_path / "straight"), config_of(tmp_path / "moved")
    assert now["callbacks"]["checkpoints"]["folder"] == now["output_dir"] == str(tmp_path / "moved")
    for each in (was, now):
        for key in ("output_dir", "resume", "callbacks", "logger"):
            each.pop(key)
    assert was == now


@pytest.mark.slow
def test_the_older_words_mean_the_same(run, tmp_path):
    shutil.copytree(run, tmp_path / "second")
    go_on(run, "trainer.max_steps=4")
    words = [f"output_dir={tmp_path / 'second'}", "ckpt_path=last", "trainer.max_steps=4", "logger=tensorboard"]
    mpp.train.run(compose("train", words))
    assert same_adapters(run, tmp_path / "second")
    assert config_of(tmp_path / "second")["lora"]["rank"] == 3


@pytest.mark.slow
def test_an_output_folder_that_follows_from_what_is_typed_is_found(pipeline, prepared, tmp_path):
    words = ["lora.rank=2", f"output_dir={tmp_path}/rank${{lora.rank}}"]
    train(pipeline, prepared, tmp_path, *CONSTANT, *words)
    mpp.train.run(compose("train", [*words, "ckpt_path=last", "trainer.max_steps=3", "logger=tensorboard"]))
    assert last(tmp_path / "rank2")["global_step"] == 3


@pytest.mark.slow
def test_a_chain_of_drawn_extensions_keeps_its_base_and_says_what_is_used(run, caplog):
    caplog.set_level("INFO", logger="mpp")
    draw, steps = random.Random(5), 2
    before = config_of(run)
    for _ in range(3):
        steps += draw.randint(1, 2)
        words = draw.sample(
            ["trainer.log_every_n_steps=2", "data.num_workers=0", "validate_first=false", "compile=false"], 2
        )
        caplog.clear()
        go_on(run, f"trainer.max_steps={steps}", *words)
        assert f"going on from {run}/checkpoints/last.ckpt" in caplog.text
        assert f"changed from here on: trainer.max_steps: {before['trainer']['max_steps']} -> {steps}" in caplog.text
        now = config_of(run)
        assert now["trainer"]["max_steps"] == steps == last(run)["global_step"]
        for key in ("lora", "loss", "optimizer", "model", "seed"):
            assert now[key] == before[key]
        before = now
    caplog.clear()
    go_on(run)
    assert "that is its end; trainer.max_steps=" in caplog.text


@pytest.mark.slow
def test_settings_of_options_that_are_no_default_can_be_typed(run):
    go_on(run, "logger.csv.flush_logs_every_n_steps=3", "trainer.max_steps=3")  # logger=csv is recorded
    assert config_of(run)["logger"]["csv"]["flush_logs_every_n_steps"] == 3
    assert len(list((run / "csv").glob("*/metrics.csv"))) >= 1


@pytest.mark.slow
def test_the_same_command_again_with_resume_is_no_change(pipeline, prepared, run):
    """As people do it: the whole line that began the run, its switches included."""
    line = [*CONSTANT, "optimizer.lr=2e-3", "lora.rank=3", "loss=continuous", "data.seed=0"]
    train(
        pipeline,
        prepared,
        run,
        *line,
        "ckpt_path=last",
        "trainer.max_steps=3",
        "~callbacks.report",
        "logger=tensorboard",
    )
    train(
        pipeline,
        prepared,
        run,
        *line,
        "ckpt_path=last",
        "trainer.max_steps=3",
        "~callbacks.report",
        "logger=tensorboard",
    )
    assert "report" not in config_of(run)["callbacks"]


# ---------------------------------------------------------------- refused

TYPED = {  # what may be typed, and what the message names; None: it is applied
    "lora.rank={}": (range(4, 9), "lora.rank: 3 -> {}"),
    "lora.alpha={}": ((8, 32, 64), "lora.alpha: 16 -> {}"),
    "lora=dora": ((0,), "lora.kind: lora -> dora"),
    "loss=masked": ((0,), "loss.prior_weight: 1.0 -> 0.0"),
    "loss.mask_gamma={}": ((0.5, 2.0), "loss.mask_gamma: 0.7 -> {}"),
    "teacher.eval_mode=true": ((0,), "teacher.eval_mode: False -> True"),
    "seed={}": (range(1, 9), "seed: 0 -> {}"),
    "data.batch_size={}": (range(2, 5), "data.batch_size: 1 -> {}"),
    "data.caption_dropout={}": ((0.1, 0.5), "data.caption_dropout: 0.0 -> {}"),
    "data.unmasked_probability={}": ((0.1, 0.5), "data.unmasked_probability: 0.0 -> {}"),
    "trainer.accumulate_grad_batches={}": (range(2, 5), "trainer.accumulate_grad_batches: 1 -> {}"),
    "trainer.gradient_clip_val={}": ((0.1, 2.0), "trainer.gradient_clip_val: 1.0 -> {}"),
    "optimizer=prodigy": ((0,), "optimizer._target_: torch.optim.AdamW -> prodigyopt.Prodigy"),
    "optimizer._target_=torch.optim.SGD": ((0,), "optimizer._target_: torch.optim.AdamW -> torch.optim.SGD"),
    "optimizer.weight_decay={}": ((0.0, 0.1), "optimizer.weight_decay: 0.01 -> {}"),
    "optimizer.lr={}": ((0.0005, 0.001), "optimizer.lr: 0.002 -> {}"),
    "schedule=warmup": ((0,), "schedule: None -> diffusers.optimization.get_constant_schedule_with_warmup"),
    "model.sigma.shift={}": ((1.0, 5.0), "model.sigma.shift: 3.0 -> {}"),
    "trainer.log_every_n_steps={}": ((3, 7), None),
    "trainer.max_steps={}": (range(3, 9), None),
    "val_sigmas=[0.{}]": ((2, 8), None),
}


def draw_typed(draw):
    """Words, and what a message must name."""
    words, named = [], []
    for key in draw.sample(list(TYPED), draw.randint(1, 5)):
        values, wanted = TYPED[key]
        value = draw.choice(list(values))
        if not any(
            word.partition(".")[0].partition("=")[0] == key.partition(".")[0].partition("=")[0] for word in words
        ):
            words.append(key.format(value))
            named += [wanted.format(value)] if wanted else []
    return words, named


def check_refusals(begun, seeds):
    for seed in seeds:
        words, named = draw_typed(random.Random(seed))
        if named:
            before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
            said = refused(begun, *words)
            assert [line for line in named if line not in said] == [], (words, said)
            assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == before


def test_drawn_settings_that_cannot_change_are_all_named_before_anything_is_built(begun, monkeypatch):
    monkeypatch.setattr("mpp.fitting.MaskedPriorModule", lambda **_: pytest.fail("built"))
    check_refusals(begun, range(3))


@pytest.mark.slow
def test_many_more_of_them(begun, monkeypatch):
    monkeypatch.setattr("mpp.fitting.MaskedPriorModule", lambda **_: pytest.fail("built"))
    check_refusals(begun, range(100, 150))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_another_cache_is_refused_by_what_it_holds_and_one_that_moved_is_taken(run, prepared, tmp_path, seed):
    draw = random.Random(seed)
    moved = shutil.copytree(prepared, tmp_path / "moved")
    rows = [json.loads(line) for line in (moved / "index.jsonl").read_text().splitlines()]
    gone = draw.sample([row["key"] for row in rows], draw.randint(1, 3))
    fewer = shutil.copytree(moved, tmp_path / "fewer")
    (fewer / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["key"] not in gone))
    said = refused(run, f"data.cache_dir={fewer}")
    assert f"8 then, {8 - len(gone)} now; gone: {', '.join(sorted(gone))}" in said
    go_on(run, f"data.cache_dir={moved}", "trainer.max_steps=3")
    assert config_of(run)["data"]["cache_dir"] == str(moved)
    shutil.rmtree(moved)
    assert "is not there; where the run's cache has moved, type data.cache_dir=FOLDER besides" in refused(run)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_what_older_versions_accepted_of_a_validation_goes_on_and_is_refused_only_when_typed(run, seed):
    """Recorded settings without effect are nobody's wish now; what is typed besides is."""
    draw = random.Random(seed)
    recorded, typed = draw.sample(["val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"], 2)
    content = last(run)
    content["mpp"]["config"]["trainer"][recorded] = draw.randint(2, 9)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    steps = content["global_step"] + 1
    with pytest.raises(ValueError, match=f"^trainer.{typed}=3: without effect"):
        go_on(run, f"trainer.max_steps={steps}", f"trainer.{typed}=3")
    go_on(run, f"trainer.max_steps={steps}")
    assert last(run)["global_step"] == steps


def test_switches_are_for_runs_that_go_on(pipeline, prepared, tmp_path):
    with pytest.raises(ValueError, match="resume_lr=new is for a run that goes on; say which, with resume=FOLDER"):
        train(pipeline, prepared, tmp_path, "resume_lr=new")
    assert not (tmp_path / "checkpoints").exists()


def test_another_number_of_processes_is_refused(run):
    content = last(run)
    content["mpp"]["resuming"]["processes"] = 2
    torch.save(content, run / "checkpoints" / "last.ckpt")
    assert "the run had 2 processes, and this start has 1" in refused(run, "trainer.max_steps=3")


@pytest.mark.slow
def test_what_has_been_done_since_is_only_left_behind_in_another_folder(run, tmp_path):
    first = run / "checkpoints" / "first.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", first)
    go_on(run, "trainer.max_steps=4")
    assert "is of step 2, and the run in" in refused(first, "trainer.max_steps=5")
    go_on(first, "trainer.max_steps=4", f"output_dir={tmp_path / 'branch'}")
    assert same_adapters(run, tmp_path / "branch")


# ---------------------------------------------------------------- rates


def rates_of(out, monkeypatch, *words):
    """The rate of each step of a start, as the optimizer had it."""
    rates = []
    original = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (_rate(self, rates), original(self, *a, **k))[1])
        go_on(out, *words)
    return rates


def _rate(optimizer, rates):
    if len(optimizer.param_groups[0]["params"]) > 1:  # not a stand-in
        rates.append(optimizer.param_groups[0]["lr"])


def cosine(step, warmup, length):
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (length - warmup)))


def draw_cosine(draw):
    """Length, warm-up, rate, another length, and the words of the run."""
    length, warmup, lr = draw.randint(3, 6), draw.randint(1, 2), draw.uniform(1e-4, 1e-2)
    own = ["schedule=cosine", f"schedule.num_warmup_steps={warmup}", f"optimizer.lr={lr}", "callbacks.report=null"]
    return length, warmup, lr, length + draw.randint(2, 5), [*own, f"trainer.max_steps={length}"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_longer_cosine_run_asks_and_with_new_has_the_rates_of_its_length(
    pipeline, prepared, tmp_path, monkeypatch, seed
):
    length, warmup, lr, longer, own = draw_cosine(random.Random(seed))
    train(pipeline, prepared, tmp_path, *own)
    said = refused(tmp_path, f"trainer.max_steps={longer}")
    assert f"trainer.max_steps: {length} -> {longer}: the schedule" in said
    assert f"was made for {length} steps; after {length} steps it is at 0. Choose resume_schedule=keep" in said
    found = rates_of(tmp_path, monkeypatch, f"trainer.max_steps={longer}", "resume_schedule=new")
    assert found == pytest.approx([lr * cosine(n, warmup, longer) for n in range(length, longer)], rel=1e-9)
    assert last(tmp_path)["mpp"]["resuming"]["schedule_steps"] == longer


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_longer_cosine_run_with_keep_stays_at_its_end_until_new_is_asked_for(
    pipeline, prepared, tmp_path, monkeypatch, seed
):
    length, warmup, lr, longer, own = draw_cosine(random.Random(seed))
    train(pipeline, prepared, tmp_path, *own)
    keep = "resume_schedule=keep"
    assert rates_of(tmp_path, monkeypatch, f"trainer.max_steps={longer}", keep) == [0.0] * (longer - length)
    assert last(tmp_path)["mpp"]["resuming"]["schedule_steps"] == length
    assert f"was made for {length} steps" in refused(tmp_path, f"trainer.max_steps={longer + 1}")
    every = ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_all=true"]
    assert rates_of(tmp_path, monkeypatch, f"trainer.max_steps={longer + 3}", keep, *every) == [0.0] * 3
    part = tmp_path / "part" / "checkpoints" / "last.ckpt"
    part.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "checkpoints" / f"step-{longer + 1:06d}.ckpt", part)
    found = rates_of(tmp_path / "part", monkeypatch, "resume_schedule=new")  # the length is what it was
    wanted = [lr * cosine(n, warmup, longer + 3) for n in range(longer + 1, longer + 3)]
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_epochs_and_shares_of_the_run_ask_too(pipeline, prepared, tmp_path, monkeypatch, seed):
    """Eight samples in batches of four are two steps an epoch; a warm-up that is a share moves with the length."""
    draw = random.Random(seed)
    kind, epochs = draw.choice(["cosine", "warmup"]), draw.randint(1, 3)
    more, share = epochs + draw.randint(1, 3), draw.choice([0.25, 0.5])
    own = [f"schedule={kind}", f"schedule.num_warmup_steps={share}", "optimizer.lr=1e-3", "callbacks.report=null"]
    own += ["data.batch_size=4", "trainer.max_steps=-1", f"trainer.max_epochs={epochs}"]
    train(pipeline, prepared, tmp_path / "run", *own)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    said = refused(tmp_path / "run", f"trainer.max_epochs={more}")
    assert (
        f"trainer.max_epochs: {epochs} -> {more}: the schedule of the learning rate was made for {2 * epochs} steps"
        in said
    )

    def rate(step, length):
        warmup = round(share * length)
        return 1e-3 * (cosine(step, warmup, length) if kind == "cosine" else min(1, step / warmup))

    found = rates_of(tmp_path / "run", monkeypatch, f"trainer.max_epochs={more}", "resume_schedule=new")
    assert found == pytest.approx([rate(n, 2 * more) for n in range(2 * epochs, 2 * more)], rel=1e-9)
    found = rates_of(tmp_path / "kept", monkeypatch, f"trainer.max_epochs={more}", "resume_schedule=keep")
    assert found == pytest.approx([rate(2 * epochs, 2 * epochs)] * 2 * (more - epochs), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_warm_up_in_steps_has_no_length_to_ask_about(pipeline, prepared, tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    length, warmup = draw.randint(1, 3), draw.randint(1, 6)
    longer = length + draw.randint(1, 3)
    own = ["schedule=warmup", f"schedule.num_warmup_steps={warmup}", "optimizer.lr=1e-3", "callbacks.report=null"]
    train(pipeline, prepared, tmp_path, *own, f"trainer.max_steps={length}")
    found = rates_of(tmp_path, monkeypatch, f"trainer.max_steps={longer}")
    assert found == pytest.approx([1e-3 * min(1, n / warmup) for n in range(length, longer)], rel=1e-9)


@pytest.mark.slow
def test_a_kept_schedule_ends_at_its_rate_and_stays_also_when_stopped_on_the_way(
    pipeline, prepared, tmp_path, monkeypatch
):
    """Cosine alone would rise again after its end."""
    own = ["schedule=cosine", "schedule.num_warmup_steps=1", "schedule.num_cycles=0.3", "optimizer.lr=1e-3"]
    every = ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_all=true", "callbacks.report=null"]
    train(pipeline, prepared, tmp_path / "run", *own, *every, "trainer.max_steps=3")
    found = rates_of(tmp_path / "run", monkeypatch, "trainer.max_steps=6", "resume_schedule=keep")
    end = 1e-3 * 0.5 * (1 + math.cos(math.pi * 0.3 * 2))
    assert found == pytest.approx([end] * 3, rel=1e-9)
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "checkpoints" / "step-000004.ckpt", tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert rates_of(tmp_path / "part", monkeypatch) == pytest.approx([end] * 2, rel=1e-9)
    assert same_adapters(tmp_path / "run", tmp_path / "part")


@pytest.mark.slow
def test_a_new_rate_is_taken_with_its_switch_and_recorded(run, monkeypatch):
    assert "optimizer.lr: 0.002 -> 0.0005" in refused(run, "optimizer.lr=5e-4")
    assert rates_of(run, monkeypatch, "optimizer.lr=5e-4", "resume_lr=new", "trainer.max_steps=4") == [5e-4, 5e-4]
    assert config_of(run)["optimizer"]["lr"] == 5e-4
    again = rates_of(run, monkeypatch, "optimizer.lr=5e-4", "resume_lr=new", "trainer.max_steps=5")
    assert again == rates_of(run, monkeypatch, "trainer.max_steps=6") == [5e-4]


# ---------------------------------------------------------------- older checkpoints


@pytest.mark.slow
def test_a_run_of_the_first_version_goes_on_with_its_recorded_configuration(tmp_path):
    out = shutil.copytree(OLD / "run", tmp_path / "run")
    assert "type data.cache_dir=FOLDER besides" in refused(out, "data.cache_dir=nowhere")
    paths = [f"model.pretrained={OLD / 'base'}", f"data.cache_dir={OLD / 'cache'}"]
    go_on(out, *paths, "logger.csv.version=csv/now")
    wanted = json.loads((OLD / "expected.json").read_text())["run"]["losses"]
    rows = (out / "csv" / "now" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    assert [float(v) for row in rows[1:] if (v := row.split(",")[column])] == pytest.approx(wanted, rel=1e-5)
    assert last(out)["mpp"]["resuming"]["schedule_steps"] == 8


@pytest.mark.slow
def test_a_checkpoint_without_a_configuration_goes_on_with_what_is_typed(pipeline, prepared, run):
    content = last(run)
    torch.save({**content, "mpp": {**content["mpp"], "config": {}}}, run / "checkpoints" / "last.ckpt")
    own = [*CONSTANT, "lora.rank=3", "loss=continuous", "ckpt_path=last", "trainer.max_steps=3", "logger=tensorboard"]
    train(pipeline, prepared, run, *own)
    assert last(run)["global_step"] == 3


def test_classes_by_their_older_names_are_found():
    families = re.findall(r"_target_: mpp\.models\.families\.(\S+)", "".join(
        path.read_text() for path in (REPOSITORY / "configs" / "model").glob("*.yaml")
    ))  # fmt: skip
    old = [*MOVED, *(f"mpp.models.{name}" for name in families), "mpp.models.tiny.tiny_wan", "torch.optim.AdamW"]
    base = recorded_settings({"config": {str(n): {"_target_": name} for n, name in enumerate(old)}})
    for number, name in enumerate(old):
        now = base[str(number)]["_target_"]
        assert locate(now)
        assert now == name or name.startswith("mpp.")


@pytest.mark.parametrize(("was", "now"), [(True, "checkpoint"), (False, "keep"), (None, "auto")])
def test_what_a_record_says_by_an_older_word_is_kept_by_that_of_now(was, now):
    base = recorded_settings({"config": {"seed": 1} if was is None else {"gradient_checkpointing": was}})
    assert base.memory.activations == now
    assert base.get("gradient_checkpointing") is None


def test_what_followed_from_other_settings_follows_again(begun):
    base = recorded_settings(last(begun)["mpp"])
    base.output_dir, base.seed = "elsewhere", 7
    now = plain_values(base)
    assert now["callbacks"]["checkpoints"]["folder"] == "elsewhere"
    assert now["data"]["seed"] == 0  # it was typed
    assert OmegaConf.is_interpolation(base.logger.csv, "version")


# ---------------------------------------------------------------- as users start it


def command(*words, cwd):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    started = [sys.executable, "-m", "mpp.train", *map(str, words)]
    return subprocess.run(started, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_command_goes_on_bit_for_bit_from_drawn_steps_in_chains(pipeline, prepared, tmp_path, seed):
    draw = random.Random(seed)
    end = draw.randint(7, 9)
    stops = sorted(draw.sample(range(1, end), 2))
    own = [
        f"data.batch_size={draw.choice([1, 2, 3])}", f"trainer.accumulate_grad_batches={draw.choice([1, 2])}",
        f"lora.rank={draw.randint(2, 6)}", "schedule=warmup", f"schedule.num_warmup_steps={draw.randint(1, 5)}",
        f"data.unmasked_probability={draw.choice([0, 0.3])}",
    ]  # fmt: skip
    train(pipeline, prepared, tmp_path / "straight", *own, f"trainer.max_steps={end}")
    train(pipeline, prepared, tmp_path / "parts", *own, f"trainer.max_steps={stops[0]}")
    for stop in (stops[1], end):
        more = command("resume=parts", f"trainer.max_steps={stop}", cwd=tmp_path)
        assert more.returncode == 0, more.stderr[-2000:]
    assert same_adapters(tmp_path / "straight", tmp_path / "parts")
    wrong = command("resume=parts", "lora.rank=9", "seed=4", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "lora.rank: " in wrong.stderr
    assert "seed: 0 -> 4" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_two_processes_go_on_from_the_recorded_configuration(pipeline, prepared, tmp_path):
    own = [
        "model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={prepared}", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "data.num_workers=0", "trainer.devices=2", "trainer.strategy=ddp", "lora.rank=2",
    ]  # fmt: skip
    starts = [["output_dir=straight", "trainer.max_steps=5"], ["output_dir=parts", "trainer.max_steps=2"]]
    for words in ([*own, *starts[0]], [*own, *starts[1]], ["resume=parts", "trainer.max_steps=5"]):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert same_adapters(tmp_path / "straight", tmp_path / "parts")
