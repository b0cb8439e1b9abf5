"""Flags of the Trainer: each does what it says, or is refused before anything is loaded, with the way."""

import inspect
import random
from pathlib import Path

import lightning
import pytest
import torch
from diffusers import WanTransformer3DModel
from lightning import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file

import mpp.train
from mpp.config import compose, plain_values
from mpp.training.flags import CALLBACKS, FLAGS, STRATEGIES, check_flags
from tests.helpers import logged, train, train_config
from tests.test_command_line import run as run_command
from tests.training.test_ddp import launch, run

ELSEWHERE = {"logger", "callbacks", "plugins", "default_root_dir"}  # made from other groups
DDP = "_target_: lightning.pytorch.strategies.DDPStrategy"
REFUSED = {  # values that did nothing, or something else than they say
    "accelerator": ["tpu", "xla"],
    "strategy": [
        "fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_2", "ddp_spawn", "ddp_fork", "ddp_notebook", "xla",
        "ddp_fork_find_unused_parameters_true", "single_device", "single_tpu", "nonsense",
        "{_target_: lightning.pytorch.strategies.ModelParallelStrategy, data_parallel_size: 2}",
        "{_target_: lightning.pytorch.strategies.FSDPStrategy}", f"{{{DDP}, static_graph: true}}",
        f"{{{DDP}, start_method: fork}}", f"{{{DDP}, model_averaging_period: 4}}",
    ],
    "precision": ["64-true", "bf16-true", "16-true", "transformer-engine", "64"],
    "fast_dev_run": ["true", "1", "7"],
    "overfit_batches": ["1", "0.5", "3"],
    "barebones": ["true"],
    "max_steps": ["0", "-2"],
    "max_epochs": ["0", "-3"],
    "max_time": ["'00:00:00:00'", "{seconds: 0}"],
    "limit_train_batches": ["0", "0.0", "1.5", "-1"],
    "limit_val_batches": ["-1", "1.5"],
    "limit_test_batches": ["1", "0.3"],
    "limit_predict_batches": ["2"],
    "log_every_n_steps": ["0", "-5"],
    "enable_checkpointing": ["false"],
    "accumulate_grad_batches": ["0", "-2"],
    "gradient_clip_val": ["-1.0"],
    "gradient_clip_algorithm": ["nonsense"],
    "use_distributed_sampler": ["true"],
    "sync_batchnorm": ["true"],
    "reload_dataloaders_every_n_epochs": ["1", "4"],
    "enable_autolog_hparams": ["false"],
    "model_registry": ["mine"],
    "num_nodes": ["0"],
    "profiler": ["xla", "nonsense"],
    "min_steps": ["3"],
    "min_epochs": ["2"],
    "val_check_interval": ["0.5"],
    "check_val_every_n_epoch": ["0"],
    "benchmark": ["true"],
}  # fmt: skip
TOGETHER = ("min_steps", "min_epochs", "val_check_interval", "benchmark")  # each alone is in its range
DEFAULTS = {**plain_values(compose("train", ["data.cache_dir=x"]).trainer), "deterministic": True}


def test_every_flag_of_this_lightning_is_classified():
    assert FLAGS.keys() | ELSEWHERE == inspect.signature(lightning.Trainer).parameters.keys()
    assert all(flag.accepts is None or flag.way for flag in FLAGS.values())


def refusal(words):
    """What is said of flags that are typed so, or nothing; other settings of the run are the defaults."""
    flags = {**DEFAULTS, **OmegaConf.to_container(OmegaConf.from_dotlist(words))}
    try:
        check_flags(flags, {})
    except ValueError as error:
        return str(error)
    return ""


def test_drawn_flags_that_would_not_do_what_they_say_are_all_named_with_the_way():
    draw = random.Random(0)
    pairs = [(name, value) for name, values in REFUSED.items() for value in values]
    assert [pair for pair in pairs if f"trainer.{pair[0]}" not in refusal(["=".join(pair)])] == []
    single = [name for name in REFUSED if name not in TOGETHER]
    for _ in range(100):
        chosen = draw.sample(single, draw.randint(1, 6))
        said = refusal([f"{name}={draw.choice(REFUSED[name])}" for name in chosen])
        assert sorted(line.split("=")[0] for line in said.splitlines()) == sorted(f"trainer.{name}" for name in chosen)
        if "strategy" in chosen:
            assert all(name in said for name in STRATEGIES)


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'")
@pytest.mark.parametrize("value", ["num_nodes=2", "devices=nonsense", "precision=16-mixed", "strategy=fsdp"])
def test_nothing_is_loaded_or_made_before_the_flags_are_checked(pipeline, prepared, tmp_path, monkeypatch, value):
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"trainer"):
        mpp.train.run(train_config(pipeline, prepared, tmp_path / "out", f"trainer.{value}"))
    assert not (tmp_path / "out").exists()


