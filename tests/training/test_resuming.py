"""What may change when a run goes on."""

import random
from pathlib import Path

import pytest
import yaml

from mpp.config import CONFIG_DIR
from mpp.settings import default_settings, locate
from mpp.training.resuming import RULES, SWITCHES, Reached, Switches, changes, decide, rule_of, rules_table
from tests.helpers import config

GROUPS = (
    "model",
    "loss",
    "teacher",
    "lora",
    "memory",
    "data",
    "optimizer",
    "schedule",
    "trainer",
    "callbacks",
    "logger",
    "sampling",
)
NOT_OURS = {"bitsandbytes", "wandb"}  # not installed with the tests
EXPECTED = {  # written from what each setting does; the longest key that leads to a setting counts
    "seed": "refused", "output_dir": "new", "ckpt_path": "new", "resume": "new", "resume_lr": "new",
    "resume_schedule": "new", "gradient_checkpointing": "applied", "compile": "applied", "val_sigmas": "applied",
    "validate_first": "applied",
    "model": "refused", "model.pretrained": "applied", "model.vae": "applied", "model.text_encoder": "applied",
    "model.loras": "applied",
    "model.text_dtype": "applied", "model.vae_dtype": "applied", "memory.vae": "applied",
    "model.pretrained_low": "applied",
    "model.offload": "applied",
    "loss": "refused", "teacher": "refused", "lora": "refused", "memory": "refused", "memory.activations": "applied",
    "memory.resident": "applied", "memory.teacher": "applied", "memory.card": "applied",
    "data": "refused", "data.cache_dir": "applied", "data.num_workers": "applied", "data.require_mask": "applied",
    "data.strict_masks": "applied", "data.strict_sources": "applied", "data.on_empty_mask": "applied",
    "data.preservation.cache_dir": "applied",
    "optimizer": "refused", "optimizer.lr": "resume_lr", "schedule": "resume_schedule",
    "callbacks": "applied", "callbacks.report.folder": "new", "callbacks.checkpoints.folder": "new",
    "callbacks.samples.folder": "new", "callbacks.page.folder": "new", "logger": "applied",
    "logger.tensorboard.save_dir": "new", "logger.csv.save_dir": "new", "logger.wandb.save_dir": "new",
    "logger.csv.version": "new", "sampling": "applied",
    "export": "applied",
    "trainer": "applied", "trainer._target_": "refused", "trainer.precision": "refused",
    "trainer.gradient_clip_val": "refused", "trainer.gradient_clip_algorithm": "refused",
    "trainer.accumulate_grad_batches": "refused", "trainer.limit_train_batches": "refused",
    "trainer.overfit_batches": "refused", "trainer.use_distributed_sampler": "refused",
    "trainer.reload_dataloaders_every_n_epochs": "refused", "trainer.fast_dev_run": "refused",
    "trainer.barebones": "refused", "trainer.sync_batchnorm": "refused",
}  # fmt: skip


def settings(node, path=""):
    """Every key of a node, those of nodes in it included."""
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict):
            yield from settings(value, key)
        yield key


def completed(node):
    """A node of a YAML with what its class adds."""
    target = str(node.get("_target_", ""))
    defaults = default_settings(locate(target)) if target and target.split(".", maxsplit=1)[0] not in NOT_OURS else {}
    made = {**{name: value for name, value in defaults.items() if name not in _MADE.get(target, ())}, **node}
    return {name: completed(value) if isinstance(value, dict) else value for name, value in made.items()}


_MADE = {"lightning.Trainer": ("logger", "callbacks", "plugins", "default_root_dir")}


@pytest.fixture(scope="module")
def known():
    """Every key that any option of any group has."""
    root = yaml.safe_load((CONFIG_DIR / "train.yaml").read_text())
    root = {name: value for name, value in root.items() if name not in ("defaults", "hydra")}
    found = set(settings({n: completed(value) if isinstance(value, dict) else value for n, value in root.items()}))
    for group in GROUPS:
        found.add(group)
        for path in (CONFIG_DIR / group).glob("*.yaml"):
            node = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name != "defaults"}
            found |= {f"{group}.{key}" for key in settings(completed(node))} if group not in node else set()
    return sorted(found)


@pytest.fixture(scope="module")
def recorded():
    """A resolved configuration as checkpoints hold it."""
    from mpp.config import plain_values

    return plain_values(config("train", ["model=tiny_wan", "data.cache_dir=x", "schedule=cosine", "output_dir=o"]))


