"""Tiny tokenizers and encoders that several families' tests share."""

from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mpp.models.tiny import _LETTERS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip


def bytes_to_unicode() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(extra)) for b in range(256)]


def qwen_tokenizer(folder: Path) -> int:
    """A byte-level Qwen2 tokenizer with Qwen's special tokens and a ChatML template; returns its size."""
    vocabulary = {letter: number for number, letter in enumerate(bytes_to_unicode())}
    for token in QWEN_SPECIAL:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=list(QWEN_SPECIAL), pad_token="<|endoftext|>",
        eos_token="<|im_end|>", unk_token=None,
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def t5(folder: Path, *, name: str = "text_encoder", tokenizer: str = "tokenizer", dim: int = 32, length: int = 512):
    """A tiny T5 encoder of width `dim` and a letter tokenizer."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [("▁", -2.0)] + [(letter, -3.0) for letter in _LETTERS]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length).save_pretrained(folder / tokenizer)
    config = T5Config(vocab_size=len(vocabulary), d_model=dim, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).eval().save_pretrained(folder / name)


def clip_text(folder: Path, *, name: str = "text_encoder", tokenizer: str = "tokenizer", dim: int = 24):
    """A tiny CLIP text model whose pooled output has width `dim`, and a byte tokenizer."""
    letters = bytes_to_unicode()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {letter + "</w>": 256 + number for number, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / tokenizer)
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=dim, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=dim, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    CLIPTextModel(config).eval().save_pretrained(folder / name)


def seeded(function):
    """Run a builder with its own fixed random stream."""

    def build(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            function(folder)

    return build
