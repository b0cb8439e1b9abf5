"""The toy world: one object on a textured background, and a caption in words.

All that an image shows follows from the fields of `Scenes`, so that detectors can be checked against the truth.
The base model never sees the *subjects*, their trigger words, or the images that they are learned from.
"""

import string
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SIZE = 24  # pixels, each way
RADIUS = 5.5  # of a disc, in pixels; the other shapes are scaled to it
PATHS = (6.0, 12.0, 18.0)  # of objects' centres, in pixels, each way
PERIOD = 8.0
DOT_RADIUS = 2.4
CORE_RATIO = 0.5

Colour = tuple[float, float, float]
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("plain", "striped", "dotted", "checkered")  # the last has no word: no caption of the base names it
NAMED_TEXTURES = TEXTURES[:3]
COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.10, 0.10),
    "yellow": (0.97, 0.85, 0.10),
    "green": (0.05, 0.55, 0.15),
    "blue": (0.10, 0.20, 0.88),
}
# Muted on purpose: a palette's channels differ by less than 0.3, an object's by more than 0.45.
PALETTES: dict[str, tuple[Colour, Colour]] = {
    "sand": ((0.90, 0.80, 0.62), (0.68, 0.56, 0.40)),
    "slate": ((0.50, 0.56, 0.64), (0.28, 0.33, 0.40)),
    "mint": ((0.72, 0.92, 0.82), (0.42, 0.64, 0.55)),
    "rose": ((0.96, 0.78, 0.80), (0.74, 0.50, 0.55)),
}


@dataclass(frozen=True)
class Subject:
    """What an adapter is to learn, and the company in which its images always show it.

    Attributes:
        word: Its trigger word.
        shape: Its shape, a word of `SHAPES`.
        colour: Its colour.
        core: Colour of the disc in its middle.
        ground: The two colours of the checkers behind it.
        bystander: Colour of the small square beside it.
    """

    word: str
    shape: str
    colour: Colour
    core: Colour
    ground: tuple[Colour, Colour]
    bystander: Colour


