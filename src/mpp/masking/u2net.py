"""U²-Net small (u2netp): which pixels of an image belong to its main object.

After Qin, Zhang, Huang, Dehghan, Zaiane and Jagersand, "U²-Net: Going Deeper with Nested U-Structure for Salient Object
Detection", 2020 (arXiv 2005.09007). Its U has a small U (`UBlock`, the paper's RSU) at each of its eleven steps. Batch
normalisation is part of the convolutions here. The weights lie beside this file, with `u2netp.NOTICE`, which says where
they come from and how they were made.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).with_name("u2netp.safetensors")
SIDE = 320  # of the images it was trained with
_OUTER, _INNER = 64, 16  # channels between blocks, and inside of them
_FLAT = (1, 2, 4, 8)  # dilations of a block that keeps its size
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _convolution(channels: int, out: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=dilation, dilation=dilation)


def _halved(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 2, 2, ceil_mode=True)


def _sized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class UBlock(nn.Module):
    """A residual U: down by convolutions, up again beside what each step down gave, added to what came in.

    Args:
        channels: Of its input; its output has 64.
        depth: Steps down.
        flat: Whether it sees far by dilation alone, and never halves.
    """

    def __init__(self, channels: int, depth: int, *, flat: bool = False) -> None:
        super().__init__()
        self._halves = not flat
        dilations = _FLAT if flat else (*(1,) * depth, 2)
        self.enter = _convolution(channels, _OUTER)
        widths = (_OUTER, *(_INNER,) * (len(dilations) - 1))
        self.down = nn.ModuleList(_convolution(width, _INNER, d) for width, d in zip(widths, dilations, strict=True))
        outs = (*(_INNER,) * (len(dilations) - 2), _OUTER)
        back = dilations[-2::-1]
        self.up = nn.ModuleList(_convolution(2 * _INNER, out, d) for out, d in zip(outs, back, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, height, width)` to 64 channels of the same size."""
        entered = functional.relu(self.enter(x))
        steps, last = [], len(self.down) - 1
        x = entered
        for number, step in enumerate(self.down):
            if self._halves and 0 < number < last:
                x = _halved(x)
            x = functional.relu(step(x))
            steps.append(x)
        x = steps.pop()
        for step in self.up:
            beside = steps.pop()
            x = functional.relu(step(torch.cat([_sized(x, beside), beside], 1)))
        return x + entered


class U2NetSmall(nn.Module):
    """The network, 1.13 million weights."""

    def __init__(self) -> None:
        super().__init__()
        depths = (6, 5, 4, 3)  # of the blocks that halve; the deepest two are flat
        self.down = nn.ModuleList(UBlock(_OUTER if number else 3, depth) for number, depth in enumerate(depths))
        self.down.extend(UBlock(_OUTER, 3, flat=True) for _ in range(2))
        self.up = nn.ModuleList([UBlock(2 * _OUTER, 3, flat=True)])
        self.up.extend(UBlock(2 * _OUTER, depth) for depth in reversed(depths))
        self.sides = nn.ModuleList(_convolution(_OUTER, 1) for _ in range(6))
        self.fuse = nn.Conv2d(6, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Probability that a pixel belongs to the main object.

        Args:
            image: `(batch, 3, height, width)`: RGB, normalised as `seen` does.

        Returns:
            `(batch, 1, height, width)` in [0, 1].
        """
        steps, x = [], image
        for number, block in enumerate(self.down):
            x = block(_halved(x) if number else x)
            steps.append(x)
        x = steps.pop()
        found = [x]
        for block in self.up:
            beside = steps.pop()
            x = block(torch.cat([_sized(x, beside), beside], 1))
            found.append(x)
        sides: Sequence[Tensor] = [side(x) for side, x in zip(self.sides, reversed(found), strict=True)]
        return self.fuse(torch.cat([_sized(side, sides[0]) for side in sides], 1)).sigmoid()


def seen(image: Image.Image) -> Tensor:
    """What the network sees of an image, prepared as by its authors (Pillow's Lanczos as in rembg).

    Args:
        image: RGB, of any size and shape.

    Returns:
        `(1, 3, 320, 320)`: relative to the brightest value, then normalised as ImageNet.
    """
    small = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float32))
    bright = small / small.max().clamp_min(1)
    return ((bright - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)).movedim(2, 0)[None]


def load() -> U2NetSmall:
    """The network with its weights in float32, for use; in the file they are 16-bit numbers with scales."""
    network, held = U2NetSmall(), load_file(WEIGHTS)
    scales = {name: held.pop(f"{name.removesuffix('weight')}scale") for name in list(held) if name.endswith("weight")}
    network.load_state_dict({name: numbers * scales.get(name, 1) for name, numbers in held.items()})
    return network.eval().requires_grad_(False)
