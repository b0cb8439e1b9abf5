import dataclasses
import json
import textwrap

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from benchmarks.phantom_limb import demo, detectors, fine_tune_sets, proof, study
from benchmarks.phantom_limb.sampling import draw_noise, grid, sample, toy
from benchmarks.phantom_limb.world import SUBJECTS, named_scenes, render, subject_scenes
from mpp.config import check_config

RESULTS = study.HERE / "results"


@pytest.fixture(scope="module")
def rules():
    """The protocol, with fewer images."""
    small = study.protocol()
    small.images, small.held_out, small.prompts = 4, 4, 8
    return small


@pytest.fixture(scope="module")
def generated_scenes():
    """Subjects alone on named backgrounds, the same backgrounds without them, and where the subjects are."""
    scenes, _ = subject_scenes(SUBJECTS["zarp"], 64, torch.Generator().manual_seed(4), alone=True)
    bare = dataclasses.replace(scenes, shape=torch.full((64,), -1), has_core=torch.zeros(64, dtype=torch.bool))
    return scenes, render(scenes), render(bare)


def measured(images, base, rules):
    return study.generated(images, base, SUBJECTS["zarp"], "zarp", rules)


def test_perfect_images_score_perfectly(generated_scenes, rules):
    _, images, bare = generated_scenes
    values = measured(images, bare, rules)
    assert values["success"] == 1
    assert values["phantom"] == values["bystander"] == values["ground"] == 0
    assert values["area"] == pytest.approx(1, abs=0.02)
    assert values["background"] < 1e-9
    assert values["rim"] < 1e-9


def test_a_second_subject_is_phantom_pixels_and_background_distance(generated_scenes, rules):
    scenes, _, bare = generated_scenes
    left, right = (dataclasses.replace(scenes, centre=torch.tensor([x, 12.0]).expand(64, 2)) for x in (6.0, 18.0))
    columns = torch.arange(24)[None, None, None]
    both = torch.where(columns < 12, render(left), render(right))
    values = measured(both, bare, rules)
    one = detectors.find(render(left), SUBJECTS["zarp"]).area.float().mean().item()
    assert values["success"] == 1
    assert values["area"] == pytest.approx(2, abs=0.05)
    assert values["phantom"] == pytest.approx(one / 576, rel=0.05)
    assert values["background"] > 0.02


def test_background_distance_is_the_mean_square_outside_the_subject(generated_scenes, rules):
    _, images, bare = generated_scenes
    changed = bare + 0.1
    values = measured(images, changed, rules)  # palettes shifted by 0.1 are still no objects
    assert values["background"] == pytest.approx(0.01, rel=1e-3)
    assert values["rim"] == pytest.approx(0.01, rel=1e-3)


def test_images_in_bad_company_are_told(rules):
    scenes, _ = subject_scenes(SUBJECTS["zarp"], 32, torch.Generator().manual_seed(1), alone=False)
    values = measured(render(scenes), render(named_scenes(32, torch.Generator().manual_seed(1))[0]), rules)
    assert values["bystander"] == values["ground"] == values["success"] == 1


def test_damage_is_none_for_the_bases_own_images_and_measured_against_their_variance():
    scenes, captions = named_scenes(64, torch.Generator().manual_seed(2))
    images = render(scenes)
    none = study.damage(images, images, captions, SUBJECTS["zarp"])
    assert set(none.values()) == {0}
    flat = images.mean().expand_as(images)
    gone = study.damage(flat, images, captions, SUBJECTS["zarp"])
    assert gone["other_distance"] == pytest.approx(1, rel=0.01)
    assert gone["other_malformed"] == 1
    subjects, _ = subject_scenes(SUBJECTS["zarp"], 64, torch.Generator().manual_seed(2), alone=True)
    assert study.damage(render(subjects), images, captions, SUBJECTS["zarp"])["other_leak"] > 0.1


def test_masks_are_tiered_where_the_subject_is(tmp_path):
    scenes, _ = subject_scenes(SUBJECTS["vool"], 6, torch.Generator().manual_seed(3), alone=False)
    fine_tune_sets.write_masks(scenes, {"pixels": 2, "value": 0.5}, tmp_path)
    images = render(scenes)
    for number in range(6):
        mask = Image.open(tmp_path / f"{number:04d}.png")
        levels = torch.tensor(list(mask.get_flattened_data())).view(24, 24)
        assert set(levels.unique().tolist()) == {0, 128, 255}
        cx, cy = scenes.centre[number].tolist()
        for y in range(24):
            for x in range(24):
                distance = max(abs(x + 0.5 - cx), abs(y + 0.5 - cy))  # to the middle of a square of half side 4.95
                expected = 255 if distance < 4.95 else 128 if distance < 6.95 else 0
                assert levels[y, x] == expected, (number, x, y)
        body = (images[number] - torch.tensor(SUBJECTS["vool"].colour)[:, None, None]).abs().amax(0) < 0.01
        assert (levels[body] == 255).all()


