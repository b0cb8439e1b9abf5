"""Shape checks on, one thread, a tiny pipeline and a tiny cache."""

import gc
import importlib
import logging
import os
import sys
from functools import partial
from importlib.abc import MetaPathFinder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

CHECKED = ["mpp.core", "mpp.models", "mpp.lora", "mpp.sampling.generation", "mpp.training.step", "mpp.training.teacher"]
install_import_hook(CHECKED, "tests.typecheck.checked")


class _PackagesFirst(MetaPathFinder):
    """Imports packages before a checked module does: what comes in under the hook is compiled anew, all of it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in CHECKED:
            for package in ("torch",) if fullname == "mpp.core" else ("lightning.pytorch", "diffusers", "peft"):
                importlib.import_module(package)


sys.meta_path.insert(0, _PackagesFirst())
gc.disable()  # importing makes millions of small objects, which all stay

import pytest


def pytest_collection_finish():
    """One thread; and what the imports made stays, so that collecting garbage, as preparing does, need not walk it."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny random WAN pipeline as a diffusers folder."""
    from mpp.models.tiny import tiny_wan

    return tiny_wan(str(tmp_path_factory.mktemp("models") / "tiny_wan"))


@pytest.fixture(scope="session")
def deep(pipeline, tmp_path_factory):
    """It with two experts of four blocks, so that some of them can wait."""
    import shutil

    import torch
    from diffusers import WanTransformer3DModel

    from mpp.models.tiny import TRANSFORMER

    folder = tmp_path_factory.mktemp("deep") / "tiny_wan"
    shutil.copytree(pipeline, folder)
    for seed, part in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        WanTransformer3DModel(**TRANSFORMER | {"num_layers": 4}).save_pretrained(folder / part)
    return str(folder)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """From a variant to the folder of its tiny pipeline, which all processes of a test run share."""
    from tests.families.base import built as build

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    root.mkdir(exist_ok=True)
    return partial(build, root=root)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, pipeline):
    """A cache of eight drawn images in two buckets, six of them with masks."""
    from tests import helpers

    root = tmp_path_factory.mktemp("prepared")
    helpers.draw_photos(root / "photos", root / "masks")
    helpers.prepare(pipeline, root)
    return root / "cache"


@pytest.fixture
def architecture(pipeline):
    """The tiny WAN."""
    from tests import helpers

    return helpers.architecture(pipeline)


@pytest.fixture(autouse=True)
def _our_log_is_open():
    """The experiment in benchmarks closes it for its whole process."""
    logging.getLogger("mpp").setLevel(logging.NOTSET)


# ---------------------------------------------------------------- the support matrix

_outcomes: dict[str, dict[str, list[str]]] = {}


def pytest_addoption(parser):
    parser.addoption("--matrix", help="write the support matrix of all variants to this file")


@pytest.fixture(autouse=True)
def _says_its_variant(request, record_property):
    name = getattr(request.getfixturevalue("variant"), "name", None) if "variant" in request.fixturenames else None
    if name is not None:
        record_property("variant", name)


def pytest_runtest_logreport(report):
    name = dict(report.user_properties).get("variant")
    if name is not None and (report.when == "call" or not report.passed):
        test = report.nodeid.split("::")[-1].split("[")[0]
        _outcomes.setdefault(name, {}).setdefault(test, []).append(report.outcome)


def pytest_sessionfinish(session):
    target = session.config.getoption("--matrix")
    if target and not hasattr(session.config, "workerinput"):
        from tests.families import variants
        from tests.matrix import table

        with open(target, "w") as handle:
            handle.write(table(variants(), _outcomes))
