"""What is loaded is said before, and how long it took after; preparing says how long its user waited."""

import json
import math
import random
import re
import struct
import time
from pathlib import Path

import pytest

from mpp.lora.stack import load_base
from mpp.models.contract import Prompt
from mpp.models.weights import count_of
from mpp.preparing.summary import Summary
from tests import helpers


def parameters_in(folder):
    """The numbers in a folder's safetensors, off their headers as the format's description has them."""
    count = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "mpp" and record.levelname == "INFO"]


def test_the_transformer_is_announced_with_its_size_before_it_is_loaded(caplog, architecture, pipeline):
    with caplog.at_level("INFO", "mpp"):
        load_base(architecture)
    size = parameters_in(Path(pipeline) / "transformer")
    first, last = said(caplog)
    assert first == f"loading transformer ({size / 1e3:.1f} k, float32) ..."
    assert re.fullmatch(r"loaded in \d+\.\d s", last)


def test_encoders_are_announced_once_each_and_their_time_is_counted(caplog, architecture):
    encoders = architecture.load_encoders("cpu")
    start = time.monotonic()
    with caplog.at_level("INFO", "mpp"):
        for _ in range(2):
            encoders.encode_text([Prompt("a photo")])
            encoders.vae()
    assert [line for line in said(caplog) if "loading" in line] == [
        "loading text encoder (float32) ...",
        "loading VAE (float32) ...",
    ]
    assert 0 < encoders.seconds_loading <= time.monotonic() - start


def test_nothing_is_said_to_be_loaded_that_could_not_be(caplog, architecture, tmp_path):
    architecture.vae = str(tmp_path)
    with caplog.at_level("INFO", "mpp"), pytest.raises(ValueError, match="model.vae"):
        architecture.load_encoders("cpu").vae()
    assert said(caplog) == ["loading VAE (float32) ..."]


def test_sizes_read_as_people_say_them():
    draw = random.Random(0)
    for unit, letter in ((1, ""), (1e3, " k"), (1e6, " M"), (1e9, " B")):
        whole = draw.randint(1, 999)
        assert float(count_of(int(whole * unit)).removesuffix(letter)) == whole
    assert count_of(14_288_491_584) == "14.3 B"


def test_the_time_of_preparing_counts_from_when_its_user_began_to_wait(tmp_path):
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", count=1)
    words = ["model=toy", "data.resolution=24", "device=cpu", f"data.image_dir={tmp_path / 'photos'}"]
    cfg = helpers.config("prepare", [*words, f"data.cache_dir={tmp_path / 'cache'}"])
    summary = helpers.mpp.prepare.run(cfg, began=time.monotonic() - 100)
    line = next(text for text in summary.lines() if text.startswith("time: "))
    waited = re.fullmatch(r"time: (\d+) s \(start (\d+\.\d), check .*\)", line)
    assert waited is not None, line
    assert 100 <= int(waited[1]) < 120
    assert 100 <= float(waited[2]) < 120


def test_loading_is_a_part_of_the_time_that_is_said():
    draw = random.Random(1)
    for _ in range(20):
        summary = Summary(seconds=draw.uniform(0.1, 9000), seconds_loading=draw.uniform(0.1, 90))
        line = next(text for text in summary.lines() if text.startswith("time: "))
        amounts = re.match(r"time: (?:(\d+) h )?(?:(\d+) min ?)?(?:([\d.]+) s)?, ([\d.]+) s of it loading models", line)
        hours, minutes, seconds, loading = (float(amount or 0) for amount in amounts.groups())
        assert hours * 3600 + minutes * 60 + seconds == pytest.approx(summary.seconds, rel=0.025, abs=0.051)
        assert abs(loading - summary.seconds_loading) <= 0.051
