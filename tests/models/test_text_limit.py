"""Which words of a caption a text encoder does not read, for every family; the witness is what it makes of others."""

import random
import string

import pytest
import torch

from mpp.models.contract import Prompt
from tests.families import variants
from tests.families.base import architecture, controls, image

QUICK = ("FLUX.1 dev", "Z-Image", "WAN 2.1 T2V")  # a text of its own tokenizer, behind a template, and bare


def words(draw, tokenizer, tokens):
    """Words of about so many tokens."""
    found = "a"
    while len(tokenizer(found)["input_ids"]) < tokens:
        found += draw.choice([" ", " ", ", "]) + "".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9)))
    return found


def changed(draw, text):
    """Text of the same words' lengths with other letters."""
    return "".join(draw.choice(string.ascii_lowercase.replace(c, "")) if c.isalpha() else c for c in text)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=variant.name, marks=() if variant.name in QUICK else pytest.mark.slow)
        for variant in variants()
    ],
)
def test_what_is_not_read_makes_no_difference_and_what_is_read_does(variant, built):
    arch = architecture(variant, built(variant))
    encoders, draw = arch.load_encoders("cpu"), random.Random(variant.name)
    seen = (image(64, 64, 0),) if arch.images.first_frame else controls(variant, 0)

    def text_of(caption):
        (record,) = encoders.encode_text([Prompt(caption, seen if arch.images.in_text else ())])
        return record.text

    limit = encoders.text_limit()
    if limit is None:
        assert encoders.unread(["word " * 3000]) == [""]
        return
    room = max(1, limit.tokens - len(limit.tokenizer(limit.before)["input_ids"]))
    lengths = [room // 2, room, *(draw.randint(max(1, room - 9), max(30, room + 40)) for _ in range(2))]
    captions = ["", *(words(draw, limit.tokenizer, length) for length in lengths)]
    found = encoders.unread(captions)
    assert found[0] == ""
    assert any(found)
    dropped = 12 if variant.name.startswith("HunyuanVideo I2V") else 0  # letters, by the pipeline, see `text_limit`
    for caption, unread in zip(captions[1:], found[1:], strict=True):
        assert caption.endswith(unread)
        read = caption.removesuffix(unread)
        if unread:
            begun, _, rest = unread.partition(" ")  # of the first word there may be a part
            other = f"{read}{begun} {changed(draw, rest)}".strip()
            assert torch.equal(text_of(other), text_of(caption)), (read, unread)
        surely = read[: len(read) - dropped]
        if surely.strip(" ,"):
            last = max(i for i, letter in enumerate(surely) if letter.isalpha())
            other = caption[:last] + changed(draw, caption[last]) + caption[last + 1 :]
            assert not torch.equal(text_of(other), text_of(caption)), (read, unread)
