"""A random WAN pipeline small enough for tests and the demo, saved as a real diffusers folder."""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
TEXT = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-_/&"


def tiny_wan(folder: str, seed: int = 0) -> str:
    """Make a random tiny WAN pipeline at `folder` unless one is there.

    The folder holds `transformer`, `vae`, `text_encoder` and `tokenizer` as diffusers and transformers save them.
    The VAE's latent statistics are measured on smooth random images, so that its latents are near unit variance.

    Returns:
        The folder.
    """
    target = Path(folder)
    if (target / "transformer" / "config.json").is_file():
        return folder
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _save(temporary)
        temporary.rename(target)
    except OSError:
        if not (target / "transformer" / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save(folder: Path) -> None:
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
    vae = AutoencoderKLWan(**VAE).eval()
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, (64, 64), mode="bicubic")
    with torch.no_grad():
        latents = torch.cat([vae.encode(p[None, :, None]).latent_dist.mode() for p in images])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    vae.save_pretrained(folder / "vae")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [("▁", -2.0)] + [(letter, -3.0) for letter in _LETTERS]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **TEXT)).eval().save_pretrained(folder / "text_encoder")
