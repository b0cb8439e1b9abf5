"""Each finding has a case that shows it, and a set without faults has none."""

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save_file

from mpp.core.loss import MaskedPriorLoss
from mpp.media.geometry import check_aspect
from mpp.reporting.findings import find
from mpp.reporting.near_duplicates import near_duplicates
from mpp.reporting.rows import look_at
from tests.reporting.drawn import STRIDE, Drawn, disc, smooth

THRESHOLD = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1, normalization="per_sample")
CONTINUOUS = MaskedPriorLoss(prior_weight=1.0, normalization="per_sample")
PLAIN = MaskedPriorLoss()


def findings(drawn, loss=THRESHOLD, **notes):
    """By kind: severity, keys of the samples, and their notes."""
    cache = drawn.write(**notes)
    samples = [look_at(cache, entry, loss, cache.identity()) for entry in cache.entries()]
    found = {}
    for one in find(samples, loss, cache.notes()):
        said = {samples[n].entry.key: note for n, note in zip(one.samples, one.notes, strict=True)}
        found[one.kind] = (one.severity, said or list(one.lines))
    return found


@pytest.fixture
def drawn(tmp_path):
    """Two ordinary samples, to which each test adds what is wrong."""
    return Drawn(tmp_path).add("fine/a").add("fine/b", mask=disc(12, 20, 0.25, (0.4, 0.6)))


def only(found, kind, severity, keys):
    """That a set has this finding at these samples and no other; returns their notes."""
    assert list(found) == [kind]
    assert found[kind][0] == severity
    assert sorted(found[kind][1]) == sorted(keys)
    return found[kind][1]


