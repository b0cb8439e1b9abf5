"""The support matrix in the docs is that of the variants there are."""

from tests.families import REPRESENTATIVES, variants
from tests.families.base import Variant
from tests.matrix import COLUMNS, DOCUMENT, HEAD, cell, table


def rows(text):
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_matrix_has_each_variant_and_column_and_nothing_fails_or_was_left_out():
    text = DOCUMENT.read_text()
    assert text.startswith(HEAD)
    head, _, *found = rows(text)
    assert head == ["variant", *COLUMNS]
    assert [row[0] for row in found] == [variant.name for variant in variants()]
    assert {value for row in found for value in row[1:]} <= {"yes", "no", "clips", "neutral", "fixed"}


def test_representatives_are_variants_that_there_are():
    assert REPRESENTATIVES.keys() <= {variant.name for variant in variants()}


def test_kinds_of_yes_follow_the_variants():
    found = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows(DOCUMENT.read_text())[2:]}
    for variant in variants():
        assert found[variant.name]["text"] == ("fixed" if variant.fixed_text else "neutral")
        assert found[variant.name]["original single file"] == ("yes" if variant.single_file else "no")


def test_a_failure_a_skip_and_a_test_that_did_not_run_are_told_apart():
    variant = Variant("V", (), lambda folder: None)
    title = "teacher exact"
    tests = ["test_teacher_is_the_base_x", "test_teacher_of_a_part_y"]
    assert cell(title, variant, {tests[0]: ["passed"], tests[1]: ["passed"]}) == "yes"
    assert cell(title, variant, {tests[0]: ["passed"], tests[1]: ["failed"]}) == "**fails**"
    assert cell(title, variant, {tests[0]: ["skipped"]}) == "not run"
    assert cell(title, variant, {}) == "not run"
    assert "| V | not run" in table([variant], {})
