"""Short trainings log the values that are committed.

A change of numbers renews them (`python -m benchmarks.trace --record FOLDER` writes FOLDER/traces.json) and says so in
the changelog.
"""

import json
import math
from pathlib import Path

import pytest

from benchmarks import trace

COMMITTED = json.loads(Path(__file__).with_name("trace.json").read_text())


def numbers(values):
    return [math.nan if value is None else value for value in values]


@pytest.mark.filterwarnings("ignore:'mpp:RuntimeWarning")  # runpy: the commands were imported before
@pytest.mark.parametrize("steps", [10, pytest.param(trace.STEPS, marks=pytest.mark.slow)])  # 10: into a second epoch
def test_short_runs_have_the_committed_values_at_every_step(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(trace, "STEPS", steps)
    found = trace.record(tmp_path)
    assert found.keys() == COMMITTED.keys()
    for run, traces in COMMITTED.items():
        assert found[run].keys() == traces.keys()
        for name, values in traces.items():
            # Other processors round otherwise: measured without vector instructions, at most a third of this.
            committed = pytest.approx(numbers(values[:steps]), rel=1e-5, abs=1e-8, nan_ok=True)
            assert numbers(found[run][name]) == committed, f"{run}: {name}"
