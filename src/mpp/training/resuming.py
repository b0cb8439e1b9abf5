"""What may be changed when a run goes on: its recorded settings against those of now, key by key.

Plain values in, decisions out: nothing is read here and nothing is built.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Settings = Mapping[str, Any]
_ABSENT = "(not set)"
SWITCHES = {  # what may be typed to allow a change, and its choices
    "resume_lr": ("new",),
    "resume_schedule": ("keep", "new"),
}


@dataclass(frozen=True)
class Rule:
    """What happens to settings that are typed anew when a run goes on.

    Attributes:
        keys: Patterns of their keys, separated by spaces.
        verdict: `applied` from here on; `refused`; allowed by a switch of that name; or `new`: each start has its own,
            so that nothing is compared.
        reason: Why.
    """

    keys: str
    verdict: Literal["applied", "refused", "resume_lr", "resume_schedule", "new"]
    reason: str

    def covers(self, key: str) -> bool:
        """Whether it is about a key."""
        return any(fnmatchcase(key, pattern) for pattern in self.keys.split())


RULES = (  # the first that covers a key holds
    Rule("resume resume_lr resume_schedule ckpt_path output_dir", "new", "they say how this start goes on"),
    Rule("callbacks.*.folder logger.*.save_dir logger.csv.version", "new", "they follow `output_dir` and the time"),
    Rule("trainer.max_steps trainer.max_epochs", "applied", "the run ends elsewhere; a schedule that was made for its "
         "length asks for `resume_schedule`"),
    Rule("trainer.min_steps trainer.min_epochs trainer.max_time", "applied", "the run ends elsewhere"),
    Rule("callbacks callbacks.* logger logger.* trainer.log_every_n_steps trainer.enable_progress_bar "
         "trainer.enable_model_summary trainer.enable_checkpointing trainer.enable_autolog_hparams "
         "trainer.model_registry trainer.profiler", "applied", "what is saved, logged and shown changes no weights"),
    Rule("export export.*", "applied", "files for other programs, and what files say, change no weights"),
    Rule("sampling sampling.* model.text_dtype model.vae_dtype memory.vae", "applied",
         "generations change no weights; prompts must have been prepared"),
    Rule("val_sigmas validate_first trainer.val_check_interval trainer.check_val_every_n_epoch "
         "trainer.num_sanity_val_steps trainer.limit_val_batches trainer.limit_test_batches "
         "trainer.limit_predict_batches trainer.inference_mode", "applied", "validation changes no weights"),
    Rule("memory.activations memory.resident memory.teacher memory.card gradient_checkpointing compile "
         "data.num_workers model.offload trainer.accelerator trainer.benchmark trainer.deterministic "
         "trainer.detect_anomaly", "applied",
         "speed and memory; on other hardware the last bits may differ"),
    Rule("trainer.devices trainer.num_nodes trainer.strategy", "applied",
         "which devices; their number must stay, since each process has its own place in the epoch"),
    Rule("data.require_mask data.strict_masks data.strict_sources", "applied", "checks before the start"),
    Rule("data.cache_dir data.preservation.cache_dir data.on_empty_mask", "applied",
         "a cache may move; the samples must be those that the run began with"),
    Rule("model.pretrained model.pretrained.* model.pretrained_low model.loras model.vae model.text_encoder", "applied",
         "weights may move; they are compared by their fingerprints"),
    Rule("optimizer.lr", "resume_lr", "the checkpoint goes on with its own rate"),
    Rule("schedule schedule.*", "resume_schedule", "the rate of every step follows from it"),
    Rule("seed data.seed", "refused", "noise, sigma, order and split would be others"),
    Rule("model model.*", "refused", "another base, or another law of its noise: the adapter would learn to correct "
         "something else"),
    Rule("memory memory._target_ memory.base", "refused",
         "the adapter learned on a base in other bits; a new run takes the LoRA by lora.init"),
    Rule("lora lora.*", "refused", "the checkpoint's tensors are this adapter's, at this scale"),
    Rule("loss loss.* teacher teacher.*", "refused", "the optimizer's state belongs to gradients of this loss"),
    Rule("optimizer optimizer.*", "refused", "its state and settings lie in the checkpoint and would win in silence"),
    Rule("data data._target_ data.layout data.batch_size data.val_fraction data.unmasked_probability "
         "data.caption_dropout data.preservation data.preservation.* trainer.accumulate_grad_batches "
         "trainer.limit_train_batches trainer.overfit_batches trainer.use_distributed_sampler "
         "trainer.reload_dataloaders_every_n_epochs", "refused",
         "the place in the epoch counts batches in an order that follows from it"),
    Rule("trainer trainer._target_ trainer.precision trainer.gradient_clip_val trainer.gradient_clip_algorithm "
         "trainer.fast_dev_run trainer.barebones trainer.sync_batchnorm", "refused",
         "steps from here on would be of another kind"),
)  # fmt: skip


def rule_of(key: str) -> Rule | None:
    """The rule that holds for a key; None where nobody has thought of it, which is refused."""
    return next((rule for rule in RULES if rule.covers(key)), None)


@dataclass(frozen=True)
class Change:
    """A setting with its recorded value and that of now; `(not set)` where there is none."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """For people."""
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Any, new: Any, key: str = "") -> Iterator[Change]:  # noqa: ANN401
    """Every setting that differs; of a node whose class differs, the class alone."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        classes = old.get("_target_"), new.get("_target_")
        names = {**old, **new} if classes[0] == classes[1] else ["_target_"]
        for name in names:
            inner = f"{key}.{name}" if key else str(name)
            yield from changes(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
    elif old != new:
        yield Change(
            key, *(value.get("_target_", "...") if isinstance(value, Mapping) else value for value in (old, new))
        )


@dataclass(frozen=True)
class Switches:
    """What was typed to allow changes.

    Raises:
        ValueError: A value that is no choice.
    """

    resume_lr: str | None = None
    resume_schedule: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no choice."""
        for name, choices in SWITCHES.items():
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name} must be {' or '.join(choices)}, or be left out, got {getattr(self, name)!r}")

    def typed(self) -> list[str]:
        """Those that were, as words."""
        return [f"{name}={value}" for name in SWITCHES if (value := getattr(self, name)) is not None]


@dataclass(frozen=True)
class Decisions:
    """How a run goes on.

    Attributes:
        applied: Settings that are others from here on.
        renew_rates: Learning rates are made anew from optimizer and schedule, for the step that is reached.
        keep_schedule: The schedule stays what it was made as, and after its end the rate stays.
    """

    applied: tuple[Change, ...]
    renew_rates: bool
    keep_schedule: bool


@dataclass(frozen=True)
class Reached:
    """Where the run is.

    Attributes:
        step: Optimizer steps done.
        rate: Learning rate of the next one, as the checkpoint has it.
        made_for: Optimizer steps that the schedule was made for; None: it has no length, or it is not known.
        held_after: Optimizer steps after which the rate stays, since the schedule was kept; None: it does not.
    """

    step: int
    rate: float
    made_for: int | None = None
    held_after: int | None = None


def decide(old: Settings, new: Settings, switches: Switches, follows: Mapping[str, str], reached: Reached) -> Decisions:
    """Which changes are applied.

    Args:
        old: Recorded settings, complete and resolved.
        new: Those of now.
        switches: What was typed to allow changes.
        follows: Settings of now that follow from others, by key, as `${key}` of those.
        reached: Where the run is.

    Raises:
        ValueError: Names every change that cannot be, with the reason and the way.
    """
    every = list(changes(old, new))
    found = [c for c in every if _verdict(c.key) != "new" and not _is_echo(c.key, follows, {c.key for c in every})]
    behind = new.get("trainer", {}).get("max_steps", -1)
    refused = []
    if 0 <= behind < reached.step and any(change.key == "trainer.max_steps" for change in found):
        refused.append(f"trainer.max_steps={behind}: the run is at step {reached.step} already")
    lr = [change for change in found if _verdict(change.key) == "resume_lr"]
    schedule = [change for change in found if _verdict(change.key) == "resume_schedule"]
    followed = [change for change in schedule if change.key in follows]
    length = [change for change in found if change.key in ("trainer.max_steps", "trainer.max_epochs")]
    if lr and switches.resume_lr is None:
        refused += [_refusal(change, "resume_lr=new takes the new rate from here on") for change in lr]
    typed = [change for change in schedule if change not in followed]
    if typed and switches.resume_schedule != "new":
        refused += [_refusal(change, "resume_schedule=new makes rates anew from here on") for change in typed]
    lengthy = reached.made_for is not None or "num_training_steps" in (new.get("schedule") or {})
    asks = bool(followed or (length and lengthy and not typed))
    if asks and switches.resume_schedule is None:
        refused.append(_question(length, reached))
    refused += [_refusal(change) for change in found if _verdict(change.key) == "refused"]
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise ValueError(
            f"a run goes on as it began, which cannot be here:{lines}\nLeave these out, or begin a run of its own with "
            "another output_dir; docs/resuming.md has all rules"
        )
    other_schedule = asks or bool(typed) or reached.held_after is not None
    anew = bool(lr) or (switches.resume_schedule == "new" and other_schedule)
    return Decisions(
        applied=tuple(change for change in found if change not in followed),
        renew_rates=anew,
        keep_schedule=asks and switches.resume_schedule == "keep",
    )


def _verdict(key: str) -> str:
    rule = rule_of(key)
    return "refused" if rule is None else rule.verdict


def _is_echo(key: str, follows: Mapping[str, str], changed: Set[str]) -> bool:
    """Whether a change only repeats that of the setting which it follows from; the schedule's are looked at."""
    sources = (value[2:-1] + key[len(at) :] for at, value in follows.items() if f"{key}.".startswith(f"{at}."))
    return _verdict(key) != "resume_schedule" and any(source in changed for source in sources)


def _refusal(change: Change, way: str = "") -> str:
    rule = rule_of(change.key)
    reason = "nothing is known of this setting on going on" if rule is None else rule.reason
    return f"{change} ({reason}{'; ' if way else ''}{way})"


def _question(length: Sequence[Change], reached: Reached) -> str:
    changed = ", ".join(map(str, length)) or "its length"
    known = f"{reached.made_for} steps" if (reached.made_for or 0) > 0 else "another length"
    return (
        f"{changed}: the schedule of the learning rate was made for {known}; after {reached.step} steps it is at "
        f"{reached.rate:g}. Choose resume_schedule=keep (rates as they were planned, and after the schedule's end the "
        "last of them) or resume_schedule=new (from the next step on, the rates of a run that has the new length from "
        "its beginning)"
    )


def rules_table() -> list[str]:
    """The rules as lines of a table in Markdown."""
    words = {"applied": "applied, and said", "new": "each start has its own"}
    lines = ["| settings | typed anew | why |", "|---|---|---|"]
    for rule in RULES:
        keys = " ".join(f"`{key}`" for key in rule.keys.split())
        switch = f"refused; `{rule.verdict}={'`, `'.join(SWITCHES.get(rule.verdict, ()))}` allows it"
        verdict = switch if rule.verdict in SWITCHES else words.get(rule.verdict, rule.verdict)
        lines.append(f"| {keys} | {verdict} | {rule.reason} |")
    return lines