def moving(count=5, size=(128, 128)):
    """Frames of a camera that goes over an image."""
    wide = smooth(7, size[0] * 3, size[1])
    return [wide.crop((n * size[0] // 3, 0, n * size[0] // 3 + size[0], size[1])) for n in range(count)]


# ---------------------------------------------------------------- a set without faults


@pytest.mark.parametrize("loss", [THRESHOLD, CONTINUOUS, PLAIN], ids=["threshold", "continuous", "plain"])
def test_a_clean_set_has_no_finding(drawn, loss):
    masks = torch.stack([disc(centre=(0.5, 0.3 + 0.1 * n)) for n in range(5)])
    drawn.add("clip@0", mask=masks, image=moving(), source="clip")
    drawn.add("tiers", mask=torch.maximum(disc(radius=0.15), 0.5 * disc(radius=0.4)))
    drawn.add("fine/a@flip", flip=True, image=ImageOps.mirror(smooth(1)))
    assert findings(drawn, loss) == {}


def test_layers_are_no_clip_and_a_background_layer_is_not_inverted(tmp_path):
    whole = torch.ones(16, 16)
    drawn = Drawn(tmp_path, layered=True).add("a", mask=torch.stack([whole, 1 - disc(), disc()]))
    assert findings(drawn) == {}


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("loss", [THRESHOLD, PLAIN], ids=["threshold", "plain"])
def test_a_missing_mask_among_masks(drawn, loss):
    drawn.add("bare", mask=None)
    only(findings(drawn, loss), "missing", "warning", ["bare"])


def test_no_masks_at_all_are_a_finding_only_with_a_prior(tmp_path):
    drawn = Drawn(tmp_path).add("a", mask=None).add("b", mask=None)
    only(findings(drawn), "missing", "warning", ["a", "b"])
    assert findings(drawn, PLAIN) == {}


@pytest.mark.parametrize("loss", [THRESHOLD, MaskedPriorLoss(mask_min_weight=0.05)], ids=["threshold", "floor"])
def test_an_empty_mask(drawn, loss):
    drawn.add("black", mask=torch.zeros(16, 16))
    only(findings(drawn, loss), "empty", "error", ["black"])


def test_a_full_mask(drawn):
    drawn.add("white", mask=torch.ones(16, 16))
    only(findings(drawn), "full", "warning", ["white"])


def test_an_inverted_mask_says_why(drawn):
    drawn.add("inverted", mask=1 - disc())
    note = only(findings(drawn), "inverted", "warning", ["inverted"])["inverted"]
    assert note.startswith("border 100% learned, centre ")


def test_an_inverted_portrait_that_the_frame_cuts_off_is_found_too(drawn):
    body = torch.zeros(16, 16)
    body[3:, 3:13] = 1
    only(findings(drawn.add("inverted", mask=1 - body)), "inverted", "warning", ["inverted"])
    assert list(findings(drawn.add("portrait", mask=body))) == ["inverted"]


@pytest.mark.parametrize(
    "mask",
    [
        1 - disc(radius=0.1, centre=(0.1, 0.1)),  # a watermark in the corner is left out
        torch.cat([torch.zeros(3, 16), torch.ones(13, 16)]),  # a body that fills the image below
    ],
    ids=["corner", "large subject"],
)
def test_a_mask_that_reaches_the_border_is_not_yet_inverted(drawn, mask):
    assert findings(drawn.add("odd", mask=mask)) == {}


@pytest.mark.parametrize(
    ("cells", "side", "wrong"), [(1.9, 16, True), (2.1, 16, False), (19.0, 64, True), (22.0, 64, False)]
)
def test_a_mask_is_tiny_below_two_cells_or_half_a_percent(drawn, cells, side, wrong):
    mask = torch.zeros(side, side)
    mask.view(-1)[: int(cells)] = 1
    mask[-1, -1] = cells - int(cells)
    found = findings(drawn.add("small", mask=mask))
    assert ("tiny" in found) == wrong
    if wrong:
        assert f"{cells:.1f} latent cells" in only(found, "tiny", "warning", ["small"])["small"]


def test_a_floor_of_the_loss_does_not_hide_a_tiny_mask(drawn):
    mask = torch.zeros(16, 16)
    mask[8, 8] = 1
    only(findings(drawn.add("small", mask=mask), MaskedPriorLoss(mask_min_weight=0.05)), "tiny", "warning", ["small"])


def test_a_floor_in_the_mask_empties_the_prior(drawn):
    drawn.add("grey", mask=0.2 + 0.8 * disc())
    note = only(findings(drawn), "above_threshold", "warning", ["grey"])["grey"]
    assert note == "lowest value 0.20"
    assert findings(drawn, CONTINUOUS) == {}


def test_a_faint_mask_empties_the_target(drawn):
    drawn.add("faint", mask=0.08 * disc())
    note = only(findings(drawn), "below_threshold", "error", ["faint"])["faint"]
    assert note == "highest value 0.08"
    assert findings(drawn, CONTINUOUS) == {}


def test_a_still_mask_on_a_moving_clip_is_a_hint(drawn):
    still = torch.stack([disc()] * 5)
    drawn.add("moves", mask=still, image=moving())
    drawn.add("stands", mask=still, image=[smooth(3)] * 5)
    drawn.add("fades", mask=still, image=[ImageEnhance.Brightness(smooth(4)).enhance(1 + n / 40) for n in range(5)])
    only(findings(drawn), "still_mask", "info", ["moves"])


def test_given_frames_do_not_make_a_mask_move(tmp_path):
    mask = torch.stack([torch.ones(16, 16), *[disc()] * 4])
    found = findings(Drawn(tmp_path, given=1).add("moves", mask=mask, image=moving()))
    only(found, "still_mask", "info", ["moves"])


def test_a_single_frame_that_learns_cannot_stand_still(tmp_path):
    drawn = Drawn(tmp_path, given=1).add("short", mask=torch.stack([disc()] * 2), image=moving(2))
    assert findings(drawn) == {}


# ---------------------------------------------------------------- files and captions


def test_a_damaged_mask_is_a_finding_and_no_crash(drawn):
    drawn.add("gone").add("cut").add("nan")
    save_file({"mask": torch.full((1, 1, 16, 16), float("nan"))}, drawn.cache.mask_path("nan"))
    drawn.cache.mask_path("gone").unlink()
    path = drawn.cache.mask_path("cut")
    path.write_bytes(path.read_bytes()[:-10])
    notes = only(findings(drawn), "unreadable", "error", ["gone", "cut", "nan"])
    assert "gone.safetensors is missing" in notes["gone"]
    assert "cut.safetensors is damaged or cut short" in notes["cut"]
    assert "NaN or infinity" in notes["nan"]


def test_a_clip_of_given_frames_alone_has_nothing_to_learn(tmp_path):
    drawn = Drawn(tmp_path, given=1).add("clip", mask=torch.stack([disc(), disc()])).add("still")
    notes = only(findings(drawn), "unreadable", "error", ["still"])
    assert notes["still"] == "all 1 latent frames are given to the model: nothing to learn"


def test_no_preview_and_a_damaged_one_are_hints(drawn):
    drawn.add("bare", image=None).add("cut")
    path = drawn.cache.preview_path("cut")
    path.write_bytes(path.read_bytes()[:200])
    only(findings(drawn), "no_preview", "info", ["bare", "cut"])


def test_a_sample_is_without_a_caption_where_all_its_captions_are_empty(drawn):
    drawn.add("silent", caption=" ").add("varied", caption="", variants=("a red box",))
    only(findings(drawn), "no_caption", "info", ["silent"])


def test_what_prepare_left_out_is_told_apart(drawn):
    with pytest.raises(ValueError, match="aspect") as error:
        check_aspect((40, 30), (30, 30), "p.png and m.png")
    found = findings(
        drawn,
        unused=("stray.png",),
        skipped=(str(error.value), "q.png: not a readable image", "v.mp4 claims a pixel aspect ratio of 9"),
    )
    assert list(found) == ["off_aspect", "skipped", "unused"]
    assert found["off_aspect"] == ("error", [str(error.value)])
    assert found["skipped"][1] == ["q.png: not a readable image", "v.mp4 claims a pixel aspect ratio of 9"]
    assert found["unused"] == ("warning", ["stray.png"])


def test_the_losss_own_advice_is_passed_on(drawn):
    loss = MaskedPriorLoss(prior_weight=1.0, mask_min_weight=0.1, normalization="per_sample")
    severity, lines = findings(drawn, loss)["settings"]
    assert severity == "warning"
    assert lines == loss.advice()


# ---------------------------------------------------------------- near duplicates


def test_near_duplicates_name_each_other_and_say_where_validation_is_touched(drawn):
    photo = smooth(50)
    smaller = photo.resize((96, 96)).resize((128, 128))
    drawn.add("photo", image=photo).add("again", image=ImageEnhance.Brightness(smaller).enhance(1.05))
    drawn.add("@val/photo", image=smaller, split="val")
    notes = only(findings(drawn), "duplicate", "warning", ["photo", "again", "@val/photo"])
    assert notes["photo"] == "like again, @val/photo (in validation)"
    assert notes["@val/photo"] == "like again (in training), photo (in training)"


def test_of_many_duplicates_a_few_are_named_and_the_rest_counted(drawn):
    keys = [f"copy{number}" for number in range(8)]
    for key in keys:
        drawn.add(key, image=smooth(52))
    drawn.add("other@flip", image=smooth(53), flip=True)
    notes = only(findings(drawn), "duplicate", "warning", keys)
    assert notes["copy0"] == "like copy1, copy2, copy3, copy4, copy5, and 2 more"


def test_a_chain_of_small_changes_is_one_group(drawn):
    steps = [Image.blend(smooth(54), smooth(55), number / 12) for number in range(13)]
    for number in (6, 0, 12, 3, 9, 1, 11, 2, 10, 4, 8, 5, 7):  # ends meet in the middle, and last
        drawn.add(f"step{number:02}", image=steps[number])
    samples = [look_at(drawn.cache, entry, THRESHOLD, drawn.cache.identity()) for entry in drawn.entries]
    prints, origins = [s.print for s in samples], [s.entry.origin for s in samples]
    assert near_duplicates(prints, origins) == [list(range(2, 15))]
    assert near_duplicates([prints[3], prints[4]], ["first", "last"]) == []


def test_clips_of_one_video_and_mirrors_are_no_duplicates_of_each_other(drawn):
    photo = smooth(51)
    masks = torch.stack([disc(radius=0.2 + 0.02 * n) for n in range(3)])
    for start in (0, 9):
        drawn.add(f"video@{start}", mask=masks, image=[photo] * 3, source="video")
    drawn.add("p", image=photo.rotate(90)).add("p@flip", image=photo.rotate(90), flip=True)
    assert findings(drawn) == {}


def test_other_images_in_the_same_colours_and_flat_ones_are_no_duplicates(drawn):
    for number in range(3):
        flat = Image.new("RGB", (128, 128), (200, 200, 200 + number))
        drawn.add(f"flat{number}", image=flat)
        drawn.add(f"photo{number}", image=smooth(60).transpose(Image.Transpose(number)))
    assert findings(drawn) == {}


def test_the_same_drawing_in_another_colour_is_no_duplicate(drawn):
    grey = smooth(70).convert("L")
    dim = grey.point(lambda value: value // 2)
    drawn.add("red", image=Image.merge("RGB", (grey, dim, dim)))
    drawn.add("blue", image=Image.merge("RGB", (dim, dim, grey)))
    assert findings(drawn) == {}


def test_findings_come_worst_first(drawn):
    drawn.add("a", caption="").add("b", mask=torch.zeros(16, 16)).add("c", mask=None)
    assert list(findings(drawn)) == ["empty", "missing", "no_caption"]


def test_a_bucket_says_pixels_frames_and_layers(tmp_path):
    clips = Drawn(tmp_path / "clips").add("a", mask=disc(10, 20)).add("b", mask=torch.stack([disc()] * 3))
    layers = Drawn(tmp_path / "layers", layered=True).add("c", mask=torch.stack([disc()] * 3))
    found = [
        look_at(drawn.cache, entry, THRESHOLD, drawn.cache.identity()).bucket
        for drawn in (clips, layers)
        for entry in drawn.entries
    ]
    assert found == [f"{20 * STRIDE}x{10 * STRIDE}", "128x128, 9 frames", "128x128, 2 layers"]
