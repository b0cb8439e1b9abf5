"""Samples: base and LoRA from the same noise, side by side, as files."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mpp.files import write_atomically
from mpp.lora.adapters import adapters_off, has_adapter
from mpp.media.own import mark
from mpp.models.contract import Architecture, Encoders
from mpp.models.frame_axis import FrameAxis
from mpp.sampling.prompts import ReadyPrompt

_HEADER = 16
_SHOWN_FRAMES = 6

Pixels = Float[Tensor, "frames channels height width"]


@dataclass(frozen=True)
class Pair:
    """One prompt generated from twice from the same noise, `(frames, channels, height, width)` in [0, 1].

    Attributes:
        name: For files, e.g. `0_a_photo_of`.
        prompt: What was asked for.
        base: By the base model.
        lora: With the LoRA; None where there is none.
        frames: What the frames are.
        fps: Frames per second of a clip.
    """

    name: str
    prompt: str
    base: Pixels
    lora: Pixels | None
    frames: FrameAxis
    fps: float = 16.0


@torch.no_grad()
def generate(
    architecture: Architecture,
    transformer: nn.Module,
    encoders: Encoders,
    ready: ReadyPrompt,
    *,
    name: str,
    device: torch.device | str,
    bases: dict[str, Pixels] | None = None,
) -> Pair:
    """Generate from a prompt by the base and, where the transformer has an adapter, with it.

    The global random state and each module's mode come back as they were.

    Args:
        architecture: The family.
        transformer: Frozen, perhaps with an adapter.
        encoders: Whose VAE decodes; no text encoder is loaded.
        ready: Prompt with its conditioning.
        name: Of the pair.
        device: Where the transformer runs.
        bases: The base's images from earlier calls, by name; filled where they are not there, since the base never
            changes.
    """
    bases = {} if bases is None else bases
    device = torch.device(device)
    training = [module for module in transformer.modules() if module.training]
    try:
        transformer.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            negative = None if ready.negative is None else ready.negative.to(device)
            arguments = (transformer, encoders, ready.positive.to(device), negative, ready.generation)
            if name not in bases:
                with adapters_off(transformer):
                    bases[name] = architecture.generate(*arguments)
            lora = architecture.generate(*arguments) if has_adapter(transformer) else None
    finally:
        for module in training:
            module.training = True
    fps = architecture.fps or Pair.fps
    return Pair(name, ready.prompt, bases[name], lora, architecture.latents.frames, fps)


def generation_name(number: int, prompt: str) -> str:
    """Name of a prompt's files, e.g. `0_a_photo_of`."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in prompt).split()
    return f"{number}_{'_'.join(words)[:40] or 'empty'}"


def save(pair: Pair, folder: Path) -> list[Path]:
    """Write a pair: `NAME.png` for an image, a strip of layers or of a clip's frames; `NAME.mp4` for a clip.

    Returns:
        The files written.
    """
    sheet = strip(pair)
    image = folder / f"{pair.name}.png"
    write_atomically(image, lambda temporary: sheet.save(temporary, "PNG"))
    mark(folder)
    if not pair.frames.plays(len(pair.base)):
        return [image]
    clip = folder / f"{pair.name}.mp4"
    write_atomically(clip, lambda temporary: _write_clip(pair, temporary))
    return [image, clip]


def strip(pair: Pair) -> Image.Image:
    """Base and LoRA under each other, each a row of frames or layers; one frame: side by side."""
    rows = [("base", pair.base)] + ([("LoRA", pair.lora)] if pair.lora is not None else [])
    single = len(pair.base) == 1
    shown = pair.frames.shown(len(pair.base), _SHOWN_FRAMES)
    images = [(label, [frame_image(pixels[number]) for number in shown]) for label, pixels in rows]
    width, height = images[0][1][0].size
    columns = len(images) if single else max(len(row) for _, row in images)
    lines = 1 if single else len(images)
    sheet = Image.new("RGB", (columns * width, lines * (height + _HEADER)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, row) in enumerate(images):
        left, top = (number * width, 0) if single else (0, number * (height + _HEADER))
        draw.text((left + 4, top + 2), f"{label}: {pair.prompt}"[: max(8, columns * width // 7)], fill="black")
        for column, image in enumerate(row):
            sheet.paste(image, (left + column * width, top + _HEADER))
    return sheet


def frame_image(frame: Float[Tensor, "channels height width"]) -> Image.Image:
    """RGB, a transparent frame over a checkerboard."""
    array = (frame * 255).round().byte().permute(1, 2, 0).numpy()
    if array.shape[2] == 3:
        return Image.fromarray(array)
    rows, columns = np.indices(array.shape[:2]) // 8
    board = np.where((rows + columns) % 2, 200, 255).astype(np.uint8)
    below = Image.fromarray(np.repeat(board[..., None], 3, axis=2))
    below.paste(Image.fromarray(array[..., :3]), mask=Image.fromarray(array[..., 3]))
    return below


def _write_clip(pair: Pair, path: Path) -> None:
    """Base left, LoRA right, as H.264."""
    frames = pair.base if pair.lora is None else torch.cat([pair.base, pair.lora], dim=-1)
    frames = frames[..., : frames.shape[-2] // 2 * 2, : frames.shape[-1] // 2 * 2]  # H.264 wants even sides
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(pair.fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        for frame in (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
