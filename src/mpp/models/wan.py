"""WAN 2.1 and 2.2, text to video, on diffusers' `WanTransformer3DModel`; one frame is an image."""

import gc
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ftfy
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from mpp.core.flow import SigmaLaw
from mpp.files import weights_fingerprint
from mpp.models.base import Conditioning, Identity, LatentSpec, fingerprint_if_present, pad_text, resolve_folder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_HEAD_DIM = 128  # of every published WAN; single files do not state it


@dataclass(frozen=True)
class WanConditioning(Conditioning):
    """Text embeddings: `(tokens, dim)` for one caption, `(b, text_length, dim)` batched and zero-padded."""

    text: Tensor


class Wan:
    """WAN text to video (and text to image: one frame).

    Args:
        pretrained: Diffusers folder, hub id, or a single `.safetensors` file of the transformer with original or
            diffusers keys.
        vae: Folder or hub id of the VAE; None: `pretrained`.
        text_encoder: Folder or hub id of UMT5 and its tokenizer; None: `pretrained`.
        expert: WAN 2.2 A14B is two transformers; `high` serves sigmas above its boundary (diffusers folder
            `transformer`), `low` those below (`transformer_2`). None: models with one transformer.
        latents: Shape of the latents: 16 channels at stride 8, or 48 at 16 for TI2V-5B.
        sigma: Training law of sigma.
        lora_targets: Modules that adapters attach to.
        dtype: Of the frozen transformer; `float32`, `bfloat16` or `float16`. What diffusers keeps in float32 stays.
        vae_dtype: Of the VAE while preparing.
        text_dtype: Of the text encoder while preparing, and of the cached embeddings.
        text_length: Tokens that every caption is padded to. WAN attends to padding, so it is part of the model.

    Raises:
        ValueError: An unknown dtype or expert.
    """

    family = "wan"
    conditioning = WanConditioning

    def __init__(
        self,
        *,
        pretrained: str,
        latents: LatentSpec,
        sigma: SigmaLaw,
        lora_targets: str | Sequence[str],
        vae: str | None = None,
        text_encoder: str | None = None,
        expert: Literal["high", "low"] | None = None,
        dtype: str = "bfloat16",
        vae_dtype: str = "float32",
        text_dtype: str = "bfloat16",
        text_length: int = 512,
    ) -> None:
        for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype), ("text_dtype", text_dtype)):
            if value not in _DTYPES:
                raise ValueError(f"model.{name} must be one of {', '.join(_DTYPES)}, got {value!r}")
        if expert not in (None, "high", "low"):
            raise ValueError(f"model.expert must be high, low or null, got {expert!r}")
        self.pretrained = pretrained
        self.vae = vae or pretrained
        self.text_encoder = text_encoder or pretrained
        self.subfolder = "transformer_2" if expert == "low" else "transformer"
        self.latents = latents
        self.sigma = sigma
        self.lora_targets = lora_targets if isinstance(lora_targets, str) else tuple(lora_targets)
        self.dtype, self.vae_dtype, self.text_dtype = _DTYPES[dtype], _DTYPES[vae_dtype], _DTYPES[text_dtype]
        self.text_length = text_length

    def check(self) -> None:
        """Refuse a transformer that is not there, not loadable here, or of another latent shape; loads no weights."""
        file = self._single_file()
        if file is None:
            folder = resolve_folder(self.pretrained, self.subfolder, "model.pretrained")
            config = json.loads((folder / "config.json").read_text())
        else:
            config = _config_of(file)
        kind = config.get("_class_name", "WanTransformer3DModel")
        if kind != "WanTransformer3DModel":
            raise ValueError(f"model.pretrained={self.pretrained} holds a {kind}, model=wan needs a WAN transformer")
        got, wanted = config["in_channels"], self.latents.channels
        if got != wanted:
            hint = "image-to-video models are not supported yet" if got == 36 else "choose the model config that fits"
            raise ValueError(
                f"model.pretrained={self.pretrained} takes {got} latent channels, this model config {wanted}; {hint}"
            )

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints of transformer, VAE and text encoder."""
        file = self._single_file()
        transformer = (
            fingerprint_if_present(self.pretrained, self.subfolder, "model.pretrained", fetch=False)
            if file is None
            else weights_fingerprint(file)
        )
        return Identity(
            transformer,
            _present(self.vae, "vae", "model.vae", fetch=fetch),
            _present(self.text_encoder, "text_encoder", "model.text_encoder", fetch=fetch),
        )

    def load_transformer(self) -> WanTransformer3DModel:
        """The frozen transformer in `dtype`."""
        file = self._single_file()
        if file is None:
            folder = resolve_folder(self.pretrained, self.subfolder, "model.pretrained")
            transformer = WanTransformer3DModel.from_pretrained(folder, torch_dtype=self.dtype)
        else:
            transformer = _load_single_file(file, self.dtype)
        return transformer.requires_grad_(False)

    def load_encoders(self, device: torch.device | str) -> "WanEncoders":
        """VAE and text encoder on `device`, each loaded when first used."""
        return WanEncoders(self, device)

    def collate(self, items: Sequence[WanConditioning]) -> WanConditioning:
        """Zero-pad every text to `text_length`: WAN is trained to attend to exactly this padding."""
        return WanConditioning(pad_text([item.text for item in items], self.text_length))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: WanConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; WAN takes timesteps 1000 * sigma, in float32 whatever the weights are."""
        dtype = transformer.patch_embedding.weight.dtype
        (prediction,) = transformer(
            hidden_states=noisy.to(dtype),
            timestep=sigma.float() * 1000,
            encoder_hidden_states=conditioning.text.to(dtype),
            return_dict=False,
        )
        return prediction

    def _single_file(self) -> Path | None:
        path = Path(self.pretrained).expanduser()
        if path.suffix != ".safetensors":
            return None
        if not path.is_file():
            raise ValueError(f"model.pretrained={self.pretrained} is not there")
        return path


