"""The committed results say what the documents say they do."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.phantom_limb import gate, proof, study

ROOT = Path(__file__).parents[2]
RESULTS = study.HERE / "results"


def runs(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["runs"]


def test_the_base_and_its_control_passed_the_gate():
    figures = json.loads((RESULTS / "gate.json").read_text())
    assert figures["passed"] is True
    assert set(figures["real_scenes"].values()) == {1.0}
    assert figures["base"]["malformed"] < 0.02
    assert figures["base"]["bad_background"] < 0.05
    success = [row["success"] for row in figures["control"]]
    assert sum(success) / len(success) > 0.8
    assert figures["limits"] == gate.LIMITS


@pytest.mark.slow
def test_the_shipped_base_generates_what_the_gate_saw(tmp_path):
    figures = gate.base_figures(study.BASE, 64, tmp_path / "gate.png")
    assert figures["malformed"] < 0.02
    assert figures["bad_background"] < 0.05


@pytest.mark.parametrize("name", proof.STUDIES)
def test_every_variant_was_run_with_every_subject_and_seed_of_the_protocol(name):
    rules = study.protocol()
    found = {(row["variant"], row["subject"], row["seed"]) for row in runs(name) if row["variant"] != "base"}
    assert found == {(v, s, n) for v in rules[name].variants for s in rules.subjects for n in rules.seeds}


@pytest.mark.parametrize("name", proof.STUDIES)
def test_tables_are_of_the_runs_and_stand_in_the_document(name):
    text = (RESULTS / f"{name}.md").read_text()
    assert text == proof.table(runs(name)) + "\n" + proof.against(runs(name), study.protocol()[name].reference)
    document = (ROOT / "docs" / "phantom_limb.md").read_text()
    for part in text.strip().split("\n\n"):
        assert part in document


def test_the_claim_holds_in_the_committed_runs():
    rows = runs("main")

    def ratio(key):
        return proof.mean(rows, "masked", key) / proof.mean(rows, "threshold_w1", key)

    assert ratio("phantom") >= 5
    assert ratio("background") >= 3
    assert proof.mean(rows, "threshold_w1", "success") > 0.8
    assert proof.mean(rows, "threshold_w1", "success") > proof.mean(rows, "masked", "success") - 0.05
    assert proof.mean(rows, "threshold_w1", "held_out_error_low") < 1.05 * proof.mean(
        rows, "masked", "held_out_error_low"
    )


def test_runs_of_one_variant_are_the_same_in_two_studies_of_the_same_sets():
    rules, main = study.protocol(), runs("main")
    for variant in ("masked", "threshold_w1"):
        assert rules.paste.variants[variant] == rules.main.variants[variant]
        for key in ("success", "phantom", "background", "other_malformed"):
            assert proof.mean(runs("paste"), variant, key) == pytest.approx(proof.mean(main, variant, key), abs=1e-5)


README = {  # in its table's order: how a row begins, study and variant
    "its mask alone": ("main", "masked"),
    "its mask and a floor of 0.05": ("main", "masked_floor"),
    "the prior, weight 1": ("main", "threshold_w1"),
    "the prior, and a quarter of other images": ("paste", "pictures_25"),
    "no prior: the subject cut out, pasted": ("paste", "paste"),
    "all three": ("paste", "paste_prior_pictures_25"),
}
README_COLUMNS = {  # how a heading begins, and the measure
    "whole subject": "success",
    "phantom pixels": "phantom",
    "distance": "background",
    "other prompts": "other_malformed",
}


def test_the_readmes_figures_are_the_tables():
    lines = (ROOT / "README.md").read_text().split("| LoRA trained with")[1].split("\n\n")[0].splitlines()
    headings, _, *rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in lines]
    assert all(cell.startswith(begin) for cell, begin in zip(headings, README_COLUMNS, strict=True))
    for (name, *cells), (begin, (where, variant)) in zip(rows, README.items(), strict=True):
        assert name.startswith(begin)
        for cell, key in zip(cells, README_COLUMNS.values(), strict=True):
            figure, *percent = cell.split()
            expected = proof.mean(runs(where), variant, key) * (100 if percent == ["%"] else 1)
            assert f"{expected:.{len(figure.partition('.')[2])}f}" == figure, (name, key)


def test_images_that_the_readme_shows_are_there():
    shown = re.findall(r"!\[.*\]\((.*)\)", (ROOT / "README.md").read_text())
    assert shown
    assert all((ROOT / path).is_file() for path in shown)