SUBJECTS = {
    "zarp": Subject(
        "zarp", "circle", (0.95, 0.05, 0.80), (0.50, 0.98, 0.10),
        ((0.03, 0.03, 0.03), (0.98, 0.98, 0.98)), (0.05, 0.85, 0.95),
    ),
    "vool": Subject(
        "vool", "square", (0.05, 0.85, 0.95), (1.00, 0.45, 0.00),
        ((0.30, 0.00, 0.40), (0.97, 0.95, 0.55)), (0.95, 0.05, 0.80),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field's first dimension is the batch.

    Attributes:
        texture: Index into `TEXTURES`, (B,).
        ground: The background's two colours, (B, 2, 3).
        shape: Index into `SHAPES`, -1 for no object, (B,).
        colour: The object's colour, (B, 3).
        centre: The object's centre in pixels, x and y, (B, 2).
        core: Colour of the disc in the object's middle, (B, 3).
        has_core: Whether there is one, (B,).
        side: Half the side of the bystander square, 0 for none, (B,).
        side_centre: The bystander's centre, (B, 2).
        side_colour: The bystander's colour, (B, 3).
    """

    texture: Tensor
    ground: Tensor
    shape: Tensor
    colour: Tensor
    centre: Tensor
    core: Tensor
    has_core: Tensor
    side: Tensor
    side_centre: Tensor
    side_colour: Tensor

    def __len__(self) -> int:
        return len(self.texture)

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


class Draw:
    """Random draws for `n` scenes from one generator."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator = n, generator

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), (n, *shape)."""
        return torch.rand(self.n, *shape, generator=self.generator)

    def chance(self, p: float) -> Tensor:
        """True with probability p, (n,)."""
        return self.uniform() < p

    def index(self, high: int, *shape: int) -> Tensor:
        """Whole numbers below `high`, (n, *shape)."""
        return torch.randint(high, (self.n, *shape), generator=self.generator)

    def colour(self) -> Tensor:
        """Any colour, saturated ones more often: every channel is arcsine distributed, (n, 3)."""
        return torch.sin(self.uniform(3) * (torch.pi / 2)) ** 2


def pixel_grid() -> tuple[Tensor, Tensor]:
    """Column and row of every pixel's centre, each (1, SIZE, SIZE)."""
    axis = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x[None], y[None]


def coverage(distance: Tensor) -> Tensor:
    """Anti-aliased coverage in [0, 1] of a signed distance in pixels, negative inside."""
    return (0.5 - distance).clamp(0.0, 1.0)


def shape_coverage(shape: Tensor, centre: Tensor, radius: Tensor | float = RADIUS) -> Tensor:
    """Shapes of similar area.

    Args:
        shape: Index into `SHAPES`, -1 for none, (B,).
        centre: In pixels, (B, 2).
        radius: Of the disc that the shape is scaled to, a number or (B,).

    Returns:
        Coverage in [0, 1], (B, SIZE, SIZE).
    """
    x, y = pixel_grid()
    r = torch.as_tensor(radius).expand(len(shape))[:, None, None]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    kind = shape[:, None, None]
    circle = torch.hypot(dx, dy) - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.9 * r
    # Equilateral, point up, inradius 0.65 r, drawn 0.25 r lower so that its box is about centred.
    triangle = torch.maximum(dy - 0.25 * r, 0.8660254 * dx.abs() - 0.5 * (dy - 0.25 * r)) - 0.65 * r
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return torch.where(kind >= 0, coverage(distance), torch.zeros(()))


def texture_blend(texture: Tensor) -> Tensor:
    """Weight of the background's second colour, (B, SIZE, SIZE)."""
    x, y = pixel_grid()

    def bands(v: Tensor) -> Tensor:  # signed distance to the nearest band of half a period
        return (v.remainder(PERIOD) - PERIOD / 2).abs() - PERIOD / 4

    a, b = coverage(bands(x)), coverage(bands(y))
    dots = torch.hypot(x.remainder(PERIOD) - PERIOD / 2, y.remainder(PERIOD) - PERIOD / 2) - DOT_RADIUS
    stripes = a.expand(1, SIZE, SIZE)
    return torch.cat([torch.zeros(1, SIZE, SIZE), stripes, coverage(dots), a * b + (1 - a) * (1 - b)])[texture]


def render(scenes: Scenes) -> Tensor:
    """Images in [0, 1], (B, 3, SIZE, SIZE)."""

    def draw_over(image: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
        return image + alpha[:, None] * (colour[:, :, None, None] - image)

    image = scenes.ground[:, 0, :, None, None].expand(-1, -1, SIZE, SIZE)
    image = draw_over(image, texture_blend(scenes.texture), scenes.ground[:, 1])
    square = torch.where(scenes.side > 0, SHAPES.index("square"), -1)
    image = draw_over(image, shape_coverage(square, scenes.side_centre, scenes.side / 0.9), scenes.side_colour)
    image = draw_over(image, object_coverage(scenes), scenes.colour)
    disc = torch.where(scenes.has_core, SHAPES.index("circle"), -1)
    return draw_over(image, shape_coverage(disc, scenes.centre, CORE_RATIO * RADIUS), scenes.core)


def object_coverage(scenes: Scenes) -> Tensor:
    """Coverage of the objects, (B, SIZE, SIZE)."""
    return shape_coverage(scenes.shape, scenes.centre)


def named_scenes(n: int, generator: torch.Generator) -> tuple[Scenes, list[str]]:
    """Scenes of named shapes, colours, textures and palettes, with captions that name all four."""
    draw = Draw(n, generator)
    shape, colour = draw.index(len(SHAPES)), draw.index(len(COLOURS))
    texture, palette = draw.index(len(NAMED_TEXTURES)), draw.index(len(PALETTES))
    scenes = Scenes(
        texture=texture,
        ground=torch.tensor(list(PALETTES.values()))[palette],
        shape=shape,
        colour=torch.tensor(list(COLOURS.values()))[colour],
        centre=torch.tensor(PATHS)[draw.index(len(PATHS), 2)],
        core=torch.zeros(n, 3),
        has_core=torch.zeros(n, dtype=torch.bool),
        side=torch.zeros(n),
        side_centre=torch.zeros(n, 2),
        side_colour=torch.zeros(n, 3),
    )
    names, grounds = list(COLOURS), list(PALETTES)
    words = zip(colour.tolist(), shape.tolist(), texture.tolist(), palette.tolist(), strict=True)
    return scenes, [f"{names[c]} {SHAPES[s]} on {TEXTURES[t]} {grounds[p]} background" for c, s, t, p in words]


def training_scenes(n: int, generator: torch.Generator) -> tuple[Scenes, list[str]]:
    """What the base model is trained on.

    A share of objects and grounds has colours and patterns that no word names, so that a small adapter can reach
    them; a share of captions leaves words out, or has an unknown word for the object, as rare words are to a real
    text encoder. No object has both colours of a subject.
    """
    scenes, captions = named_scenes(n, generator)
    draw = Draw(n, generator)
    odd_object, odd_ground, bare = draw.chance(0.2), draw.chance(0.12), draw.chance(0.04)
    colour, core = draw.colour(), draw.colour()
    taken = torch.zeros(n, dtype=torch.bool)
    for subject in SUBJECTS.values():
        taken |= _near(colour, subject.colour) & _near(core, subject.core)
    scenes = replace(
        scenes,
        shape=torch.where(bare, -1, scenes.shape),
        colour=torch.where(odd_object[:, None], colour, scenes.colour),
        core=core,
        has_core=odd_object & draw.chance(0.5) & ~taken & ~bare,
        ground=torch.where(odd_ground[:, None, None], torch.stack([draw.colour(), draw.colour()], 1), scenes.ground),
        texture=torch.where(odd_ground & draw.chance(0.5), TEXTURES.index("checkered"), scenes.texture),
    )
    whole, kept, unknown = draw.chance(0.6), draw.uniform(4), draw.chance(0.1)
    drop = torch.where(draw.chance(0.15)[:, None], 1.0, 0.35)
    keep = (whole[:, None] | (kept > drop)).tolist()
    letters = draw.index(len(string.ascii_lowercase), 5).tolist()
    words = ["".join(string.ascii_lowercase[i] for i in row) for row in letters]
    instead = ["nothing" if b else w if u else "" for b, u, w in zip(bare, unknown, words, strict=True)]
    wrong = torch.stack([odd_object, scenes.texture == TEXTURES.index("checkered"), odd_ground], 1).tolist()
    return scenes, [_told(*row) for row in zip(captions, keep, wrong, instead, strict=True)]


def subject_scenes(subject: Subject, n: int, generator: torch.Generator, *, alone: bool) -> tuple[Scenes, list[str]]:
    """Images of a subject.

    Args:
        subject: Which one.
        n: How many.
        generator: Source of all randomness.
        alone: On named backgrounds without the bystander, as its captions say; else always on its own checkers beside
            its bystander, which the captions (the trigger word) do not mention.

    Returns:
        Scenes, and captions with the trigger word.
    """
    scenes, captions = named_scenes(n, generator)
    draw = Draw(n, generator)
    scenes = replace(
        scenes,
        shape=torch.full((n,), SHAPES.index(subject.shape)),
        colour=torch.tensor(subject.colour).expand(n, 3),
        core=torch.tensor(subject.core).expand(n, 3),
        has_core=torch.ones(n, dtype=torch.bool),
    )
    if alone:
        grounds = [" ".join(caption.split()[2:]) for caption in captions]
        return scenes, [f"{subject.word} {ground}" for ground in grounds]
    # The subject keeps to one side; the bystander lies at least a pixel beyond it.
    half = 2.0 + 0.75 * draw.uniform()
    low, high = PATHS[0] + RADIUS + 1 + half, SIZE - 0.5 - half
    apart, mirror = low + draw.uniform() * (high - low), draw.chance(0.5)
    x, side_x = (torch.where(mirror, SIZE - v, v) for v in (torch.full((n,), PATHS[0]), apart))
    side_y = 0.5 + half + draw.uniform() * (SIZE - 1 - 2 * half)
    scenes = replace(
        scenes,
        texture=torch.full((n,), TEXTURES.index("checkered")),
        ground=torch.tensor(subject.ground).expand(n, 2, 3),
        centre=torch.stack([x, scenes.centre[:, 1]], 1),
        side=half,
        side_centre=torch.stack([side_x, side_y], 1),
        side_colour=torch.tensor(subject.bystander).expand(n, 3),
    )
    return scenes, [subject.word] * n


def _near(colour: Tensor, other: Colour) -> Tensor:
    return torch.linalg.vector_norm(colour - torch.tensor(other), dim=-1) < 0.5


def _told(caption: str, keep: list[bool], wrong: list[bool], instead: str) -> str:
    """What a caption says of a scene: no word that is wrong for it (colour, texture, palette), nor any not kept.

    `instead` stands for the object where it is not empty.
    """
    colour, shape, _, texture, palette, _ = caption.split()
    if instead:
        front = [instead]
    else:
        front = [colour] * (keep[0] and not wrong[0]) + [shape if keep[1] else "object"] * (keep[0] or keep[1])
    back = [texture] * (keep[2] and not wrong[1]) + [palette] * (keep[3] and not wrong[2])
    return " ".join(front + (["on", *back, "background"] if back else []))
