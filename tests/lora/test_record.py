"""What of a run's record goes into files: no path, no prompt, but how it was made."""

import json
import random
from pathlib import Path

import pytest
import torch

from mpp.cli import PATHS
from mpp.config import plain_values
from mpp.lora.files import read_own
from mpp.lora.metadata import Metadata, save_file
from mpp.lora.record import base_name, public_record
from tests.helpers import config

OLD = Path(__file__).parents[1] / "fixtures" / "v0"
WORDS = ("zarquon", "vexillo", "quibbit", "mordrake", "ulnaria")


@pytest.fixture(scope="module")
def recorded():
    """A run's resolved configuration with everything on."""
    words = ["model=tiny_wan", "model.pretrained=some/model", "data.cache_dir=x", "schedule=cosine", "output_dir=o",
             "sampling.prompts=[a, b]", "data.preservation.replace={a: b}", "logger=csv"]  # fmt: skip
    return plain_values(config("train", words))


def drawn_path(draw):
    names = [draw.choice(WORDS) + draw.choice(["", " x", ".safetensors", "-2", "é"]) for _ in range(draw.randint(2, 4))]
    start = draw.choice(["/", "/home/", "~/", "~", "./", "../", "", "C:\\", "C:/", "\\\\host\\", "s3://", "file:///"])
    return start + draw.choice(["\\"] if "\\" in start else ["/"]).join(names)


def drawn_prompt(draw):
    marks = [" ", ", ", "! ", ": ", " (", "\n"]
    return draw.choice(WORDS) + "".join(draw.choice(marks) + draw.choice(WORDS) for _ in range(draw.randint(1, 5)))


def leaves(node, path=()):
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, name))
        elif name != "_target_":
            yield (*path, name)


def put(node, path, value):
    """A copy with one value in place of another."""
    if not path:
        return value
    copy = node.copy()
    copy[path[0]] = put(node[path[0]], path[1:], value)
    return copy


def spoken(record):
    """All strings in a record, keys included."""
    if isinstance(record, dict):
        return [text for key, value in record.items() for text in (key, *spoken(value))]
    return [text for value in record for text in spoken(value)] if isinstance(record, list) else [str(record)]


@pytest.mark.parametrize("seed", range(60))
def test_paths_and_prompts_in_any_setting_are_not_in_the_bytes_of_the_file(recorded, tmp_path, seed):
    draw, secrets = random.Random(seed), []
    changed = recorded
    targets = {("lora", "targets"), *(at for at in leaves(recorded) if "lora_targets" in at)}
    for at in draw.sample([at for at in leaves(recorded) if at not in targets], 8):
        secrets.append(draw.choice([drawn_path, drawn_prompt])(draw))
        changed = put(changed, at, draw.choice([secrets[-1], [secrets[-1]], {"a": secrets[-1]}, {secrets[-1]: 1}]))
    record = {"mpp": "1.0", "family": "f", "adapter": {"kind": "lora"}, "seed": 3, "steps": 9, "config": changed}
    saved = tmp_path / "lora.safetensors"
    for full in (False, True):
        text = json.dumps(Metadata(full_record=full).record(record), ensure_ascii=False)
        save_file({"a": torch.zeros(1)}, saved, {"mpp": text})
        inside = json.loads(json.loads(text_of(saved)))
        held = "\n".join(spoken(inside))
        found = [secret for secret in secrets if secret in held]
        assert found == (secrets if full else [])
        assert full or not any(host in held for host in ("/home", "C:", "~", "://"))


def text_of(saved):
    """The `mpp` of a file, by its bytes alone, as JSON of a string."""
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.dumps(header["__metadata__"]["mpp"])


@pytest.mark.parametrize("key", sorted(PATHS))
def test_every_setting_that_the_command_line_knows_as_a_path_is_one_here(key):
    last = key.rpartition(".")[2]
    got = public_record({"config": {"data": {last: "zarquon"}, last: "zarquon"}})["config"]
    wanted = "zarquon" if last.startswith("pretrained") else None  # a folder's name alone
    assert got == {"data": {last: wanted}, last: wanted}


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("/data/zarquon/wan.safetensors", "wan.safetensors"),
        ("../models/wan", "wan"),
        ("~/wan", "wan"),
        ("D:\\models\\wan", "wan"),
        ("/home/zarquon", None),
        ("/Users/zarquon/", None),
        ("~", None),
        ("~zarquon", None),
        ("C:\\Users\\zarquon", None),
        ("/data/photos of zarquon", None),
        ("", None),
    ],
)
def test_a_base_model_is_known_by_its_hub_id_or_by_its_name_alone(source, known):
    assert base_name(source) == known


def test_a_local_folder_that_looks_like_a_hub_id_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zarquon" / "wan").mkdir(parents=True)
    assert base_name("zarquon/wan") == "wan"


def test_how_it_was_made_stays(recorded):
    """Every number and choice of model, adapter, loss, data, optimizer, schedule and trainer."""
    kept = public_record({"config": recorded})["config"]
    for group in ("model", "lora", "loss", "teacher", "optimizer", "schedule", "trainer", "seed", "compile"):
        assert kept[group] == recorded[group], group
    differ = {at for at in leaves(recorded["data"]) if kept["data"].get(at[0]) != recorded["data"][at[0]]}
    assert {at[0] for at in differ} <= {"cache_dir", "preservation"}
    assert kept["data"]["preservation"]["rate"] == recorded["data"]["preservation"]["rate"]
    assert kept["sampling"]["width"] == recorded["sampling"]["width"]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_public_stays_as_it_is(recorded, seed):
    draw = random.Random(seed)
    changed = recorded
    for at in draw.sample(list(leaves(recorded)), 5):
        changed = put(changed, at, draw.choice([drawn_path(draw), drawn_prompt(draw), 7, None, "word"]))
    once = public_record({"config": changed})
    assert public_record(json.loads(json.dumps(once))) == once


def test_the_record_of_an_old_file_is_cut_as_well():
    record = read_own(OLD / "loras" / "lora" / "lora.safetensors").record
    assert "/tmp/fixtures" in json.dumps(record)
    cut = public_record(record)
    assert "/tmp" not in json.dumps(cut)
    assert {name: cut[name] for name in record if name != "config"} == {
        n: v for n, v in record.items() if n != "config"
    }
    assert cut["config"]["model"]["pretrained"] == "base"
    assert cut["config"]["loss"] == record["config"]["loss"]
