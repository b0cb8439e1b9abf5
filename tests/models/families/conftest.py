"""What is particular to a family is for who works on it; `make test` has that of WAN, and all in the contract."""

from pathlib import Path

import pytest

ALWAYS = ("test_wan", "test_toy")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in ALWAYS:
            item.add_marker(pytest.mark.slow)
