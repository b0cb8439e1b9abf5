"""What of a caption a text encoder reads, and which words lie beyond its length."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CAPTION = "{caption}"  # stands for it in a conversation


@dataclass(frozen=True)
class TextLimit:
    """Where a caption stands in the tokens that a text encoder reads; what is too long is cut at the end.

    Attributes:
        tokenizer: Of transformers.
        tokens: How many are read in all, those of the template and those that the tokenizer adds included.
        before: The template's text in front of the caption.
    """

    tokenizer: Any
    tokens: int
    before: str = ""

    def unread(self, caption: str) -> str:
        """The words that are not read, or only begun; "" where all are."""
        room = self.tokens - self.tokenizer.num_special_tokens_to_add()

        def count(end: int) -> int:
            return len(self.tokenizer(self.before + caption[:end], add_special_tokens=False)["input_ids"])

        if count(len(caption)) <= room:
            return ""
        end = bisect_right(range(len(caption)), room, key=count) - 1
        inside = end > 0 and not caption[end - 1].isspace() and not caption[end : end + 1].isspace()
        start = max(caption.rfind(mark, 0, end) for mark in " \n\t") + 1 if inside else end
        return caption[start:].strip()


def before_caption(template: str) -> str:
    """What a template with `{}` for the caption says in front of it."""
    return template.partition("{}")[0]


def before_message(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], **settings: Any) -> str:  # noqa: ANN401
    """What a tokenizer's chat template says in front of the caption, which is `CAPTION` in the conversation."""
    return tokenizer.apply_chat_template(list(conversation), tokenize=False, **settings).partition(CAPTION)[0]
