"""Every family and variant, as tiny random models of the real classes, for the contract tests."""

from importlib import import_module
from pathlib import Path

from tests.families.base import Variant

MODULES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "base", "parts"))


def variants() -> list[Variant]:
    """All variants of all families; each module of this package lists its own."""
    return [variant for name in MODULES for variant in import_module(f"tests.families.{name}").VARIANTS]
