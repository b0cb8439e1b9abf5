"""Every configuration composes, says nothing twice, and mistakes in it are said."""

import inspect
from itertools import groupby

import lightning
import pytest
from omegaconf import OmegaConf

from mpp.config import CONFIG_DIR, build, check_config, compose
from mpp.settings import default_settings, locate
from mpp.sources.clips import Clips
from tests.helpers import config

FILES = sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.yaml"))
GROUPS = [name for name in FILES if "/" in name]
FEW = ("model/wan22", "model/flux2", "model/qwen_image_layered", "model/tiny_wan")
PRESETS = {  # prior_weight, threshold, gamma, floor, normalization
    "plain": (0.0, None, 1.0, 0.0, "global"),
    "masked": (0.0, None, 1.0, 0.05, "global"),
    "continuous": (1.0, None, 0.7, 0.0, "per_sample"),
    "threshold": (1.0, 0.1, 1.0, 0.0, "per_sample"),
    "binary": (1.0, None, 1.0, 0.0, "per_sample"),
}
PINNED = {  # said although it is the class's default
    "optimizer/adamw.weight_decay",  # holds for other optimizers as well, chosen by optimizer._target_
}


def assert_fits(*choices):
    """Chosen together they compose and fit their classes, or this environment lacks their packages."""
    words = [choice.replace("/", "=") for choice in choices]
    if choices[0].startswith("tool/"):
        cfg = config("masks", words)
    elif choices[0].startswith("source/"):
        cfg = config(
            "prepare", [words[0].replace("source=", "data="), "device=cpu", "data.cache_dir=x", "data.image_dir=y"]
        )
    else:
        cfg = config("train", [*words, "output_dir=o", "data.cache_dir=x"])
    try:
        check_config(cfg)
    except ValueError as error:
        assert all("is not installed; pip install 'mpp[" in line for line in str(error).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("choice", GROUPS)
def test_every_group_option_composes_and_fits_its_class(choice):
    assert_fits(choice)


ALONE = [choice for choice in GROUPS if choice.startswith(("tool/", "source/", "experiment/"))]
OTHERS = [choice for choice in GROUPS if choice not in ALONE and (not choice.startswith("model/") or choice in FEW)]
SIDE_BY_SIDE = [list(options) for _, options in groupby(OTHERS, lambda choice: choice.split("/")[0])]
ROUNDS = [tuple(options[n % len(options)] for options in SIDE_BY_SIDE) for n in range(max(map(len, SIDE_BY_SIDE)))]


@pytest.mark.parametrize("choices", [*ROUNDS, *((choice,) for choice in ALONE)], ids=" ".join)
def test_options_of_all_groups_compose_together_and_fit_their_classes(choices):
    assert_fits(*choices)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_documented_table(preset):
    loss = build(config("train", [f"loss={preset}", "data.cache_dir=x"]).loss)
    got = (loss.prior_weight, loss.prior_threshold, loss.mask_gamma, loss.mask_min_weight, loss.normalization)
    assert got == PRESETS[preset]


# ---------------------------------------------------------------- a setting is written once


def known_to(node, below):
    """What a node would be without its own values: its class's defaults, over those that its file inherits."""
    try:
        defaults = default_settings(locate(node["_target_"])) if "_target_" in node else {}
    except ValueError:  # a package that is not installed
        defaults = {}
    return {**defaults, **below}


def merged(over, below):
    found = dict(below)
    for name, value in over.items():
        found[name] = merged(value, found.get(name) or {}) if isinstance(value, dict) else value
    return found


def inherited(name, node):
    """Settings of the files that a preset names in its `defaults`, complete."""
    found = {}
    for parent in node.get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            file = f"{name.split('/')[0]}/{parent}"
            above = yaml_of(CONFIG_DIR / f"{file}.yaml")
            found = merged(above, known_to(above, inherited(file, above)))
    return found


def yaml_of(path):
    return OmegaConf.to_container(OmegaConf.load(path))


def repeated(node, below, path):
    """Keys whose value is what would be there without it."""
    known = known_to(node, below)
    for name, value in node.items():
        here = f"{path}.{name}"
        if name == "_target_":
            if below.get(name) == value:
                yield here
        elif isinstance(value, dict):
            yield from repeated(value, known.get(name) or {} if "_target_" not in value else {}, here)
        elif name in known and known[name] == value and isinstance(known[name], bool) == isinstance(value, bool):
            yield here


def repetitions(name):
    node = yaml_of(CONFIG_DIR / f"{name}.yaml")
    below = inherited(name, node) if "/" in name else {}
    own = {key: value for key, value in node.items() if key not in ("defaults", "hydra")}
    return [f"{key} in configs/{name}.yaml" for key in set(repeated(own, below, name)) - PINNED]


# an experiment says all that its results depend on, whatever the defaults become
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("experiment/")])
def test_no_yaml_repeats_a_default_of_its_class(name):
    found = repetitions(name)
    assert not found, f"remove what is the default anyway: {', '.join(sorted(found))}"


