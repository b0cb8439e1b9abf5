"""LTX-2: text to video without sound."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from mpp.models.tiny import _LETTERS
from tests.families.base import Variant
from tests.families.parts import seeded

TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
    "num_layers": 2, "caption_channels": 16, "rope_type": "split",
}  # fmt: skip
CONNECTORS = {
    "caption_channels": 16, "text_proj_in_factor": 3, "connector_rope_base_seq_len": 64, "rope_type": "split",
    **{f"{kind}_connector_num_attention_heads": 2 for kind in ("video", "audio")},
    **{f"{kind}_connector_attention_head_dim": 8 for kind in ("video", "audio")},
    **{f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")},
    **{f"{kind}_connector_num_learnable_registers": 16 for kind in ("video", "audio")},
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1), "decoder_causal": False,
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SCHEDULER = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
TINY = ("model.text_length=64",)


def gemma_tokenizer() -> GemmaTokenizer:
    """A letter tokenizer of Gemma's class."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS]
    return GemmaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])


@seeded
def text_to_video(folder: Path) -> None:
    """Video parts of the pipeline; the VAE has statistics of its own."""
    LTX2VideoTransformer3DModel(**TRANSFORMER).eval().save_pretrained(folder / "transformer")
    vae = AutoencoderKLLTX2Video(**VAE).eval()
    vae.latents_mean.normal_(std=0.1)
    vae.latents_std.uniform_(0.5, 1.5)
    vae.save_pretrained(folder / "vae")
    LTX2TextConnectors(**CONNECTORS).eval().save_pretrained(folder / "connectors")
    tokenizer = gemma_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer)}, vision_config=VISION, mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).eval().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")


def single_file() -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformer of the real head sizes, and its state under the names of the released files."""
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(**{
        **TRANSFORMER, "num_attention_heads": 1, "attention_head_dim": 128, "cross_attention_dim": 128,
        "audio_num_attention_heads": 1, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 64,
        "num_layers": 1,
    })  # fmt: skip
    table = {
        "proj_in.": "patchify_proj.",
        "audio_proj_in.": "audio_patchify_proj.",
        "time_embed.": "adaln_single.",
        "audio_time_embed.": "audio_adaln_single.",
        "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        start = next((ours for ours in table if name.startswith(ours)), "")
        new = table.get(start, "") + name.removeprefix(start)
        new = new.replace("norm_q", "q_norm").replace("norm_k", "k_norm")
        new = new.replace("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video")
        state[new.replace("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio")] = tensor
    state["video_embeddings_connector.learnable_registers"] = torch.ones(2, 2)
    for part in ("vae.encoder.x", "audio_vae.decoder.x", "vocoder.x", "text_embedding_projection.x"):
        state[part] = torch.ones(2)
    return model, state


VARIANTS = [
    Variant(
        "LTX-2",
        ("model=ltx2", *TINY),
        text_to_video,
        frames=9,
        unpack=lambda tokens, shape: LTX2Pipeline._unpack_latents(tokens, *shape[1:]),
        fixed_text=True,
        single_file=single_file,
    )
]
