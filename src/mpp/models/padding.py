"""Cached texts of different length as one batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def pad_text(texts: Sequence[Tensor], length: int) -> Float[Tensor, "b tokens dim"]:
    """Cached texts `(tokens, dim)` as one batch, zero-padded to `length` tokens.

    Raises:
        ValueError: A text is longer.
    """
    longest = max(text.shape[0] for text in texts)
    if longest > length:
        raise ValueError(
            f"a cached caption has {longest} tokens, model.text_length is {length}; "
            "run `python -m mpp.prepare` again with this setting"
        )
    return torch.stack([functional.pad(text, (0, 0, 0, length - text.shape[0])) for text in texts])


def pad_with_mask(
    texts: Sequence[Tensor],
) -> tuple[Float[Tensor, "b tokens dim"], Bool[Tensor, "b tokens"]]:
    """Cached texts `(tokens, dim)` as one batch, zero-padded to the longest, with True where a token is real."""
    lengths = torch.tensor([text.shape[0] for text in texts])
    longest = int(lengths.max())
    return pad_text(texts, longest), torch.arange(longest)[None] < lengths[:, None]