def test_callbacks_that_save_accumulate_or_stop_in_another_way_are_refused():
    for kind in ("ModelCheckpoint", "GradientAccumulationScheduler", "StochasticWeightAveraging", "Timer"):
        with pytest.raises(ValueError, match=rf"callbacks.mine: lightning.*{kind} does not go with.*{CALLBACKS[0]}"):
            check_flags(DEFAULTS, {"mine": {"_target_": f"lightning.pytorch.callbacks.{kind}"}, "off": None})
    check_flags(DEFAULTS, {"mine": {"_target_": "mine.Callback"}})


class Seen(Callback):
    """What is on during steps of training and validation."""

    found: dict[str, object]

    def on_train_batch_start(self, trainer, *_):
        Seen.found = {
            "anomaly": torch.is_anomaly_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "profiler": type(trainer.profiler).__name__,
            "sanity": Seen.found.get("sanity", 0),
            **{name: Seen.found[name] for name in ("inference", "validated") if name in Seen.found},
        }

    def on_validation_batch_start(self, trainer, *_):
        Seen.found["sanity"] = Seen.found.get("sanity", 0) + trainer.sanity_checking
        Seen.found["validated"] = Seen.found.get("validated", 0) + (not trainer.sanity_checking)
        Seen.found["inference"] = torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_flags_of_looking_closer_do_what_they_say(pipeline, prepared, tmp_path, capsys):
    Seen.found = {}
    words = ["detect_anomaly=true", "deterministic=true", "inference_mode=false", "profiler=simple"]
    words += ["num_sanity_val_steps=2", "enable_model_summary=true", "limit_val_batches=1", "val_check_interval=2"]
    try:
        train(
            pipeline, prepared, tmp_path, "data.val_fraction=0.5", "data.batch_size=1", "validate_first=false",
            f"+callbacks.seen={{_target_: {__name__}.Seen}}", *(f"trainer.{word}" for word in words),
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert Seen.found == {
        "anomaly": True, "deterministic": True, "profiler": "SimpleProfiler", "sanity": 1,
        "inference": False, "validated": 2,
    }  # fmt: skip


def steps_of(pipeline, prepared, folder, *words):
    trainer, _ = train(pipeline, prepared, folder, *(f"trainer.{word}" for word in words))
    return trainer.global_step, trainer.current_epoch


@pytest.mark.slow
def test_ends_are_where_they_were_set(pipeline, prepared, tmp_path):
    # Eight samples in batches of two: four steps make an epoch.
    assert steps_of(pipeline, prepared, tmp_path / "a", "max_steps=-1", "max_epochs=2") == (8, 2)
    assert steps_of(pipeline, prepared, tmp_path / "b", "max_steps=6", "max_epochs=9")[0] == 6
    assert (tmp_path / "b" / "lora" / "step-000006.safetensors").is_file()


@pytest.mark.slow
def test_a_time_ends_a_run_but_not_before_its_least_steps(pipeline, prepared, tmp_path):
    steps, _ = steps_of(pipeline, prepared, tmp_path / "a", "max_steps=100000", "max_time={seconds: 2}")
    assert 4 < steps < 1000
    assert (tmp_path / "a" / "lora" / f"step-{steps:06d}.safetensors").is_file()
    least = ["max_steps=100000", "max_time={seconds: 1}", f"min_steps={3 * steps}"]
    assert steps_of(pipeline, prepared, tmp_path / "b", *least)[0] >= 3 * steps


@pytest.mark.slow
def test_a_run_stops_early_where_lightnings_callback_says_so(pipeline, prepared, tmp_path):
    stop = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, stopping_threshold: 1000}"
    words = [f"+callbacks.stop={stop}", "data.val_fraction=0.25", "trainer.val_check_interval=2", "trainer.min_steps=3"]
    trainer, _ = train(pipeline, prepared, tmp_path, *words, "trainer.max_steps=50")
    assert trainer.global_step in (3, 4)
    assert (tmp_path / "lora.safetensors").is_file()


