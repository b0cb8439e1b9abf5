import random

import pytest

from mpp.wording import duration, few


def test_a_list_names_the_first_and_counts_the_others():
    draw = random.Random(0)
    for _ in range(300):
        names, most = [str(n) for n in range(draw.randint(0, 12))], draw.randint(0, 12)
        total = draw.choice([None, len(names) + draw.randint(0, 9) if len(names) >= most else None])
        found = few(names, most, total)
        there = len(names) if total is None else total
        assert found[: min(most, len(names))] == names[:most]
        assert found[min(most, len(names)) :] == ([f"and {there - most} more"] if there > most else [])


@pytest.mark.parametrize("seed", range(50))
def test_a_time_in_words_is_that_time_within_a_fortieth(seed):
    seconds = 10 ** random.Random(seed).uniform(0, 6.5)
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    words = duration(seconds).split()
    said = sum(float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert said == pytest.approx(seconds, rel=0.025, abs=0.05)
