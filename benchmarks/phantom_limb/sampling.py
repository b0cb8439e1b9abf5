"""From noise to toy images, and images to files."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.phantom_limb.world import SIZE
from mpp.config import CONFIG_DIR, build
from mpp.models.contract import Prompt
from mpp.models.families.toy import Toy

STEPS = 16
SHIFT = 3.0
BATCH = 64


def toy(**settings: object) -> Toy:
    """The toy architecture as `model=toy` configures it."""
    return build(OmegaConf.merge(OmegaConf.load(CONFIG_DIR / "model" / "toy.yaml"), settings))


def draw_noise(architecture: Toy, n: int, seed: int) -> Tensor:
    """Starting points of `n` images."""
    shape = architecture.latents.shape(1, SIZE, SIZE)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(architecture: Toy, transformer: nn.Module, captions: Sequence[str], noise: Tensor) -> Tensor:
    """Images in [0, 1], `(b, 3, height, width)`, by Euler steps without guidance on shifted noise levels."""
    levels = torch.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    encoders = architecture.load_encoders("cpu")
    images = []
    for start in range(0, len(captions), BATCH):
        conditioning = architecture.collate(encoders.encode_text([Prompt(c) for c in captions[start : start + BATCH]]))
        x = noise[start : start + BATCH]
        for now, then in pairwise(sigmas):
            x = x + (then - now) * architecture.velocity(transformer, x, now.expand(len(x)), conditioning)
        images.append((encoders.decode_pixels(x)[:, :, 0] + 1) / 2)
    return torch.cat(images).clamp(0, 1)


def grid(images: Tensor, columns: int, scale: int = 3, line: float = 1.0) -> Image.Image:
    """Images `(b, 3, h, w)` side by side, enlarged, with a line between of a brightness in [0, 1]."""
    framed = functional.pad(images, (1, 1, 1, 1), value=line)
    framed = torch.cat([framed, framed.new_ones(-len(framed) % columns, *framed.shape[1:])])
    rows, (height, width) = len(framed) // columns, framed.shape[-2:]
    sheet = framed.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_images(images: Tensor, captions: Sequence[str], folder: Path) -> None:
    """Images as `0000.png` with captions as `0000.txt`, as a user has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(array).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(caption + "\n")