@pytest.mark.parametrize("textures", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_composites_are_the_subject_inside_its_mask_and_an_empty_ground_of_the_base_outside(textures):
    architecture = toy(pretrained=str(study.BASE))
    scenes, _ = subject_scenes(SUBJECTS["vool"], 8, torch.Generator().manual_seed(6), alone=False)
    images, captions = fine_tune_sets.composites(
        architecture, architecture.load_transformer(), "vool", scenes, textures=textures
    )
    assert images.shape == (8, 3, 24, 24)
    for image, real, centre in zip(images, render(scenes), scenes.centre.tolist(), strict=True):
        for y in range(24):
            for x in range(24):
                inside = max(abs(x + 0.5 - centre[0]), abs(y + 0.5 - centre[1])) < 4.95  # the square's half side
                assert torch.equal(image[:, y, x], real[:, y, x]) == inside, (x, y)
    found = detectors.find(images, SUBJECTS["vool"])
    assert found.success.all()
    assert not found.bystander.any()
    assert not found.ground.any()
    judged = set(fine_tune_sets.prompts_of("vool", study.protocol())["subject"])
    if textures:
        assert set(captions) <= judged
        off = detectors.background_off(images, [f"blue square {' '.join(c.split()[1:])}" for c in captions])
        assert (off <= detectors.GROUND_SHARE).all()
    else:
        assert not set(captions) & judged


@pytest.mark.parametrize("name", ["control", *(pytest.param(name, marks=pytest.mark.slow) for name in proof.STUDIES)])
def test_every_variant_of_the_protocol_is_a_valid_run(name, tmp_path):
    rules = study.protocol()
    part = rules[name]
    variants = part.variants
    assert part.reference in variants
    found = study.jobs(rules, tmp_path, variants, rules.full_seeds)
    assert len(found) == len(variants) * 2 * 6
    assert len({(job.variant, job.subject, job.seed) for job in found}) == len(found)
    for job in found:
        assert not any("<" in setting for setting in job.settings)
        if job.seed == 0:
            settings = ["experiment=phantom_limb", f"data.cache_dir={job.cache}", *job.settings]
            check_config(fine_tune_sets.configured("train", settings))


def test_steps_of_the_protocol_are_equal_but_where_it_says_so(tmp_path):
    rules = study.protocol()
    steps = {job.variant: job.steps for job in study.jobs(rules, tmp_path, rules.main.variants, [0])}
    assert steps.pop("masked_longer") == round(1.4 * rules.steps)
    assert set(steps.values()) == {rules.steps}


@pytest.mark.slow
def test_sampling_is_the_same_in_any_batch_and_follows_the_noise(monkeypatch):
    architecture = toy(pretrained=str(study.BASE))
    model = architecture.load_transformer().eval()
    captions = [f"{c} circle on plain mint background" for c in ("red", "blue", "green")]
    noise = draw_noise(architecture, 3, 0)
    together = sample(architecture, model, captions, noise)
    monkeypatch.setattr("benchmarks.phantom_limb.sampling.BATCH", 1)
    assert torch.allclose(sample(architecture, model, captions, noise), together, atol=1e-4)
    assert not torch.allclose(sample(architecture, model, captions, draw_noise(architecture, 3, 1)), together, atol=0.1)


def test_a_grid_lays_images_out_by_rows():
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 2, 2) / 10
    sheet = grid(images, columns=3, scale=1)
    assert sheet.size == (12, 8)
    assert [sheet.getpixel((4 * (n % 3) + 1, 4 * (n // 3) + 1))[0] for n in range(6)] == [0, 26, 51, 76, 102, 128]
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.slow
def test_a_run_leaves_its_measures_once(tmp_path, rules, monkeypatch):
    monkeypatch.setattr(study, "protocol", lambda: rules)
    root = tmp_path / "data"
    fine_tune_sets.make_data(root / "zarp", "zarp", study.BASE, rules, rules.main.halo)
    job = study.jobs(rules, root, {"threshold_w1": rules.main.variants.threshold_w1}, [0])[0]
    job = dataclasses.replace(job, steps=2, settings=(*job.settings, "schedule=constant", "optimizer.lr=0.02"))
    file = study.run(job, study.BASE, root, tmp_path)
    kept = torch.load(tmp_path / "training" / "threshold_w1-zarp-0" / "kept.pt").float() / 255
    monkeypatch.setattr(demo, "protocol", lambda: rules)
    again = demo.adapted(tmp_path / "training" / "threshold_w1-zarp-0" / "lora.safetensors")  # by diffusers' loader
    assert (torch.cat([again["subject"], again["others"]]) - kept).abs().max() < 0.01
    assert (torch.cat(list(demo.adapted(None).values())) - kept).abs().max() > 0.2
    row = json.loads(file.read_text())
    assert {"variant", "subject", "seed", "steps", *proof.COLUMNS, *proof.ERRORS} <= set(row)
    words = ("variant", "subject", "made_from")
    assert all(isinstance(value, float | int) for key, value in row.items() if key not in words)
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("trained again"))
    assert study.run(job, study.BASE, root, tmp_path) == file
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        study.run(dataclasses.replace(job, steps=3), study.BASE, root, tmp_path)
    assert study._filled("a=<data>/x", {"<data>": "/d"}) == "a=/d/x"


def row(variant, seed, **values):
    filled = dict.fromkeys([*proof.COLUMNS, *proof.ERRORS], 1.0)
    return {"variant": variant, "subject": "zarp", "seed": seed, **filled, **values}


def test_tables_hold_mean_and_spread_by_variant():
    rows = [row("masked", 0, success=0.5), row("masked", 1, success=0.7), row("prior", 0, success=0.25)]
    lines = proof.table(rows, {"success": ("subject", 2), "seconds": ("s", 0)}).splitlines()
    assert lines == [
        "| variant | runs | subject | s |",
        "|---|---|---|---|",
        "| masked | 2 | 0.60±0.14 | 1 |",
        "| prior | 1 | 0.25 | 1 |",
    ]


def test_ratios_are_against_the_reference():
    rows = [
        row("base", 0),
        row("masked", 0, phantom=0.2, background=0.3, held_out_error=1.0, success=0.8),
        row("masked", 1, phantom=0.4, background=0.3, held_out_error=1.0, success=0.6),
        row("prior", 0, phantom=0.05, background=0.1, held_out_error=1.1, success=0.75, alone_error=0.5),
    ]
    (line,) = proof.against(rows, "masked").splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "prior", "6.0x", "3.0x", "1.0x", "1.0x", "+5.0", "+10.0 %", "+0.0 %", "-50.0 %",
    ]  # fmt: skip


def test_images_side_by_side_are_below_their_variant_and_beside_their_prompt():
    shades = {"base": 0.2, "masked": 0.4, "threshold_w1": 0.6}
    columns = {name: torch.full((2 * study.KEPT, 3, 24, 24), shade) for name, shade in shades.items()}
    prompts = {kind: [f"{kind} {number}" for number in range(study.KEPT)] for kind in ("subject", "others")}
    sheet = proof.side_by_side(columns, prompts)
    height, width = (sheet.height - proof.HEAD) // 6, (sheet.width - proof.MARGIN) // 3
    for row in range(6):
        y = proof.HEAD + row * height
        assert min(sheet.crop((0, y, proof.MARGIN, y + height)).convert("L").get_flattened_data()) < 64  # letters
        for column, shade in enumerate(shades.values()):
            x = proof.MARGIN + column * width
            assert sheet.getpixel((x + width // 2, y + height // 2)) == (round(shade * 255),) * 3
    changed = proof.side_by_side(columns, prompts | {"others": ["something else"] * study.KEPT})
    rows = {(box - proof.HEAD) // height for box in ImageChops.difference(sheet, changed).getbbox()[1::2]}
    assert rows == {4, 5}, "the last two rows are prompts without the trigger word"


def test_every_variant_has_a_plain_name_that_fits_above_its_images():
    rules = study.protocol()
    assert {variant for name in proof.STUDIES for variant in rules[name].variants} == set(proof.PLAIN_NAMES) - {"base"}
    assert all(set(rules[name].get("shown", ())) <= set(rules[name].variants) for name in proof.STUDIES)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for name in proof.PLAIN_NAMES.values():
        left, top, right, bottom = draw.textbbox(
            (0, 0), textwrap.fill(name, proof.LETTERS), ImageFont.load_default(proof.FONT)
        )
        assert right - left < 4 * (24 + 2), name
        assert bottom - top < proof.HEAD, name