def test_a_repeated_default_is_named_with_file_and_key(tmp_path, monkeypatch):
    files = {
        "loss/one.yaml": "_target_: mpp.core.loss.MaskedPriorLoss\nprior_weight: 1.0\nmask_gamma: 1\nmask_blur: 3\n",
        "loss/two.yaml": "defaults: [one, _self_]\nprior_weight: 1.0\nmask_blur: 0\nprior_threshold: null\n",
        "data/three.yaml": "_target_: mpp.sources.source.FolderSource\nclips: {fps: 24.0, count: 4}\nflip: true\n",
    }
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr("tests.test_configs.CONFIG_DIR", tmp_path)
    found = {name: repetitions(name) for name in ("loss/one", "loss/two", "data/three")}
    assert found["loss/one"] == ["loss/one.mask_gamma in configs/loss/one.yaml"]
    assert sorted(key.split()[0] for key in found["loss/two"]) == ["loss/two.prior_threshold", "loss/two.prior_weight"]
    assert found["data/three"] == ["data/three.clips.count in configs/data/three.yaml"]


# ---------------------------------------------------------------- every setting can be typed


def typed(command, *words):
    needed = {
        "train": ["data.cache_dir=x", "output_dir=o"],
        "prepare": ["data.cache_dir=x", "data.image_dir=y"],
        "export": ["lora=l", "export.format=peft"],
        "masks": ["tool=invert", "input=i", "output=o"],
    }
    return compose(command, [*needed[command], *words])


def test_a_setting_that_stands_in_no_yaml_can_be_typed():
    words = ["optimizer.betas=[0.8,0.9]", "trainer.benchmark=true", "loss.mask_blur=3", "teacher.eval_mode=true"]
    cfg = typed("train", *words)
    check_config(cfg)
    assert build(cfg.optimizer).keywords["betas"] == [0.8, 0.9]
    assert cfg.trainer.benchmark is True
    assert build(cfg.loss).mask_blur == 3
    assert build(cfg.teacher).eval_mode


def test_settings_of_a_record_inside_another_can_be_typed():
    words = ["data.clips.fps=24.0", "data.caption_variants={trigger: zarp}", "data.preservation.caption=''"]
    cfg = typed("prepare", *words)
    check_config(cfg)
    source = build(cfg.data)
    assert (source.clips.fps, list(source.clips.frames)) == (24.0, list(Clips().frames))
    assert (source.caption_variants.trigger, source.caption_variants.keep_tags) == ("zarp", 1)
    assert source.preservation.caption == ""
    cfg = typed("train", "data.preservation.rate=0.5", "data.preservation.caption=''")
    assert build(cfg.data.preservation).rate == 0.5
    assert build(typed("train", "model=toy", "model.sigma.shift=5.0").model).sigma.shift == 5.0


def test_a_class_that_is_typed_brings_its_own_settings():
    cfg = typed("train", "optimizer.momentum=0.9", "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1")
    assert build(cfg.optimizer).keywords["momentum"] == 0.9
    assert "betas" not in cfg.optimizer
    cfg = typed("train", "model=wan", "model.sigma.shift={_target_: mpp.core.flow.LinearShift, max_mu: 2.0}")
    assert build(cfg.model).sigma.shift.max_mu == 2.0


def test_a_plus_before_a_known_setting_changes_nothing():
    assert build(typed("train", "+optimizer.betas=[0.8,0.9]").optimizer).keywords["betas"] == [0.8, 0.9]
    assert typed("train", "++loss.mask_blur=3", "+lora.rank=4").lora.rank == 4


def test_values_that_refer_to_others_are_left_as_they_are():
    cfg = typed("train", "seed=7", "lora.alpha=${lora.rank}")
    assert cfg.data.seed == 7
    assert cfg.lora.alpha == 16
    assert OmegaConf.is_interpolation(cfg.lora, "alpha")


def test_what_is_switched_off_stays_off():
    cfg = typed("train", "callbacks.report=null", "schedule=constant", "lora=none")
    assert (cfg.callbacks.report, cfg.schedule, cfg.lora) == (None, None, None)


def test_the_configuration_holds_all_settings_for_the_record():
    cfg = typed("train")
    assert set(cfg.loss) - {"_target_"} == set(default_settings(locate(cfg.loss._target_)))
    assert set(cfg.data.preservation) - {"_target_"} == {"rate", "replace", "caption", "cache_dir"}


