"""The clock of a run, by a clock that is set by hand."""

import random

import pytest

from mpp.training.pace import Pace


@pytest.mark.parametrize("seed", range(20))
def test_steps_take_what_lies_between_them_and_no_pause(seed):
    draw, now = random.Random(seed), [draw_start(seed)]
    pace = Pace(lambda: now[0])
    step = first = draw.randint(0, 50)
    pace.begin(step)
    began, stepping, steps = now[0], 0.0, 0
    for _ in range(draw.randint(1, 40)):
        what = draw.random()
        if what < 0.6:
            seconds = draw.uniform(0.01, 5)
            now[0] += seconds
            stepping, steps, step = stepping + seconds, steps + 1, step + 1
        elif what < 0.8:
            with pace.pause():
                now[0] += draw.uniform(0, 100)
                with pace.pause():
                    now[0] += draw.uniform(0, 100)
        elif steps:
            assert pace.steps(step) == steps
            lap = pace.lap(step, 3 * steps)
            assert lap["perf/seconds_per_step"] == pytest.approx(stepping / steps)
            assert lap["perf/samples_per_second"] == pytest.approx(3 * steps / stepping)
            stepping, steps = 0.0, 0
    assert pace.seconds == pytest.approx(now[0] - began)
    if step > first:
        assert pace.left(step, step + 7) == pytest.approx(7 * (now[0] - began) / (step - first))
    assert pace.left(first, 10**6) is None
    assert pace.left(step, None) is None


def draw_start(seed):
    return random.Random(seed + 1000).uniform(0, 1e6)
