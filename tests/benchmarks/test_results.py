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


def test_the_readmes_figures_are_the_tables():
    readme = (ROOT / "README.md").read_text()
    found = re.findall(r"^\| (?:its mask|the prior).*$", readme, re.M)
    keys = {"success": 100, "phantom": 100, "background": 1, "held_out_drift": 1}
    for line, variant in zip(found, ("masked", "masked_floor", "threshold_w1"), strict=True):
        cells = [float(re.match(r"[\d.]+", cell.strip())[0]) for cell in line.strip("|").split("|")[1:]]
        expected = [proof.mean(runs("main"), variant, key) * scale for key, scale in keys.items()]
        assert cells == pytest.approx(expected, rel=0.02, abs=5e-5)
