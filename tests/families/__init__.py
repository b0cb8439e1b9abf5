"""Every family and variant, as tiny random models of the real classes, for the contract tests."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from tests.families.base import Variant

# What `make test` runs, each for what it stands for; the other variants are for `make test-all`.
REPRESENTATIVES = {
    "FLUX.1 dev": "images; embedded guidance, text of one length, fused layers in the original file",
    "Z-Image": "images; text without padding, no batch dimension",
    "Qwen-Image-Edit 2509": "control images, which the text encoder sees too",
    "Qwen-Image-Layered": "layers on the frame axis",
    "WAN 2.1 T2V": "clips",
    "WAN 2.2 A14B I2V both": "two experts; the first frame as channels",
    "HunyuanVideo I2V token replace": "a first frame that is given, not learned",
    "LTX-2": "clips as tokens, with positions in seconds",
}
MODULES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "base", "parts"))


def variants() -> list[Variant]:
    """All variants of all families; each module of this package lists its own."""
    return [variant for name in MODULES for variant in import_module(f"tests.families.{name}").VARIANTS]


def wan_first(**settings: object) -> list:
    """`parameters`, all of them slow but the plain WAN."""
    return [
        p if p.marks or p.values[0].name == "WAN 2.1 T2V" else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        for p in parameters(**settings)
    ]


def parameters(*more: object, of: Callable[[Variant], bool] = lambda _: True) -> list:
    """Variants as pytest parameters, each followed by `more`; slow where another one represents them."""
    return [
        pytest.param(
            variant,
            *more,
            id="-".join([variant.name.replace(" ", "_"), *map(str, more)]),
            marks=() if variant.name in REPRESENTATIVES else pytest.mark.slow,
        )
        for variant in variants()
        if of(variant)
    ]
