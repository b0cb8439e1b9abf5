"""Shape checks on, one thread, a tiny pipeline and a tiny cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

install_import_hook(
    ["mpp.core", "mpp.models.base", "mpp.models.toy", "mpp.models.wan", "mpp.teacher"], "tests.typecheck.checked"
)

import pytest
import torch

from tests import helpers

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny random WAN pipeline as a diffusers folder."""
    from mpp.models.tiny import tiny_wan

    return tiny_wan(str(tmp_path_factory.mktemp("models") / "tiny_wan"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, pipeline):
    """A cache of eight drawn pictures in two buckets, six of them with masks."""
    root = tmp_path_factory.mktemp("prepared")
    helpers.draw_photos(root / "photos", root / "masks")
    helpers.prepare(pipeline, root)
    return root / "cache"


@pytest.fixture
def architecture(pipeline):
    """The tiny WAN."""
    return helpers.architecture(pipeline)
