"""Samples of a model whose blocks wait in the CPU's memory are those of one whose blocks stay."""

import shutil

import numpy as np
import pytest
from PIL import Image

import mpp.sample
from mpp.memory import streaming
from tests.families import base, variants
from tests.helpers import config
from tests.memory.deeper import deepen
from tests.memory.poison import Poison

VARIANT = next(variant for variant in variants() if variant.name == "WAN 2.2 A14B T2V both")


@pytest.fixture
def pair(built, tmp_path):
    """Two experts of three to five blocks."""
    folder = tmp_path / "pipeline"
    shutil.copytree(built(VARIANT), folder)
    deepen(base.architecture(VARIANT, folder), folder, 5)
    return folder


def sampled(pair, out, *overrides):
    settings = ["model=tiny_wan", "model.expert=both", "model.boundary=0.6", f"model.pretrained={pair}", "device=cpu"]
    settings += [f"output_dir={out}", "sampling.prompts=[a red box]", "sampling.width=64", "sampling.height=48"]
    files = mpp.sample.run(config("sample", [*settings, "sampling.steps=3", *overrides]))
    return {file.name: np.asarray(Image.open(file)) for file in files}


def test_both_experts_take_turns_and_their_blocks_come_when_they_run(pair, tmp_path, monkeypatch):
    whole = sampled(pair, tmp_path / "whole", "model.offload=false")
    assert any(image.std() > 1 for image in whole.values())
    made, original = [], streaming.Streaming.__init__
    monkeypatch.setattr(streaming, "link_to", Poison)
    monkeypatch.setattr(
        streaming.Streaming, "__init__", lambda self, *given: made.append(self) or original(self, *given)
    )
    for number, settings in enumerate(([], ["memory.resident=2"], ["model.offload=false", "memory.resident=2"])):
        found = sampled(pair, tmp_path / str(number), *settings)
        assert found.keys() == whole.keys()
        assert all(np.array_equal(image, whole[name]) for name, image in found.items())
    assert len(made) == 3
    assert all(sum(found.loads.values()) > 3 for found in made)


def test_more_blocks_than_there_are_and_words_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"memory.resident=9: .* has \d blocks that could wait"):
        sampled(pair, tmp_path, "memory.resident=9")
    with pytest.raises(ValueError, match="memory.resident must be all or a number of blocks, at least 2"):
        sampled(pair, tmp_path, "memory.resident=1")
