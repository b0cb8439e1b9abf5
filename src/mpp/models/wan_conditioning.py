"""WAN's record, its names in original files, and diffusers' image-to-video pipeline on prepared images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from mpp.models.conditioning import Conditioning
from mpp.models.contract import NativeRule
from mpp.models.single_file import Shapes, count_blocks

_HEAD_DIM = 128  # of every published WAN; single files do not state it

NATIVE = (
    NativeRule(r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    NativeRule(r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    NativeRule(r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    NativeRule(r"blocks\.(\d+)\.attn2\.add_([kv])_proj", r"blocks.\1.cross_attn.\2_img"),
    NativeRule(r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    NativeRule(r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    NativeRule(r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    NativeRule(r"blocks\.(\d+)\.attn1\.norm_([qk])", r"blocks.\1.self_attn.norm_\2"),
    NativeRule(r"blocks\.(\d+)\.attn2\.norm_([qk])", r"blocks.\1.cross_attn.norm_\2"),
    NativeRule(r"blocks\.(\d+)\.attn2\.norm_added_k", r"blocks.\1.cross_attn.norm_k_img"),
    NativeRule(r"blocks\.(\d+)\.norm2", r"blocks.\1.norm3"),
    NativeRule(r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    NativeRule(r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    NativeRule(r"condition_embedder\.time_proj", "time_projection.1"),
    NativeRule("proj_out", "head.head"),
)


@dataclass(frozen=True)
class WanConditioning(Conditioning):
    """What WAN sees besides noisy latents.

    Attributes:
        text: Embeddings `(tokens, dim)` of one caption, `(b, text_length, dim)` batched and zero-padded.
        image: CLIP's features of the first frame, `(257, dim)`.
        condition: Mask and latents of the first frame followed by nothing, `(4 + c, f, h, w)`, or for TI2V-5B the first
            frame's latents alone, `(c, 1, h, w)`.
    """

    text: Tensor
    image: Tensor | None = None
    condition: Tensor | None = None


def stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One image field of a batch; None where no sample has it.

    Raises:
        ValueError: Shapes differ, or only some samples have it.
    """
    shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"samples of one batch have first frames of different shapes: {sorted(map(str, shapes))}")
    return None if None in shapes else torch.stack(list(tensors))


def read_config(shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of a WAN transformer, read off its tensors' shapes."""

    def shape(original: str, diffusers: str) -> Sequence[int]:
        return shapes[original if native else diffusers]

    def size(original: str, diffusers: str, axis: int) -> int | None:
        found = shapes.get(original if native else diffusers)
        return None if found is None else found[axis]

    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % _HEAD_DIM:
        raise ValueError(f"width {dim} is no multiple of WAN's head size {_HEAD_DIM}")
    embedder, image = "condition_embedder", "condition_embedder.image_embedder"
    return {
        "patch_size": patch,
        "num_attention_heads": dim // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight", "proj_out.weight")[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shape("text_embedding.0.weight", f"{embedder}.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("time_embedding.0.weight", f"{embedder}.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": count_blocks(shapes, "blocks."),
        "image_dim": size("img_emb.proj.0.weight", f"{image}.norm1.weight", 0),
        "added_kv_proj_dim": size("blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": size("img_emb.emb_pos", f"{image}.pos_embed", 1),
    }


class PreparedImageToVideo(WanImageToVideoPipeline):
    """The pipeline with CLIP's features made beforehand: its own `image_embeds` excludes the image it also needs."""

    def __call__(self, *args: Any, prepared: Tensor | None = None, **settings: Any) -> Any:  # noqa: ANN401
        """As the pipeline, with CLIP's features `(1, 257, dim)` as `prepared`."""
        self._prepared = prepared
        return super().__call__(*args, **settings)

    def encode_image(self, image: Image.Image, device: torch.device | None = None) -> Tensor:
        """The features at hand instead of those of `image`."""
        del image
        return self._prepared.to(device)
