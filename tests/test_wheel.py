"""What is built for others: the wheel works by itself, and says nothing that only holds beside the repository."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import markdown
import pytest

from hatch_build import long_description
from tests.helpers import draw_photos

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")


def addresses(text):
    """What images show and links lead to, once a text is HTML."""
    html = markdown.markdown(text, extensions=["tables", "fenced_code"])
    return re.findall(r'<img[^>]*src="([^"]*)"', html), re.findall(r'<a[^>]*href="([^"]*)"', html)


def test_the_long_description_has_no_image_or_link_that_needs_the_repository():
    images, links = addresses(README)
    assert images
    assert links
    text = long_description(README)
    shown, led = addresses(text)
    assert not [address for address in shown + led if not address.startswith("https://")]
    for address in images + links:
        assert address in text  # by name, as the source archive has it
    assert {line for line in README.splitlines() if "](" not in line} <= set(text.splitlines())


def test_addresses_elsewhere_and_brackets_of_commands_stay_as_they_are():
    text = "# t\n[a](https://a.b/c), [x](#y), `[a:0.8, b]` (c), [b](d/e.md#f) and [g.md](g.md); ![h](i.png)\n"
    assert long_description(text).splitlines()[-1] == (
        "[a](https://a.b/c), [x](#y), `[a:0.8, b]` (c), b (d/e.md#f) and g.md; *Image: i.png (h)*"
    )


# ---------------------------------------------------------------- built


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's files, in a folder of their own."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root / "dist")]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (root / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    return root / "site"


@pytest.fixture
def typed(site, tmp_path):
    """Types words after `python` in an empty folder."""

    def call(*words):
        environment = {"PATH": os.defpath, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(site)
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return call


@pytest.mark.slow
def test_the_wheel_is_the_package_with_its_configs_and_nothing_of_the_toy(site, typed):
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"mpp"}
    packaged = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    ours = {f"mpp/configs/{path.relative_to(REPOSITORY / 'configs')}" for path in REPOSITORY.glob("configs/**/*.yaml")}
    assert ours - packaged == {"mpp/configs/model/toy.yaml", "mpp/configs/experiment/phantom_limb.yaml"}
    sources = {path.relative_to(REPOSITORY / "src").as_posix() for path in REPOSITORY.glob("src/mpp/**/*.py")}
    assert sources <= packaged
    assert {"mpp/masking/u2netp.safetensors", "mpp/masking/u2netp.NOTICE"} <= packaged
    where = typed("-c", "import mpp.config; print(mpp.config.CONFIG_DIR)")
    assert where.stdout.strip() == str(site / "mpp" / "configs"), where.stderr


@pytest.mark.slow
def test_its_long_description_is_what_an_index_can_show(site):
    (file,) = site.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(file.read_text("utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == long_description(README).strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "train", "sample", "export", "report", "plan", "masks", "init", "run"])
def test_every_command_explains_itself_without_the_toy(command, typed):
    shown = typed("-m", f"mpp.{command}", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"python -m mpp.{command}" in shown.stdout
    assert not re.search(r"\btoy\b|phantom_limb|experiment=", shown.stdout)


@pytest.mark.slow
def test_images_become_masks_and_a_job_file_in_a_folder_with_nothing_else(typed, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "drawn", count=2)
    masked = typed("-m", "mpp.masks", "tool=salient", "input=photos", "output=masks", "device=cpu")
    assert masked.returncode == 0, masked.stderr
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.png")) == ["p0.png", "p1.png"]
    written = typed("-m", "mpp.init", "model=tiny_wan", "images=photos", "masks=masks", "output=outputs/a")
    assert written.returncode == 0, written.stderr
    shown = typed("-m", "mpp.run", "a.yaml", "--show")
    assert shown.stdout.count("python -m mpp.") == 3
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["model=toy", "experiment=phantom_limb", "+experiment=phantom_limb"])
def test_what_lies_in_the_repository_alone_is_one_message(word, typed, tmp_path):
    refused = typed("-m", "mpp.train", word, "data.cache_dir=c")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {word.lstrip('+')} is not there; ")
    assert refused.stderr.count("\n") == 1
    assert not re.search(r"did you mean|toy,", refused.stderr)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
