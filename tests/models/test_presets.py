"""A model's settings stand in its class; presets hold what differs, and the command line reaches all of them."""

import pytest

from mpp.config import CONFIG_DIR, build, check_config
from mpp.core.flow import LinearShift, SigmaLaw
from mpp.models.contract import LatentSpec
from tests.helpers import config

pytestmark = pytest.mark.slow

PRESETS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml") if path.stem not in ("toy", "tiny_wan"))


def model(*overrides):
    cfg = config("train", ["data.cache_dir=x", *overrides])
    check_config(cfg)
    return build(cfg.model)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_that_no_yaml_names_can_be_typed(preset):
    chosen = model(
        f"model={preset}", "model.vae=v", "model.text_encoder=t", "model.dtype=float16", "model.sigma.std=0.5"
    )
    assert (chosen.vae, chosen.text_encoder, chosen.dtype, chosen.sigma.std) == ("v", "t", "float16", 0.5)
    plain = model(f"model={preset}")
    assert (plain.vae, plain.text_encoder, plain.dtype) == (plain.pretrained, plain.pretrained, "bfloat16")
    assert (plain.sigma.std, plain.latents) == (1.0, chosen.latents)


def test_a_part_of_a_default_changes_and_the_rest_stays():
    assert model("model=wan", "model.latents.channels=8").latents == LatentSpec(8, 8, 4, (1, 2, 2))
    assert model("model=wan22_5b", "model.latents.channels=8").latents == LatentSpec(8, 16, 4, (1, 2, 2))
    assert model("model=wan22_high", "model.sigma.shift=5").sigma == SigmaLaw("logit_normal", shift=5, min_sigma=0.875)
    assert model("model=flux", "model.sigma.shift.max_mu=2").sigma.shift == LinearShift(256, 0.5, 4096, 2)
    assert model("model=flux", "model.sigma.shift=2").sigma.shift == 2


@pytest.mark.parametrize("override", ["model.vea=x", "model.sigma.shfit=5", "model.latents.chanels=8"])
def test_a_misspelt_setting_is_an_error(override):
    with pytest.raises(Exception, match=r"(not in struct|Could not override|is not a setting of)"):
        model(override)