def test_clipping_by_value_bounds_each_gradient_and_by_norm_all_of_them(pipeline, prepared, tmp_path):
    sgd = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=1.0", "optimizer.weight_decay=0", "trainer.max_steps=1"]
    sgd += ["lora.alpha=4"]  # at the scale 1 the file holds the adapter as it is
    moved = {}
    for kind, most in (("norm", 1e-3), ("value", 1e-5)):
        words = [f"trainer.gradient_clip_algorithm={kind}", f"trainer.gradient_clip_val={most}"]
        train(pipeline, prepared, tmp_path / kind, *sgd, *words)
        state = load_file(tmp_path / kind / "lora.safetensors")
        moved[kind] = torch.cat([t.flatten() for name, t in state.items() if "lora_B" in name])  # from zero
    assert float(moved["norm"].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(moved["value"].abs().max()) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.slow
def test_nothing_is_logged_or_saved_where_it_is_switched_off(pipeline, prepared, tmp_path):
    off = ["~logger", "callbacks.checkpoints=null", "callbacks.samples=null", "callbacks.report=null"]
    off += ["callbacks.page=null"]
    mpp.train.run(train_config(pipeline, prepared, tmp_path / "out", *off, "+callbacks.learning_rate="
                               "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"))  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_share_of_an_epoch_between_validations_is_kept(pipeline, prepared, tmp_path):
    words = ["trainer.val_check_interval=0.5", "trainer.check_val_every_n_epoch=1", "validate_first=false"]
    train(pipeline, prepared, tmp_path, "data.val_fraction=0.25", "data.batch_size=1", "trainer.max_steps=6", *words)
    assert [row["step"] for row in logged(tmp_path) if "val/loss" in row] == [2, 5]


def test_settings_of_a_validation_that_does_not_take_place_are_all_refused(pipeline, prepared, tmp_path):
    draws, few = random.Random(9), {"trainer.val_check_interval": 7, "trainer.check_val_every_n_epoch": 2}
    few |= {"trainer.limit_val_batches": 3, "trainer.num_sanity_val_steps": 1, "val_sigmas": [0.5]}
    for _ in range(4):
        chosen = draws.sample(sorted(few), draws.randint(1, len(few)))
        off = "trainer.limit_val_batches" not in chosen and draws.random() < 0.5
        words = ["data.val_fraction=0.25", "trainer.limit_val_batches=0"] if off else []
        with pytest.raises(ValueError, match="without effect, since") as caught:
            train(pipeline, prepared, tmp_path / "out", *words, *(f"{name}={few[name]}" for name in chosen))
        assert all(f"{name}={few[name]}" in str(caught.value) for name in chosen)
        assert ("limit_val_batches=0 switches" in str(caught.value)) == off
    assert not (tmp_path / "out").exists()


def test_checkpoints_where_nobody_looks_for_them_are_refused(pipeline, prepared, tmp_path):
    elsewhere = f"callbacks.checkpoints.folder={tmp_path / 'elsewhere'}"
    with pytest.raises(
        ValueError, match=r"callbacks.checkpoints.folder=.*elsewhere: a run is looked for in its output_dir"
    ):
        train(pipeline, prepared, tmp_path / "out", elsewhere)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", REFUSED["strategy"][:1] + REFUSED["strategy"][12:14])
def test_the_command_refuses_a_strategy_with_one_message(prepared, tmp_path, strategy):
    ended = run_command(
        "mpp.train", "model=tiny_wan", f"data.cache_dir={prepared}", "trainer.accelerator=cpu", "trainer.devices=2",
        f"trainer.strategy={strategy}", "output_dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.count("error: trainer.strategy=") == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_ddp_as_a_class_with_its_settings_has_the_gradient_of_one_process(pipeline, prepared, tmp_path):
    base = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "trainer.max_steps=1", "data.batch_size=1"]
    ddp = f"{{{DDP}, gradient_as_bucket_view: true, bucket_cap_mb: 1, process_group_backend: gloo, timeout: "
    ddp += "{_target_: datetime.timedelta, minutes: 3}}"
    alone = run([pipeline, str(prepared), str(tmp_path / "one"), *base, "trainer.accumulate_grad_batches=2"])
    ranks = [f"trainer.strategy={ddp}", "trainer.devices=2"]
    both = launch([pipeline, str(prepared), str(tmp_path / "two"), *base, *ranks], 2)
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_processes_that_would_each_train_alone_are_refused(pipeline, prepared, tmp_path):
    ended = launch([pipeline, str(prepared), str(tmp_path / "out"), "trainer.devices=1"], 2)
    assert ended.returncode != 0
    assert "2 processes were started for a run of 1" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_docs_list_every_flag_that_is_refused():
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    for name, flag in FLAGS.items():
        if flag.accepts is not None:
            assert f"| `{name}` | {flag.way} |" in text
