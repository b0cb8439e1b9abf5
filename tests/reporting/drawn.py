"""Caches that are written by hand, without a model: the page reads masks, previews and the index only."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mpp.cache.format import Cache, CacheIdentity, Notes
from mpp.cache.index import Entry
from mpp.models.contract import LatentSpec

STRIDE = 8


def smooth(seed, width=128, height=128):
    """A smooth random image, unlike those of other seeds."""
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def disc(height=16, width=16, radius=0.3, centre=(0.5, 0.5), edge=0.5):
    """A soft disc `(h, w)` in [0, 1]: an ordinary mask."""
    rows = (torch.arange(height)[:, None] + 0.5) / height - centre[0]
    columns = (torch.arange(width)[None] + 0.5) / width - centre[1]
    distance = (rows**2 + columns**2).sqrt()
    return ((radius - distance) * min(height, width) / edge / 2 + 0.5).clamp(0, 1)


class Drawn:
    """A cache under construction."""

    def __init__(self, folder: Path, *, layered=False, given=0, temporal=4, side=512, family="drawn"):
        self.cache, self.entries, self.side = Cache(folder), [], side
        self.given = given
        spec = LatentSpec(4, STRIDE, 1 if layered else temporal, (1, 2, 2), layered)
        self.axis = spec.frames
        self.cache.write_identity(CacheIdentity(family, spec, None, None, given_frames=given))

    def add(self, key, mask="disc", image="own", **entry):
        """One sample.

        `mask` is `(h, w)`, `(f, h, w)` or None (then `cells` is the latent shape); `image` one image, a list of
        one for each latent frame, or None where there is no preview.
        """
        kind = entry.pop("kind", "folder")
        mask = disc() if isinstance(mask, str) else mask
        cells = entry.pop("cells", (16, 16))
        shape = cells if mask is None else tuple(mask.shape)
        frames, height, width = shape if len(shape) == 3 else (1, *shape)
        if mask is not None:
            tensor = mask.reshape(1, frames, height, width).float().contiguous()
            path = self.cache.mask_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"mask": tensor}, path)  # not synced to disk, which would take longest
        row = {"split": "train", "text": "x", "caption": f"a caption of {key}", "mask": None if mask is None else kind}
        self.entries.append(Entry(key=key, shape=(4, frames, height, width), **{**row, **entry}))
        if isinstance(image, str):
            image = smooth(sum(map(ord, key)) + len(self.entries), width * STRIDE, height * STRIDE)
        self._save(key, frames, image)
        return self

    def _save(self, key, frames, shown):
        if shown is None:
            return
        images = shown if isinstance(shown, list) else [shown] * frames
        for frame in self.axis.shown(frames):
            path = self.cache.preview_path(key, self.axis.suffix(frame))
            path.parent.mkdir(parents=True, exist_ok=True)
            image = images[frame].copy()
            image.thumbnail((self.side, self.side))
            image.save(path, "JPEG", quality=90)

    def write(self, *, unused=(), skipped=()):
        """The finished cache."""
        self.cache.write_index(self.entries)
        self.cache.write_notes(Notes({}, tuple(unused), tuple(skipped)))
        return self.cache
