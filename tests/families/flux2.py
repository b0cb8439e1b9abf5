"""FLUX.2: dev and klein, with and without reference images."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from transformers import (
    LlamaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mpp.models.tiny import _LETTERS
from tests.families.base import Variant
from tests.families.parts import qwen_tokenizer, seeded

DEV = ("model=flux2", "model.text_length=224")  # the pipeline's system message alone is 160 of the tiny tokens
KLEIN = ("model=flux2_klein_4b", "model.text_length=112")
WIDTH = 16
# Mistral's own says more, but says it in this form
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% set text = m['content'][0]['text'] %}{% if m['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def mistral(folder: Path) -> None:
    """A tiny Mistral 3 with just enough layers, and a letter tokenizer of the class that dev's folder has."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    vocabulary = {token: number for number, token in enumerate([*special, "▁", "\n", *_LETTERS])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", extra_special_tokens=special[4:])
    tokenizer.chat_template = MISTRAL
    tokenizer.save_pretrained(folder / "tokenizer")
    small = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = {
        **small, "model_type": "mistral", "num_hidden_layers": 31, "num_key_value_heads": 1, "initializer_range": 0.2,
        "vocab_size": len(vocabulary), "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {**small, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    Mistral3ForConditionalGeneration(config).eval().save_pretrained(folder / "text_encoder")


def qwen3(folder: Path) -> None:
    """A tiny Qwen 3 with just enough layers."""
    size = qwen_tokenizer(folder / "tokenizer")
    config = Qwen3Config(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).eval().save_pretrained(folder / "text_encoder")


def vae(folder: Path) -> None:
    """A tiny VAE whose batch norm has the statistics of smooth images."""
    model = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1).eval()
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, (64, 64), mode="bicubic")
    with torch.no_grad():
        latents = Flux2Pipeline._patchify_latents(model.encode(images).latent_dist.mode())
    model.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    model.bn.running_var.copy_(latents.var((0, 2, 3)))
    model.save_pretrained(folder / "vae")


def transformer(**changes) -> Flux2Transformer2DModel:
    """A tiny transformer."""
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)}
    return Flux2Transformer2DModel(
        **{
            **sizes,
            "num_layers": 1,
            "num_single_layers": 2,
            "joint_attention_dim": 3 * WIDTH,
            "timestep_guidance_channels": 64,
            **changes,
        }
    ).eval()


def common(folder: Path, *, guidance_embeds: bool) -> None:
    """Transformer, VAE and the published scheduler's settings."""
    transformer(guidance_embeds=guidance_embeds).save_pretrained(folder / "transformer")
    vae(folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")


@seeded
def dev(folder: Path) -> None:
    """FLUX.2 dev."""
    common(folder, guidance_embeds=True)
    mistral(folder)


@seeded
def klein(folder: Path) -> None:
    """FLUX.2 klein."""
    common(folder, guidance_embeds=False)
    qwen3(folder)


def unpack(tokens, shape):
    """Packed tokens to latents `(b, c, 1, h, w)`, by the pipeline's positions."""
    channels, _, height, width = shape
    ids = Flux2Pipeline._prepare_latent_ids(torch.zeros(len(tokens), channels, height, width))
    return Flux2Pipeline._unpack_latents_with_ids(tokens, ids)[:, :, None]


ORIGINAL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
QKV = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = {
    "linear1.weight": "attn.to_qkv_mlp_proj.weight",
    "linear2.weight": "attn.to_out.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def original(model: Flux2Transformer2DModel) -> dict[str, torch.Tensor]:
    """The state under the names of Black Forest Labs' `flux2/model.py`."""
    state = model.state_dict()
    named = {
        f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in ORIGINAL.items() if f"{ours}.weight" in state
    }
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    named["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for number in range(model.config.num_layers):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        named |= {f"{theirs}.{new}": state[f"{ours}.{old}"] for new, old in DOUBLE.items()}
        for attention, parts in QKV.items():
            stacked = torch.cat([state[f"{ours}.attn.{part}.weight"] for part in parts])
            named[f"{theirs}.{attention}.qkv.weight"] = stacked
    for number in range(model.config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        named |= {f"{theirs}.{new}": state[f"{ours}.{old}"] for new, old in SINGLE.items()}
    return named


def single_file(*, guidance_embeds: bool):
    """A transformer of FLUX.2's head size, and its original state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformer(
            guidance_embeds=guidance_embeds, attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(32,) * 4
        )
        for name, parameter in model.named_parameters():  # norms are all ones: any two could trade places unseen
            if "norm" in name:
                torch.nn.init.normal_(parameter)
    return model, original(model)


def dev_file():
    """With guidance."""
    return single_file(guidance_embeds=True)


def klein_file():
    """Without."""
    return single_file(guidance_embeds=False)


VARIANTS = [
    Variant(name, overrides, build, controls=controls, unpack=unpack, fixed_text=True, single_file=file)
    for name, overrides, build, controls, file in (
        ("FLUX.2 dev", DEV, dev, 0, dev_file),
        ("FLUX.2 dev, 2 references", DEV, dev, 2, dev_file),
        ("FLUX.2 klein", KLEIN, klein, 0, klein_file),
        ("FLUX.2 klein, 1 reference", KLEIN, klein, 1, klein_file),
    )
]
