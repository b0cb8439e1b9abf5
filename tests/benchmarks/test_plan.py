"""What was counted before is what a real step takes."""

import json
from pathlib import Path

import pytest

from benchmarks.plan.__main__ import FOLDER, case_of
from benchmarks.plan.cases import CASES, compared, drawn, measured, predicted

PREDICTED = json.loads((FOLDER / "predicted.json").read_bytes())
MEASURED = json.loads((FOLDER / "measured.json").read_bytes())
FAST = 1  # of them is measured again by `make test`


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plan")


def test_the_results_are_of_the_cases_that_are_drawn():
    assert [case_of(row) for row in PREDICTED] == [case_of(row) for row in MEASURED] == list(drawn())
    assert len(PREDICTED) == CASES


@pytest.mark.parametrize("number", range(CASES))
def test_what_rests_was_exact_and_the_peak_within_a_tenth(number):
    exact, ratio = compared(PREDICTED[number], MEASURED[number])
    assert exact
    assert 0.9 < ratio < 1.1


_MORE = [pytest.mark.slow, pytest.mark.draws]


@pytest.mark.parametrize("number", [n if n < FAST else pytest.param(n, marks=_MORE) for n in range(CASES)])
def test_measured_again_it_is_the_same(number, root):
    case = case_of(PREDICTED[number])
    assert predicted(case, root) == PREDICTED[number]
    again = measured(case, root)["bytes"]
    step = again.pop("step"), MEASURED[number]["bytes"].pop("step")
    assert again == MEASURED[number]["bytes"]
    assert step[0] == pytest.approx(step[1], rel=0.01)
