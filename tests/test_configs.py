"""Every configuration composes, and mistakes in it are said."""

import inspect

import lightning
import pytest
from omegaconf import OmegaConf

from mpp.config import CONFIG_DIR, build, check_config
from tests.helpers import config

GROUPS = sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.glob("*/*.yaml"))
PRESETS = {  # prior_weight, threshold, gamma, floor, normalization
    "plain": (0.0, None, 1.0, 0.0, "global"),
    "masked": (0.0, None, 1.0, 0.05, "global"),
    "continuous": (1.0, None, 0.7, 0.0, "per_sample"),
    "threshold": (1.0, 0.1, 1.0, 0.0, "per_sample"),
    "binary": (1.0, None, 1.0, 0.0, "per_sample"),
}


@pytest.mark.parametrize("choice", GROUPS)
def test_every_group_option_composes_and_fits_its_class(choice):
    group, name = choice.split("/")
    root = "prepare" if name == "folder" else "train"
    needed = ["data.cache_dir=x"] + (["data.image_dir=y"] if root == "prepare" else [])
    # the tiny model, or checking would look for nothing more than types
    if group == "tool":
        cfg = config("masks", [f"tool={name}"])
    else:
        cfg = config(root, [f"{group}={name}", "output_dir=o" if root == "train" else "device=cpu", *needed])
    try:
        check_config(cfg)
    except ValueError as error:
        assert "is not installed; pip install 'mpp[" in str(error)  # an extra this environment lacks


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_documented_table(preset):
    loss = build(config("train", [f"loss={preset}", "data.cache_dir=x"]).loss)
    got = (loss.prior_weight, loss.prior_threshold, loss.mask_gamma, loss.mask_min_weight, loss.normalization)
    assert got == PRESETS[preset]


def test_every_trainer_flag_can_be_set_and_none_is_invented():
    flags = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    ours = {"logger", "callbacks", "plugins", "default_root_dir"}  # made from other groups
    cfg = config("train", ["data.cache_dir=x"])
    assert set(cfg.trainer) - {"_target_"} == flags - ours


def test_all_mistakes_are_named_at_once_with_their_path():
    cfg = config("train", ["data.cache_dir=x", "lora.rank='8'", "loss.normalization=batch", "+loss.tau=1"])
    with pytest.raises(
        ValueError, match=r"(?s)loss.normalization should be .*got 'batch'.*loss.tau is not a setting"
    ) as e:
        check_config(cfg)
    assert "lora.rank should be a valid integer, got '8'" in str(e.value)


def test_a_package_that_is_missing_is_named_with_its_extra():
    cfg = config("train", ["data.cache_dir=x"])
    OmegaConf.update(cfg, "optimizer._target_", "bitsandbytes_missing.optim.AdamW8bit")
    with pytest.raises(ValueError, match="optimizer needs the package bitsandbytes_missing, which is not installed"):
        check_config(cfg)


@pytest.mark.parametrize("override", ["los=threshold", "loss.prior_wieght=1", "loss=treshold", "trainer.max_step=3"])
def test_misspelt_groups_options_and_keys_are_errors(override):
    with pytest.raises(Exception, match=r"(?s)(not in struct|Could not (find|override)|In 'train')"):
        config("train", [override, "data.cache_dir=x"])
