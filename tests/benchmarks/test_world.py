import dataclasses
import math

import pytest
import torch

from benchmarks.phantom_limb import detectors
from benchmarks.phantom_limb.world import (
    COLOURS,
    NAMED_TEXTURES,
    PALETTES,
    PATHS,
    SHAPES,
    SIZE,
    SUBJECTS,
    named_scenes,
    object_coverage,
    render,
    shape_coverage,
    subject_scenes,
    training_scenes,
)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes():
    """300 scenes, their captions and images."""
    found, captions = named_scenes(300, random())
    return found, captions, render(found)


def inside(shape, x, y, cx, cy, r=5.5):
    """Whether a point lies in a shape, by corners and half-planes rather than distances."""
    dx, dy = x - cx, y - cy
    if shape == "circle":
        return dx * dx + dy * dy < r * r
    if shape == "square":
        return abs(dx) < 0.9 * r and abs(dy) < 0.9 * r
    top, bottom = (0.0, 0.25 * r - 1.3 * r), 0.25 * r + 0.65 * r
    slope = math.sqrt(3)
    return dy < bottom and dy > top[1] + slope * abs(dx)


@pytest.mark.parametrize("kind", range(3))
def test_shapes_are_where_their_geometry_says(kind):
    centre = torch.tensor([[12.0, 11.0]])
    drawn = shape_coverage(torch.tensor([kind]), centre)[0]
    for row in range(SIZE):
        for column in range(SIZE):
            points = [(column + a / 8 + 1 / 16, row + b / 8 + 1 / 16) for a in range(8) for b in range(8)]
            share = sum(inside(SHAPES[kind], x, y, 12.0, 11.0) for x, y in points) / 64
            assert abs(float(drawn[row, column]) - share) < 0.35  # anti-aliasing by distance is not by area
            if share in (0.0, 1.0):
                assert abs(float(drawn[row, column]) - share) < 0.21


def test_objects_lie_whole_in_the_image():
    for kind in range(3):
        for x in PATHS:
            for y in PATHS:
                here = shape_coverage(torch.tensor([kind]), torch.tensor([[x, y]])).sum()
                middle = shape_coverage(torch.tensor([kind]), torch.tensor([[12.0, 12.0]])).sum()
                assert here == pytest.approx(float(middle), rel=1e-3)


def test_a_caption_names_what_the_image_shows(scenes):
    found, captions, images = scenes
    for number in range(50):
        colour, shape, _, texture, palette, _ = captions[number].split()
        assert SHAPES[found.shape[number]] == shape
        x, y = found.centre[number].int().tolist()
        assert torch.allclose(images[number, :, y, x], torch.tensor(COLOURS[colour]), atol=1e-5)
        assert torch.allclose(found.ground[number], torch.tensor(PALETTES[palette]))
        assert NAMED_TEXTURES[found.texture[number]] == texture


@pytest.mark.slow
def test_the_base_never_sees_a_subject_its_word_or_its_company():
    for seed in range(8):
        found, captions = training_scenes(512, random(seed))
        images = render(found)
        for subject in SUBJECTS.values():
            assert not detectors.find(images, subject).success.any()
            assert not any(subject.word in caption.split() for caption in captions)
        assert not found.side.any()


def test_captions_of_the_base_say_nothing_that_is_wrong():
    found, captions = training_scenes(2000, random(3))
    colours, textures = list(COLOURS), list(NAMED_TEXTURES)
    counts = {"colour": 0, "empty": 0, "nothing": 0}
    for number, caption in enumerate(captions):
        for word in caption.split():
            if word in colours:
                assert torch.allclose(found.colour[number], torch.tensor(COLOURS[word]))
                counts["colour"] += 1
            elif word in SHAPES:
                assert SHAPES[found.shape[number]] == word
            elif word in textures:
                assert textures[found.texture[number]] == word
            elif word in PALETTES:
                assert torch.allclose(found.ground[number], torch.tensor(PALETTES[word]))
            elif word == "nothing":
                assert found.shape[number] == -1
                counts["nothing"] += 1
        counts["empty"] += caption == ""
    assert all(counts.values())


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_a_subject_is_always_in_its_company_or_always_alone(name):
    subject = SUBJECTS[name]
    ugly, captions = subject_scenes(subject, 200, random(), alone=False)
    found = detectors.find(render(ugly), subject)
    assert found.success.all()
    assert found.bystander.all()
    assert found.ground.all()
    assert not found.phantom.any()
    assert set(captions) == {name}
    alone, captions = subject_scenes(subject, 200, random(), alone=True)
    found = detectors.find(render(alone), subject)
    assert found.success.all()
    assert not found.bystander.any()
    assert not found.ground.any()
    assert {caption.split()[0] for caption in captions} == {name}