def test_every_trainer_flag_can_be_set_and_none_is_invented():
    flags = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    ours = {"logger", "callbacks", "plugins", "default_root_dir"}  # made from other groups
    cfg = config("train", ["data.cache_dir=x"])
    assert set(cfg.trainer) - {"_target_"} == flags - ours


def test_a_configuration_from_another_folder_is_completed_too(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("_target_: mpp.core.loss.MaskedPriorLoss\nprior_weight: 0.5\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "loss=mine", "loss.mask_gamma=0.5"]
    loss = build(typed("train", *words).loss)
    assert (loss.prior_weight, loss.mask_gamma) == (0.5, 0.5)


# ---------------------------------------------------------------- mistakes


def test_all_mistakes_are_named_at_once_with_their_path():
    cfg = config("train", ["data.cache_dir=x", "lora.rank='8'", "loss.normalization=batch", "+loss.tau=1"])
    with pytest.raises(
        ValueError, match=r"(?s)loss.normalization should be .*got 'batch'.*loss.tau is not a setting"
    ) as e:
        check_config(cfg)
    assert "lora.rank should be a valid integer, got '8'" in str(e.value)


def test_what_has_to_be_said_is_named_where_it_is_missing():
    with pytest.raises(ValueError, match=r"data.cache_dir=... is missing \(The cache\).*\nlora.rank should be"):
        check_config(config("train", ["lora.rank='8'"]))


def test_unknown_settings_of_other_packages_are_named_too():
    cfg = typed("train", "+trainer.max_step=3", "+trainer.callbacks=[]", "+optimizer.beta=1")
    with pytest.raises(
        ValueError, match=r"trainer.max_step is not a setting of lightning.Trainer; did you mean trainer.max_steps"
    ) as caught:
        check_config(cfg)
    assert "trainer.callbacks is not a setting" in str(caught.value)
    assert "optimizer.beta is not a setting of torch.optim.AdamW; did you mean optimizer.betas?" in str(caught.value)


def test_a_class_that_is_not_there_is_named():
    cfg = typed("train", "model._target_=mpp.models.nothing.Nothing")
    with pytest.raises(ValueError, match="model: _target_=mpp.models.nothing.Nothing names no class"):
        check_config(cfg)


def test_a_package_that_is_missing_is_named_with_its_extra():
    cfg = config("train", ["data.cache_dir=x"])
    OmegaConf.update(cfg, "optimizer._target_", "bitsandbytes_missing.optim.AdamW8bit")
    with pytest.raises(ValueError, match="optimizer needs the package bitsandbytes_missing, which is not installed"):
        check_config(cfg)
    with pytest.raises(Exception, match="optimizer needs the package bitsandbytes_missing"):
        typed("train", "optimizer._target_=bitsandbytes_missing.optim.AdamW8bit", "optimizer.optim_bits=32")


@pytest.mark.parametrize(
    ("command", "word", "message"),
    [
        ("train", "los=threshold", r"los is not a setting of this command; did you mean loss\? it has .*trainer"),
        ("train", "loss=treshold", r"loss=treshold is not there; did you mean threshold\? it is .*plain"),
        ("train", "loss.prior_wieght=1", r"loss.prior_wieght is .*Loss; did you mean loss.prior_weight\? .*mask_blur"),
        ("train", "trainer.max_step=3", r"trainer.max_step is not .*Trainer; did you mean trainer.max_steps\?"),
        ("train", "trainer.callbacks=[]", r"trainer.callbacks is not a setting of lightning.Trainer"),
        ("train", "callbacks.sample=null", r"callbacks.sample is not .* callbacks; did you mean callbacks.samples\?"),
        ("train", "model.sigma.shfit=5", r"model.sigma.shfit is not .*flow.SigmaLaw; did you mean model.sigma.shift\?"),
        ("train", "optimzer._target_=torch.optim.SGD", r"optimzer is not .*this command; did you mean optimizer\?"),
        ("prepare", "data.clips.fsp=24", r"data.clips.fsp is not .*Clips; did you mean data.clips.fps\?"),
        ("prepare", "data.batch_size=2", r"data.batch_size is not .*; did you mean prepare.batch_size\?"),
        ("export", "export.fromat=kohya", r"export.fromat is not .*Export; did you mean export.format\?"),
        ("masks", "tool.sigma=3", r"tool.sigma is not a setting of mpp.masking.tools.Invert; it has none"),
    ],
)  # fmt: skip
def test_misspelt_groups_options_and_keys_are_errors_that_name_the_nearest(command, word, message):
    with pytest.raises(Exception, match=message):
        typed(command, word)


def test_a_setting_of_what_is_switched_off_is_an_error():
    with pytest.raises(Exception, match="lora.rank is not a setting of lora; it has none"):
        typed("train", "lora=none", "lora.rank=8")
