"""The entries as users start them, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import draw_photos

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
TRAIN = [
    "model=tiny_wan",
    "trainer.max_steps=2",
    "trainer.precision=32-true",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
]


def run(module, *arguments, cwd, path=REPOSITORY / "src"):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_images_to_lora_by_the_two_commands(tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=4)
    prepared = run(
        "mpp.prepare", "model=tiny_wan", "data.image_dir=photos", "data.mask_dir=masks", "data.cache_dir=c",
        "data.resolution=64", cwd=tmp_path,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert "samples: 4 (4 encoded" in prepared.stdout
    trained = run("mpp.train", *TRAIN, "loss=threshold", "data.cache_dir=c", "output_dir=out", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert "masked prior preservation, threshold mode" in (tmp_path / "out" / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.cache_dir=none"], "error: no cache at none; make one with"),
        (["data.cache_dir=c", "loss.prior_weight=-1"], "error: loss.prior_weight must be at least 0, got -1"),
        (["data.cache_dir=c", "lora=none"], "error: lora=none: loss.prior_weight=1.0 needs an adapter"),
        (["data.cache_dir=c", "loss=treshold"], "error: loss=treshold is not there; did you mean threshold?"),
        (["data.cache_dir=c", "losss=masked"], "losss"),
        ([], "error: data.cache_dir=... is missing"),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(tmp_path, arguments, message):
    result = run("mpp.train", "model=tiny_wan", "output_dir=out", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "Error executing job" not in result.stderr


def test_short_words_of_a_command_are_enough_and_nothing_else_is_made(tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=1)
    done = run("mpp.masks", "tool=invert", "input=masks", "output=out", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "out", "photos"]


def test_preparing_what_is_a_cache_already_is_an_error_with_the_way(tmp_path):
    refused = run("mpp.prepare", "data=musubi", "data.cache_dir=c", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "error: data=musubi is a cache, which training reads as it lies: python -m mpp.train"
    )
    assert not list(tmp_path.iterdir())


def test_help_shows_settings_that_stand_in_no_yaml(tmp_path):
    shown = run("mpp.prepare", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "data.clips.extract=head" in shown.stdout
    assert "data=folder" in shown.stdout
