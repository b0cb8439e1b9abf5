import random

from mpp.wording import few


def test_a_list_names_the_first_and_counts_the_others():
    draw = random.Random(0)
    for _ in range(300):
        names, most = [str(n) for n in range(draw.randint(0, 12))], draw.randint(0, 12)
        total = draw.choice([None, len(names) + draw.randint(0, 9) if len(names) >= most else None])
        found = few(names, most, total)
        there = len(names) if total is None else total
        assert found[: min(most, len(names))] == names[:most]
        assert found[min(most, len(names)) :] == ([f"and {there - most} more"] if there > most else [])