class WanEncoders:
    """AutoencoderKLWan and UMT5, each loaded on first use and freed by `release`."""

    def __init__(self, architecture: Wan, device: torch.device | str) -> None:
        self.architecture = architecture
        self.device = torch.device(device)
        self._vae: AutoencoderKLWan | None = None
        self._text: tuple[PreTrainedTokenizerBase, UMT5EncoderModel] | None = None

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[WanConditioning]:
        """UMT5's last hidden states, trimmed to each caption's true length."""
        tokenizer, model = self._load_text()
        tokens = tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="max_length",
            max_length=self.architecture.text_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        states = model(tokens.input_ids, tokens.attention_mask).last_hidden_state.cpu()
        lengths = tokens.attention_mask.sum(1).tolist()
        return [WanConditioning(state[:length].clone()) for state, length in zip(states, lengths, strict=True)]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `(z - mean) / std` per channel in float32."""
        vae = self._load_vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (latents - mean) / std

    def release(self) -> None:
        """Free VAE and text encoder."""
        self._vae = self._text = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load_vae(self) -> AutoencoderKLWan:
        if self._vae is None:
            folder = resolve_folder(self.architecture.vae, "vae", "model.vae")
            vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=self.architecture.vae_dtype)
            spec = self.architecture.latents
            if vae.config.z_dim != spec.channels or vae.config.scale_factor_spatial != spec.spatial_stride:
                raise ValueError(
                    f"model.vae={self.architecture.vae} makes {vae.config.z_dim} channels at stride "
                    f"{vae.config.scale_factor_spatial}, the model needs {spec.channels} at {spec.spatial_stride}"
                )
            self._vae = vae.to(self.device).eval()
        return self._vae

    def _load_text(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        if self._text is None:
            source = self.architecture.text_encoder
            tokenizer_folder = resolve_folder(source, "tokenizer", "model.text_encoder")
            folder = resolve_folder(source, "text_encoder", "model.text_encoder")
            model = UMT5EncoderModel.from_pretrained(folder, dtype=self.architecture.text_dtype)
            self._text = AutoTokenizer.from_pretrained(tokenizer_folder), model.to(self.device).eval()
        return self._text


def clean_caption(caption: str) -> str:
    """Caption as WAN's pipeline cleans prompts: mojibake fixed, entities resolved, white space folded."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(caption))).strip()).strip()


def _present(source: str, subfolder: str, option: str, *, fetch: bool) -> str | None:
    if source.endswith(".safetensors"):
        if not fetch:
            return None
        raise ValueError(
            f"{option} is not set and model.pretrained is a single file; set {option} to the folder or hub id of a "
            f"WAN pipeline that holds {subfolder}"
        )
    return fingerprint_if_present(source, subfolder, option, fetch=fetch)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Tensor shapes of a single file by their names without ComfyUI's prefixes; reads the header only."""
    try:
        with safe_open(file, "pt") as handle:
            shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"model.pretrained={file} is not a complete .safetensors file ({error})") from error
    if any("scale_weight" in key or "weight_scale" in key or "scaled_fp8" in key for key in shapes):
        raise ValueError(
            f"model.pretrained={file} is a ComfyUI fp8_scaled file: its weights mean nothing without their scales, "
            "which no loader here applies; use the bf16 or fp16 file"
        )
    return {_strip(key): shape for key, shape in shapes.items()}


def _strip(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _config_of(file: Path) -> dict[str, object]:
    """Configuration of a WAN transformer, read off its tensors' shapes."""
    shapes = _shapes(file)
    original = "head.head.weight" in shapes
    names = {
        "ffn": "blocks.0.ffn.0.weight" if original else "blocks.0.ffn.net.0.proj.weight",
        "text": "text_embedding.0.weight" if original else "condition_embedder.text_embedder.linear_1.weight",
        "time": "time_embedding.0.weight" if original else "condition_embedder.time_embedder.linear_1.weight",
        "patch": "patch_embedding.weight",
        "out": "head.head.weight" if original else "proj_out.weight",
    }
    missing = [name for name in names.values() if name not in shapes]
    if missing:
        raise ValueError(f"model.pretrained={file} is no WAN transformer: it has no {missing[0]}")
    dim, in_channels, *patch = shapes[names["patch"]]
    if dim % _HEAD_DIM:
        raise ValueError(f"model.pretrained={file}: width {dim} is no multiple of WAN's head size {_HEAD_DIM}")
    if any("k_img" in key or "add_k_proj" in key for key in shapes):
        raise ValueError(f"model.pretrained={file} is an image-to-video model, which is not supported yet")
    blocks = {int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")}
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": dim // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shapes[names["out"]][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes[names["text"]][1],
        "freq_dim": shapes[names["time"]][1],
        "ffn_dim": shapes[names["ffn"]][0],
        "num_layers": max(blocks) + 1,
    }


def _load_single_file(file: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    config = _config_of(file)
    state = {_strip(key): tensor for key, tensor in load_file(file).items()}
    if "head.head.weight" in state:
        state = convert_wan_transformer_to_diffusers(state)
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    missing, extra = transformer.load_state_dict(state, strict=False, assign=True)
    if missing or extra:
        raise ValueError(
            f"model.pretrained={file} lacks {len(missing)} tensors of a WAN transformer and has {len(extra)} others, "
            f"such as {(missing + extra)[0]}"
        )
    kept = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001 (from_pretrained honours it, for the same reason)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if any(part in name for part in kept) else dtype)
    return transformer.eval()
