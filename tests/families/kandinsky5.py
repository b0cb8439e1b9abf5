"""Kandinsky 5: text to video."""

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.families.base import Variant
from tests.families.parts import QWEN_SPECIAL, clip_text, seeded

TRANSFORMER = {
    "in_visual_dim": 16, "in_text_dim": 32, "in_text_dim2": 24, "time_dim": 32, "out_visual_dim": 16,
    "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 64, "num_text_blocks": 2, "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6), "visual_cond": True,
}  # fmt: skip
VAE = {
    "latent_channels": 16, "block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}  # fmt: skip
# With Qwen2's own rule of splitting and so many tokens, the pipeline's template has the 128 that the pipeline drops
VOCABULARY = 469
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in the manner of Qwen2's that knows the words of the pipeline's template."""
    template = Kandinsky5T2VPipeline(*[None] * 7).prompt_template
    tokenizer = Tokenizer(BPE())
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(WORDS), "isolated"), bytes_])
    tokenizer.decoder = Bytes()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(QWEN_SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(re.split("|".join(map(re.escape, (*QWEN_SPECIAL, "{}"))), template), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=list(QWEN_SPECIAL),
    )  # fmt: skip
    whole.save_pretrained(folder)
    return whole


def transformer(**settings) -> Kandinsky5Transformer3DModel:
    """A random transformer; its modulations, which start as zeros, made to matter.

    Its rotary code rounds queries and keys to bf16 in every dtype, so that rounding errors of other batch sizes now
    and then become steps of bf16. Weak queries keep what comes of them below the contract's tolerance.
    """
    model = Kandinsky5Transformer3DModel(**{**TRANSFORMER, **settings}).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "query_norm" in name:
            torch.nn.init.constant_(parameter, 0.1)
    return model


def vae(**settings) -> AutoencoderKLHunyuanVideo:
    """A random VAE whose scaled latents of smooth images have about unit variance."""
    model = AutoencoderKLHunyuanVideo(**{**VAE, **settings}).eval()
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6) * 2 - 1, (48, 48), mode="bicubic")
    with torch.no_grad():
        latents = torch.cat([model.encode(p[None, :, None]).latent_dist.mode() for p in images])
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    return model


@seeded
def text_to_video(folder: Path) -> None:
    """The whole pipeline."""
    transformer().save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    ids = dict(zip(QWEN_SPECIAL, tokenizer.convert_tokens_to_ids(list(QWEN_SPECIAL)), strict=True))
    end = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "pad_token_id": ids["<|endoftext|>"], **end},
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    for tensor in encoder.parameters():
        if tensor.ndim == 2:
            torch.nn.init.normal_(tensor, std=0.2)  # else every token's state is nearly its own embedding
    encoder.eval().save_pretrained(folder / "text_encoder")
    clip_text(folder, name="text_encoder_2", tokenizer="tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")


def unpack(tensor, shape):
    """Channels are last in the pipeline."""
    del shape
    return tensor.permute(0, 4, 1, 2, 3)


VARIANTS = [Variant("Kandinsky 5 T2V Lite", ("model=kandinsky5",), text_to_video, frames=5, unpack=unpack)]