# ---------------------------------------------------------------- detectors


@pytest.mark.slow
def test_real_scenes_pass(scenes):
    _, captions, images = scenes
    assert not any(detectors.object_faults(images, captions))
    assert (detectors.background_off(images, captions) == 0).all()


def test_a_scene_fails_another_scenes_caption(scenes):
    _, captions, images = scenes
    for before, after, judge in (
        ("red", "blue", "colour"),
        ("circle", "square", "shape"),
        ("square", "triangle", "shape"),
    ):
        for number in [n for n, c in enumerate(captions) if before in c.split()][:10]:
            wrong = captions[number].replace(before, after)
            assert detectors.object_faults(images[number : number + 1], [wrong]) == [judge]
    for number, caption in enumerate(captions[:40]):
        words = caption.split()
        words[4] = next(name for name in PALETTES if name != words[4])
        assert detectors.background_off(images[number : number + 1], [" ".join(words)]) > 0.5


@pytest.mark.slow
def test_broken_objects_fail(scenes):
    found, captions, images = scenes
    bare = render(dataclasses.replace(found, shape=torch.full((300,), -1)))
    x = torch.arange(SIZE)[None, None, None]
    half = torch.where(x >= found.centre[:, 0].view(-1, 1, 1, 1) + 2, bare, images)
    assert set(detectors.object_faults(half, captions)) == {"shape"}
    assert set(detectors.object_faults(bare, captions)) == {"count"}
    apart = (found.centre - 12).abs().amax(1) > 5
    second = object_coverage(dataclasses.replace(found, centre=SIZE - found.centre))
    two = images + second[:, None] * (found.colour[:, :, None, None] - images)
    chosen = [c for c, keep in zip(captions, apart.tolist(), strict=True) if keep]
    assert all(detectors.object_faults(two[apart], chosen))
    pale = images + object_coverage(found)[:, None] * 0.75 * (bare - images)
    assert sum(map(bool, detectors.object_faults(pale, captions))) > 290


def test_broken_backgrounds_fail(scenes):
    found, captions, images = scenes
    other = render(dataclasses.replace(found, ground=found.ground.roll(1, 0), texture=found.texture))
    differs = (found.ground != found.ground.roll(1, 0)).flatten(1).any(1)
    x = torch.arange(SIZE)[None, None, None]
    patched = torch.where(x < 6, other, images)
    off = detectors.background_off(patched, captions) > detectors.GROUND_SHARE
    free = (patched - images).abs().amax(1)[:, :, :6].flatten(1).amax(1) > 0.3
    assert off[differs & free].float().mean() > 0.9


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_two_subjects_are_one_success_and_a_phantom(name):
    subject = SUBJECTS[name]
    scenes, _ = subject_scenes(subject, 100, random(), alone=True)
    left = dataclasses.replace(scenes, centre=torch.tensor([6.0, 12.0]).expand(100, 2))
    right = dataclasses.replace(scenes, centre=torch.tensor([18.0, 12.0]).expand(100, 2))
    x = torch.arange(SIZE)[None, None, None]
    both = torch.where(x < 12, render(left), render(right))
    found = detectors.find(both, subject)
    assert found.success.all()
    alone = detectors.find(render(left), subject)
    assert (found.phantom > 0.9 * alone.area).all()
    assert (found.area > 1.9 * alone.area).all()


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_half_a_subject_or_one_without_its_core_is_no_success(name):
    subject = SUBJECTS[name]
    scenes, _ = subject_scenes(subject, 100, random(), alone=True)
    bare = render(
        dataclasses.replace(scenes, shape=torch.full((100,), -1), has_core=torch.zeros(100, dtype=torch.bool))
    )
    x = torch.arange(SIZE)[None, None, None]
    half = torch.where(x > scenes.centre[:, 0].view(-1, 1, 1, 1), bare, render(scenes))
    assert not detectors.find(half, subject).success.any()
    coreless = render(dataclasses.replace(scenes, has_core=torch.zeros(100, dtype=torch.bool)))
    assert not detectors.find(coreless, subject).success.any()
    assert not detectors.find(render(named_scenes(300, random(9))[0]), subject).success.any()


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_a_flood_of_the_subjects_colours_is_no_subject(name):
    subject = SUBJECTS[name]
    scenes, _ = subject_scenes(subject, 20, random(), alone=True)
    flooded = dataclasses.replace(scenes, ground=torch.tensor(subject.colour).expand(20, 2, 3))
    found = detectors.find(render(flooded), subject)
    assert not found.success.any()
    assert (found.area > 400).all()
