"""HunyuanVideo: text to video, and both forms of image to video."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.families.base import Variant
from tests.families.parts import clip_text, seeded

TRANSFORMER = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 24,
    "rope_axes_dim": (4, 6, 6), "guidance_embeds": True,
}  # fmt: skip
CONCAT = {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 48, "patch_size": 2,
}  # fmt: skip # 24 by 24 patches: the 576 tokens that the pipeline counts on
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>")
# Llama 3's own rule, so that the prompt templates have as many tokens as the pipelines crop
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in the manner of Llama 3's that knows the words of both prompt templates."""
    tokenizer = Tokenizer(BPE())
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(WORDS), "isolated"), bytes_])
    trainer = BpeTrainer(
        vocab_size=4000, special_tokens=list(SPECIAL), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    pipelines = (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    templates = [pipeline.DEFAULT_PROMPT_TEMPLATE["template"] for pipeline in pipelines]
    between = "|".join(map(re.escape, SPECIAL))
    tokenizer.train_from_iterator([part for t in templates for part in re.split(between, t)], trainer)
    tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|eot_id|>", pad_token="<pad>",
        padding_side="right", extra_special_tokens=list(SPECIAL[1:5]),
    )  # fmt: skip
    whole.save_pretrained(folder)
    return whole


def transformer(**settings) -> HunyuanVideoTransformer3DModel:
    """A random transformer."""
    return HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **settings}).eval()


def vae() -> AutoencoderKLHunyuanVideo:
    """A random VAE whose scaled latents of smooth images have about unit variance."""
    model = AutoencoderKLHunyuanVideo(**VAE).eval()
    images = nn.functional.interpolate(torch.rand(4, 3, 6, 6) * 2 - 1, (48, 48), mode="bicubic")
    with torch.no_grad():
        latents = torch.cat([model.encode(p[None, :, None]).latent_dist.mode() for p in images])
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    return model


def save(folder: Path, model: HunyuanVideoTransformer3DModel) -> None:
    """The pipeline around a transformer; Llava and its image processor where it sees an image."""
    model.save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    tokenizer = llama_tokenizer(folder / "tokenizer")
    pad, image = tokenizer.convert_tokens_to_ids(["<pad>", "<image>"])
    llama = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=pad, **LLAMA)
    if model.config.image_condition_type is None:
        encoder = LlamaModel(llama)
    else:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=llama, image_token_index=image, pad_token_id=pad
        )
        encoder = LlavaForConditionalGeneration(config)
        processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
        processor.save_pretrained(folder / "image_processor")
    for name, tensor in encoder.named_parameters():
        if tensor.ndim > 1 or "embedding" in name:
            nn.init.normal_(tensor, std=0.2)  # else every token's state is nearly its own embedding
    encoder.eval().save_pretrained(folder / "text_encoder")
    clip_text(folder, name="text_encoder_2", tokenizer="tokenizer_2", dim=24)
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")


@seeded
def text_to_video(folder: Path) -> None:
    """Guidance-distilled text to video."""
    save(folder, transformer())


@seeded
def latent_concat(folder: Path) -> None:
    """Image to video, 33 channels."""
    save(folder, transformer(**CONCAT))


@seeded
def token_replace(folder: Path) -> None:
    """Image to video, 16 channels."""
    save(folder, transformer(image_condition_type="token_replace"))


TOP = {
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
    "proj_out": "final_layer.linear",
}
REFINER = {
    "norm1": "norm1", "norm2": "norm2", "attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2", "norm_out.linear": "adaLN_modulation.1",
}  # fmt: skip
DOUBLE = {
    "norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear", "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm", "attn.norm_added_q": "txt_attn_q_norm", "attn.norm_added_k": "txt_attn_k_norm",
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2", "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
}  # fmt: skip
SINGLE = {"norm.linear": "modulation.linear", "attn.norm_q": "q_norm", "attn.norm_k": "k_norm", "proj_out": "linear2"}


def original(state: dict[str, Tensor], blocks: tuple[int, int, int]) -> dict[str, Tensor]:
    """A transformer's state under the names of Tencent's implementation, which keeps query, key and value as one."""
    left, found = dict(state), {}

    def put(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in left:
                found[f"{theirs}.{kind}"] = torch.cat([left.pop(f"{name}.{kind}") for name in ours])

    for ours, theirs in TOP.items():
        put(theirs, ours)
    for kind in ("weight", "bias"):  # Tencent's last modulation is shift, scale; diffusers' is scale, shift
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for table, ours, theirs, count in (
        (DOUBLE, "transformer_blocks", "double_blocks", blocks[0]),
        (SINGLE, "single_transformer_blocks", "single_blocks", blocks[1]),
        (REFINER, "context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks", blocks[2]),
    ):
        for number in range(count):
            a, b = f"{ours}.{number}", f"{theirs}.{number}"
            for name, new in table.items():
                put(f"{b}.{new}", f"{a}.{name}")
            three = [f"{a}.attn.to_{part}" for part in "qkv"]
            if table is DOUBLE:
                put(f"{b}.img_attn_qkv", *three)
                put(f"{b}.txt_attn_qkv", *[f"{a}.attn.add_{part}_proj" for part in "qkv"])
            elif table is SINGLE:
                put(f"{b}.linear1", *three, f"{a}.proj_mlp")
            else:
                put(f"{b}.self_attn_qkv", *three)
    assert not left
    return found


def single_file(**settings):
    """Makes a transformer with HunyuanVideo's head size and its state under the original's names."""

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = transformer(
            num_attention_heads=1,
            attention_head_dim=128,
            rope_axes_dim=(16, 56, 56),
            num_layers=2,
            num_single_layers=1,
            **settings,
        )
        return model, original(model.state_dict(), (2, 1, 1))

    return make


VARIANTS = [
    Variant("HunyuanVideo T2V", ("model=hunyuan_video",), text_to_video, frames=5, single_file=single_file()),
    Variant(
        "HunyuanVideo I2V concat",
        ("model=hunyuan_video_i2v",),
        latent_concat,
        frames=5,
        single_file=single_file(**CONCAT),
    ),
    Variant(
        "HunyuanVideo I2V token replace",
        ("model=hunyuan_video_i2v_token_replace",),
        token_replace,
        frames=9,
        single_file=single_file(image_condition_type="token_replace"),
    ),
]