def expected(key):
    parts = key.split(".")
    return next(EXPECTED[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in EXPECTED)


def test_every_setting_of_every_group_has_the_rule_that_it_needs(known):
    assert len(known) > 190
    assert [key for key in known if rule_of(key) is None] == []
    wrong = [
        f"{key}: {rule_of(key).verdict}, not {expected(key)}"
        for key in known
        if key != "trainer" and rule_of(key).verdict != expected(key)
    ]
    assert wrong == []


def test_no_pattern_is_left_over(known):
    patterns = [(rule, pattern) for rule in RULES for pattern in rule.keys.split()]
    unused = [p for rule, p in patterns if not any(key == p or (rule.covers(key) and _fits(key, p)) for key in known)]
    assert unused == []


def _fits(key, pattern):
    from fnmatch import fnmatchcase

    return fnmatchcase(key, pattern)


def other(value, random):
    """Another value of a setting, whatever it is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + random.choice([1, 3, 0.5])
    return random.choice(["other", 7, 0.25])


def put(node, key, value):
    """A copy with one value changed."""
    name, _, rest = key.partition(".")
    return {**node, name: put(node[name], rest, value) if rest else value}


def get(node, key):
    for name in key.split("."):
        node = node[name]
    return node


@pytest.mark.parametrize("seed", range(60))
def test_drawn_changes_are_applied_or_named_with_both_values(recorded, seed):
    draw = random.Random(seed)
    leaves = [k for k in settings(recorded) if not isinstance(get(recorded, k), dict) and not k.endswith("_target_")]
    of_rates = ("schedule", "trainer.max_steps", "trainer.max_epochs")  # they depend on each other: tests below
    chosen = draw.sample([key for key in leaves if not key.startswith(of_rates)], draw.randint(1, 6))
    new = recorded
    for key in chosen:
        new = put(new, key, other(get(recorded, key), draw))
    verdicts = {key: expected(key) for key in chosen}
    refused = [key for key, verdict in verdicts.items() if verdict in ("refused", "resume_lr")]
    try:
        decisions = decide(recorded, new, Switches(), {}, Reached(0, 0.1))
    except ValueError as error:
        said = str(error)
        assert refused
        for key in chosen:
            assert (f"\n  {key}: {get(recorded, key)} -> {get(new, key)} (" in said) == (key in refused), key
    else:
        assert not refused
        assert {change.key for change in decisions.applied} == {k for k, v in verdicts.items() if v == "applied"}
        assert (decisions.renew_rates, decisions.keep_schedule) == (False, False)


def test_what_nobody_has_thought_of_is_refused(recorded):
    with pytest.raises(ValueError, match=r"brand_new: \(not set\) -> 3 \(nothing is known of this setting"):
        decide(recorded, {**recorded, "brand_new": 3}, Switches(), {}, Reached(0, 0.1))


def test_of_another_class_the_class_alone_is_named(recorded):
    other_class = {"_target_": "prodigyopt.Prodigy", "lr": 1.0, "d0": 1e-6}
    with pytest.raises(ValueError, match="torch.optim.AdamW -> prodigyopt.Prodigy") as error:
        decide(recorded, {**recorded, "optimizer": other_class}, Switches(), {}, Reached(0, 0.1))
    assert str(error.value).count("\n  ") == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_change_that_follows_from_another_is_named_once(recorded, seed):
    draw = random.Random(seed)
    value = draw.randint(1, 9)
    new = put(put(recorded, "seed", value), "data.seed", value)
    with pytest.raises(ValueError, match=f"seed: 0 -> {value}") as error:
        decide(recorded, new, Switches(), {"data.seed": "${seed}"}, Reached(0, 0.1))
    assert "data.seed" not in str(error.value)
    with pytest.raises(ValueError, match=f"data.seed: 0 -> {value}"):  # what it follows from lies outside
        decide(
            recorded, put(recorded, "data.seed", value), Switches(), {"data.seed": "${oc.env:SEED}"}, Reached(0, 0.1)
        )


# ---------------------------------------------------------------- switches


@pytest.mark.parametrize("seed", range(20))
def test_another_rate_needs_its_switch(recorded, seed):
    new = put(recorded, "optimizer.lr", random.Random(seed).uniform(1e-6, 1e-2))
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.0001 -> .*resume_lr=new"):
        decide(recorded, new, Switches(resume_schedule="new"), {}, Reached(5, 1e-5, 1000))
    decisions = decide(recorded, new, Switches(resume_lr="new"), {}, Reached(5, 1e-5, 1000))
    assert decisions.renew_rates
    assert [change.key for change in decisions.applied] == ["optimizer.lr"]


@pytest.mark.parametrize("seed", range(60))
def test_another_length_asks_where_the_schedule_was_made_for_it(recorded, seed):
    draw = random.Random(seed)
    was, now = draw.sample(range(100, 4000), 2)
    step, kind = draw.randint(0, was), draw.choice(["cosine", "constant", "warmup"])
    follows = {"schedule.num_training_steps": "${trainer.max_steps}"} if kind == "cosine" else {}
    old = put(recorded, "trainer.max_steps", was)
    old = put(old, "schedule.num_training_steps", was) if kind == "cosine" else {**old, "schedule": None}
    if kind == "warmup":
        old = {**old, "schedule": {"_target_": "diffusers.optimization.get_constant_schedule_with_warmup"}}
    new = put(old, "trainer.max_steps", now)
    if kind == "cosine":
        new = put(new, "schedule.num_training_steps", now)
    reached = Reached(step, 2e-5, was if kind == "cosine" else None)
    choice = draw.choice([None, "keep", "new"])
    if now < step:
        with pytest.raises(ValueError, match=f"trainer.max_steps={now}: the run is at step {step} already"):
            decide(old, new, Switches(resume_schedule=choice), follows, reached)
    elif kind == "cosine" and choice is None:
        with pytest.raises(
            ValueError, match=f"{was} -> {now}.*was made for {was} steps; after {step} steps it is at 2e-05"
        ):
            decide(old, new, Switches(), follows, reached)
    else:
        decisions = decide(old, new, Switches(resume_schedule=choice), follows, reached)
        assert [change.key for change in decisions.applied] == ["trainer.max_steps"]
        assert decisions.renew_rates == (kind == "cosine" and choice == "new")
        assert decisions.keep_schedule == (kind == "cosine" and choice == "keep")


def test_a_schedule_that_was_kept_asks_again_when_the_run_grows_again(recorded):
    old = put(put(recorded, "trainer.max_steps", 2000), "schedule.num_training_steps", 1000)
    with pytest.raises(ValueError, match="2000 -> 3000: the schedule .* was made for 1000 steps"):
        decide(old, put(old, "trainer.max_steps", 3000), Switches(), {}, Reached(2000, 0.0, 1000))
    assert decide(
        old, put(old, "trainer.max_steps", 3000), Switches(None, "keep"), {}, Reached(2000, 0, 1000)
    ).keep_schedule


def test_a_schedule_that_was_kept_is_made_anew_when_that_is_asked_for(recorded):
    held = Reached(1500, 0.0, 1000, held_after=1000)
    assert decide(recorded, recorded, Switches(None, "new"), {}, held).renew_rates
    assert not decide(recorded, recorded, Switches(None, "keep"), {}, held).renew_rates
    assert not decide(recorded, recorded, Switches(), {}, held).renew_rates


def test_a_typed_schedule_needs_new(recorded):
    for new in ({**recorded, "schedule": None}, put(recorded, "schedule.num_warmup_steps", 7)):
        for choice in (None, "keep"):
            with pytest.raises(ValueError, match=r"schedule.*resume_schedule=new makes rates anew"):
                decide(recorded, new, Switches(resume_schedule=choice), {}, Reached(5, 1e-4, 1000))
        assert decide(recorded, new, Switches(resume_schedule="new"), {}, Reached(5, 1e-4, 1000)).renew_rates


def test_a_switch_without_a_change_does_nothing(recorded):
    for switches in (Switches("new"), Switches(None, "keep"), Switches("new", "new")):
        decisions = decide(recorded, recorded, switches, {}, Reached(5, 1e-4, 1000))
        assert (decisions.applied, decisions.renew_rates, decisions.keep_schedule) == ((), False, False)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_has_choices(name):
    with pytest.raises(ValueError, match=rf"{name} must be .*new, or be left out, got 'old'"):
        Switches(**{name: "old"})


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize("seed", range(50))
def test_changes_are_those_of_the_flat_values(seed):
    draw = random.Random(seed)

    def node(depth):
        return {
            f"k{n}": node(depth - 1)
            if depth and draw.random() < 0.4
            else draw.choice([1, 2.5, "a", None, [1, 2], True])
            for n in range(draw.randint(1, 4))
        }

    def flat(tree, path=()):
        pairs = [flat(v, (*path, k)) if isinstance(v, dict) else {(*path, k): v} for k, v in tree.items()]
        return {key: value for part in pairs for key, value in part.items()}

    old, new = node(2), node(2)
    found = {tuple(change.key.split(".")) for change in changes(old, new)}
    a, b = flat(old), flat(new)
    differ = {key for key in {*a, *b} if key not in a or key not in b or a[key] != b[key]}
    assert all(any(key[: len(at)] == at for at in found) for key in differ)
    assert all(any(key[: len(at)] == at for key in differ) for at in found)
    assert list(changes(old, old)) == []


def test_the_documents_have_the_table_of_the_code():
    text = (Path(__file__).parents[2] / "docs" / "resuming.md").read_text()
    assert "\n".join(rules_table()) in text
