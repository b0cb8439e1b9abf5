"""What the contract tests need to know of a variant, and what they make of it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpp.batching.batch import Batch
from mpp.config import build
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Prompt
from tests.helpers import config
from tests.media.videos import write_video


def as_is(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """What most video pipelines hand their scheduler: latents as they are."""
    del shape
    return tensor


@dataclass(frozen=True)
class Variant:
    """A variant of a family.

    Attributes:
        name: Row of the support matrix, e.g. `WAN 2.1 T2V`.
        overrides: Command-line overrides that choose it at tiny size, without `model.pretrained`.
        build: Saves a tiny random pipeline of the real classes into a folder: transformer(s), vae, text encoders,
            tokenizers, scheduler, as diffusers and transformers save them. Deterministic.
        frames: Pixel frames of the contract's clips (layers + 1 for layered images).
        controls: Control images per sample.
        unpack: From what the pipeline hands its scheduler to latents `(b, c, f, h, w)`, by diffusers' own functions.
            Called with the tensor and the latent shape (c, f, h, w) that `velocity` gets.
        fixed_text: Whether every caption is brought to one length (and a longer one refused); else padding is neutral.
        single_file: None where diffusers cannot load one; else makes a small transformer of a shape that the original
            file's loader knows (its real head size), and returns it with its state under the original's names, written
            out from the original implementation's module names, not from mpp's rules.
    """

    name: str
    overrides: tuple[str, ...]
    build: Callable[[Path], None]
    frames: int = 1
    controls: int = 0
    unpack: Callable[[Tensor, Sequence[int]], Tensor] = as_is
    fixed_text: bool = False
    single_file: Callable[[], tuple[torch.nn.Module, dict[str, Tensor]]] | None = None


def built(variant: Variant, root: Path) -> Path:
    """The variant's pipeline under `root`, built by the process that needs it first; tests copy what they change."""
    folder = root / re.sub(r"[^\w.-]+", "_", variant.name)
    if not folder.exists():
        with TemporaryDirectory(dir=root) as own:
            variant.build(Path(own) / "pipeline")
            try:
                (Path(own) / "pipeline").rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder


def architecture(variant: Variant, folder: Path, *overrides: str):
    """The variant's architecture with its weights at `folder`, in float32."""
    cfg = config(
        "prepare",  # which has the least besides a model
        [
            *variant.overrides,
            f"model.pretrained={folder}",
            "model.dtype=float32",
            "model.text_dtype=float32",
            "data.cache_dir=x",
            *overrides,
        ],
    )
    return build(cfg.model)


def image(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random image."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def pixels(arch, variant: Variant, cells: tuple[int, int], seed: int) -> Tensor:
    """A random clip `(1, channels, frames, height, width)` in [-1, 1], `cells` pixel steps high and wide."""
    step = arch.latents.pixel_step
    channels = 4 if arch.latents.layered else 3
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(1, channels, variant.frames, *cells, generator=random) * 2 - 1
    size = (variant.frames, cells[0] * step, cells[1] * step)
    return torch.nn.functional.interpolate(small, size, mode="trilinear")


def controls(variant: Variant, seed: int) -> tuple[Image.Image, ...]:
    """Its control images."""
    return tuple(image(96, 64, 100 * seed + n) for n in range(variant.controls))


def conditioning(arch, variant: Variant, encoders, text: str, *, cells=(2, 3), seed: int = 0) -> Conditioning:
    """One sample's unbatched record as preparing makes it: text and image fields."""
    clip, images = pixels(arch, variant, cells, seed), controls(variant, seed)
    seen = images
    if arch.images.first_frame:
        first = ((clip[0, :3, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        seen = (Image.fromarray(first),)
    (record,) = encoders.encode_text([Prompt(text, seen if arch.images.in_text else ())])
    fields = {f"{k}": v for k, v in encoders.encode_images(clip, images).items()}
    from mpp.models.conditioning import flat_tensors

    return type(record).from_tensors({**record.tensors(), **flat_tensors(fields)})


def batch(arch, variant: Variant, encoders, texts: Sequence[str], *, cells=(2, 3), seed: int = 0) -> Batch:
    """A batch of clips with half masks, one for each text."""
    given = arch.given_frames
    latents = torch.cat([encoders.encode_pixels(pixels(arch, variant, cells, seed + n)) for n in range(len(texts))])
    latents = latents[:, :, given:]
    mask = torch.ones(len(texts), 1, *latents.shape[2:])
    mask[..., mask.shape[-1] // 2 :] = 0
    items = [conditioning(arch, variant, encoders, t, cells=cells, seed=seed + n) for n, t in enumerate(texts)]
    return Batch(tuple(f"s{seed + n}" for n in range(len(texts))), latents, mask, arch.collate(items))


def draw_clip(root: Path, name: str, frames: int, side: int) -> None:
    """A video that changes, its mask video, which grows, and its caption."""
    shown = [np.asarray(image(side, side, 20 + number)) for number in range(frames)]
    masks = [np.zeros((side, side), np.uint8) for _ in range(frames)]
    for number, mask in enumerate(masks):
        mask[: side // 2, : side // 2 + number] = 255
    write_video(root / "photos" / f"{name}.mkv", shown, codec="libx264rgb", pix_fmt="rgb24", rate=24)
    write_video(root / "masks" / f"{name}.mkv", masks, codec="ffv1", pix_fmt="gray")
    (root / "photos" / f"{name}.txt").write_text("a red box by the sea")


def draw_set(variant: Variant, arch, root: Path, count: int = 2) -> list[str]:
    """Files of a tiny training set with masks, layers and control images as the variant wants them.

    The last sample of a model of clips is a video with a mask that moves; all are where it sees the first frame.

    Returns:
        The overrides of `python -m mpp.prepare` that name them.
    """
    side = 4 * arch.latents.pixel_step
    for name in ("photos", "masks", "controls"):
        (root / name).mkdir(parents=True)
    mask = np.zeros((side, side), np.uint8)
    mask[: side // 2] = 255
    clips = count if arch.least_frames > 1 else 1 if arch.fps else 0
    clips = 0 if arch.latents.layered else clips
    for number in range(count):
        if number >= count - clips:
            draw_clip(root, f"p{number}", variant.frames, side)
            continue
        image(side, side, number).save(root / "photos" / f"p{number}.png")
        (root / "photos" / f"p{number}.txt").write_text("a red box " + "by the sea " * number)
        if arch.latents.layered:
            for layer in range(variant.frames - 1):
                rgba = image(side, side, 10 + layer).convert("RGBA")
                rgba.putalpha(Image.fromarray(mask))
                rgba.save(root / "photos" / f"p{number}.layer{layer}.png")
                Image.fromarray(mask if layer else 255 - mask).save(root / "masks" / f"p{number}.layer{layer}.png")
        else:
            Image.fromarray(mask).save(root / "masks" / f"p{number}.png")
        for control in range(variant.controls):
            image(80, 64, 50 + control).save(root / "controls" / f"p{number}_{control}.png")
    found = [f"data.image_dir={root / 'photos'}", f"data.mask_dir={root / 'masks'}", f"data.resolution={side}"]
    found += [f"data.clips.frames=[{variant.frames}]"] if clips else []
    return found + ([f"data.control_dir={root / 'controls'}"] if variant.controls else [])
