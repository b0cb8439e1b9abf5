"""Randomness as a function of (seed, epoch, sample key), not of a global generator.

What a sample sees therefore does not depend on batch size, order, resume or number of processes. Draws are made on
the CPU, whose streams are the same on every machine, and moved to the device afterwards.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, *position: int | str) -> torch.Generator:
    """A CPU generator of its own for each position, e.g. `generator(seed, "noise", epoch, key)`.

    The position is hashed as text with its parts' lengths, so that ("a", "bc") and ("ab", "c") differ.
    """
    text = "".join(f"{len(str(part))}:{part}" for part in (seed, *position))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


def noise(shape: tuple[int, ...], seed: int, epoch: int | str, key: str) -> Float[Tensor, "..."]:
    """Standard normal float32 of `shape` for one visit of one sample."""
    return torch.randn(shape, generator=generator(seed, "noise", epoch, key))


def uniform(seed: int, epoch: int | str, key: str, label: str = "sigma") -> Float[Tensor, ""]:
    """One float64 number in [0, 1) for one visit of one sample; `label` keeps what it decides apart."""
    return torch.rand((), dtype=torch.float64, generator=generator(seed, label, epoch, key))


def order(count: int, seed: int, epoch: int, label: str) -> list[int]:
    """A permutation of `range(count)` for one epoch; `label` keeps several permutations of an epoch apart."""
    return torch.randperm(count, generator=generator(seed, "order", epoch, label)).tolist()
