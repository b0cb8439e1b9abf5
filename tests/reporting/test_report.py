"""The file that the command writes."""

import base64
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mpp.report
import mpp.reporting.page
from mpp.core.loss import MaskedPriorLoss
from mpp.media import region_colours
from mpp.reporting.output import Report
from mpp.reporting.page import image_side
from tests.helpers import config
from tests.reporting.drawn import Drawn, disc, smooth
from tests.reporting.reading import Page

REPOSITORY = Path(__file__).parents[2]
THRESHOLD = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1, normalization="per_sample")
CONTINUOUS = MaskedPriorLoss(prior_weight=1.0, mask_gamma=0.7, normalization="per_sample")


def report(drawn, loss=THRESHOLD, *, notes=None, **settings):
    """The page of a drawn cache."""
    cache = drawn.write(**(notes or {}))
    path, _ = Report(str(cache.folder), **settings).run(loss)
    return Page(path)


@pytest.fixture
def drawn(tmp_path):
    return Drawn(tmp_path / "cache")


# ---------------------------------------------------------------- what it holds


@pytest.mark.parametrize("seed", range(4))
def test_the_page_holds_raw_masks_to_the_bit(drawn, seed):
    mask = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1
    page = report(drawn.add("a", mask=mask, image=None))
    assert (page.sample("a")["held"], page.sample("a")["whole"]) == ([0, 1, 2], True)
    np.testing.assert_array_equal(page.mask_of("a"), mask.clamp(0, 1).numpy())


def test_of_clips_whose_masks_would_make_the_page_too_large_the_key_frames_are_there(drawn, monkeypatch):
    masks = torch.rand(30, 8, 8, generator=torch.Generator().manual_seed(0))
    for key in "abc":
        drawn.add(key, mask=masks, image=None)
    drawn.add("image", mask=masks[0], image=None)
    size = len(base64.b64encode(mpp.reporting.page.pack_floats(masks.numpy())))
    monkeypatch.setattr("mpp.reporting.page._MASKS", 1.5 * size)
    page = report(drawn)
    assert [page.sample(key)["whole"] for key in ("a", "b", "c", "image")] == [True, False, False, True]
    views = [view["frame"] for view in page.sample("b")["views"]]
    assert page.sample("b")["held"] == views
    np.testing.assert_array_equal(page.mask_of("b"), masks[views].numpy())
    assert page.data["coverage"]["learn"] > 0  # measured on all frames all the same


def test_a_clip_shows_its_key_frames_without_a_mask_for_those_that_are_given(tmp_path):
    drawn = Drawn(tmp_path / "cache", given=1)
    masks = torch.stack([torch.full((4, 6), n / 16) for n in range(17)])
    images = [Image.new("RGB", (48, 32), (15 * n, 0, 0)) for n in range(17)]
    page = report(drawn.add("clip", mask=masks, image=images))
    views = page.sample("clip")["views"]
    assert [view["frame"] for view in views] == [0, 2, 5, 7, 9, 11, 14, 16]
    assert [view["given"] for view in views] == [True] + [False] * 7
    assert page.sample("clip")["held"] == list(range(1, 17))
    assert page.mask_of("clip")[:, 0, 0].tolist() == [n / 16 for n in range(1, 17)]
    reds = [np.asarray(Image.open(io.BytesIO(page.image("clip", n))))[..., 0].mean() for n in range(8)]
    assert reds == pytest.approx([15 * view["frame"] for view in views], abs=4)
    frames = page.sample("clip")["frames"]
    assert len(frames) == 16
    assert frames[0] == [0.0, 1.0]  # 1/16 is below the threshold
    assert frames[-1] == [1.0, 0.0]


def test_each_layer_is_a_view_of_its_own(tmp_path):
    drawn = Drawn(tmp_path / "cache", layered=True)
    masks = torch.stack([torch.full((4, 4), value) for value in (1.0, 0.25, 0.75)])
    page = report(drawn.add("a", mask=masks, image=[smooth(n, 32, 32) for n in range(3)]))
    assert [view["name"] for view in page.sample("a")["views"]] == ["whole", "layer 0", "layer 1"]
    assert page.mask_of("a")[:, 0, 0].tolist() == [1, 0.25, 0.75]
    assert len({page.image("a", n) for n in range(3)}) == 3


def test_without_a_preview_the_mask_is_there_all_the_same(drawn):
    page = report(drawn.add("a", image=None))
    assert page.sample("a")["views"] == [{"name": "", "frame": 0, "given": False, "image": None}]
    assert page.mask_of("a").shape == (1, 16, 16)


def test_a_sample_that_cannot_be_read_is_shown_with_the_reason(drawn):
    drawn.add("a").add("b")
    drawn.cache.mask_path("b").unlink()
    page = report(drawn)
    row = page.sample("b")
    assert (row["raw"], row["learn"], row["bins"]["learn"]) == (None, None, None)
    assert "is missing" in row["problem"]
    assert page.data["coverage"]["learn"] == pytest.approx(page.sample("a")["learn"])


def test_totals_speak_of_training_samples_by_their_visits(drawn):
    half = torch.cat([torch.ones(2, 4), torch.zeros(2, 4)])
    drawn.add("a", mask=half, repeats=3).add("b", mask=torch.ones(4, 4)).add("@val/c", mask=half * 0, split="val")
    data = report(drawn).data
    assert data["coverage"] == pytest.approx({"learn": 5 / 8, "preserve": 3 / 8})
    assert data["teacher"]["share"] == pytest.approx(3 / 4)
    assert data["splits"] == {"train": 2, "val": 1}
    assert data["masks"] == {"folder": 3}
    # one forward on top of a step of 4.5 and of 3 forwards, and of 3.5 and of 2
    assert data["teacher"]["costs"]["checkpointed"] == pytest.approx([1 + 1 / 4.5, 1 + 1 / 3])
    assert data["teacher"]["costs"]["kept"] == pytest.approx([1 + 1 / 3.5, 1 + 1 / 2])


def test_without_a_prior_the_teacher_costs_nothing(drawn):
    data = report(drawn.add("a"), MaskedPriorLoss()).data
    assert data["teacher"]["share"] == 0.0
    assert data["loss"]["mode"] == "masked training without a prior"


def test_histograms_count_every_sample_once_and_cells_by_their_value(drawn):
    def area(share):
        mask = torch.zeros(10, 10)
        mask.view(-1)[: round(100 * share)] = 1
        return mask

    shares = [0, 0.05, 0.1, 0.34, 0.35, 0.99, 1]
    for number, share in enumerate(shares):
        drawn.add(f"s{number}", mask=area(share))
    drawn.add("wide", mask=torch.full((4, 8), 0.52))
    page = report(drawn)
    learn = dict(zip(page.chart("learn")["labels"], page.chart("learn")["counts"], strict=True))
    want = {"nothing": 1, "0 to 10 %": 1, "10 to 20 %": 1, "30 to 40 %": 2, "50 to 60 %": 1, "90 to 100 %": 1}
    assert {label: count for label, count in learn.items() if count} == want | {"all of it": 1}
    values = dict(zip(page.chart("values")["labels"], page.chart("values")["counts"], strict=True))
    white = sum(shares) / 8
    assert values["white"] == pytest.approx(white)
    assert values["black"] == pytest.approx((7 - sum(shares)) / 8)
    assert values["0.50 to 0.55"] == pytest.approx(1 / 8)
    assert page.sample("wide")["bins"]["values"] == [page.chart("values")["labels"].index("0.50 to 0.55")]
    assert (page.chart("bucket")["labels"], page.chart("bucket")["counts"]) == (["80x80", "64x32"], [7, 1])


def test_findings_point_at_their_samples(drawn):
    page = report(drawn.add("a").add("b", mask=None, caption=""), notes={"unused": ["stray.png"]})
    kinds = [finding["kind"] for finding in page.data["findings"]]
    assert kinds == ["unused", "missing", "no_caption"]
    assert [kinds[position] for position, *_ in page.sample("b")["findings"]] == ["missing", "no_caption"]
    assert page.sample("a")["findings"] == []
    assert page.data["findings"][0]["lines"] == ["stray.png"]


# ---------------------------------------------------------------- large sets


def test_images_shrink_as_they_become_many():
    assert image_side(0) == image_side(12) == 512
    assert image_side(1000) == pytest.approx(245, abs=1)  # 60 million pixels in all
    assert image_side(10**6) == 112


def test_above_the_limit_findings_and_an_even_spread_are_shown_and_everything_is_counted(drawn):
    for number in range(60):
        drawn.add(f"s{number:02}", mask=torch.zeros(4, 4) if number in (7, 8) else None if number < 40 else disc(4, 4))
    page = report(drawn, limit=20)
    keys = [sample["key"] for sample in page.data["samples"]]
    assert len(keys) == 20
    assert keys == sorted(keys)
    assert {"s07", "s08"} <= set(keys)
    assert len([key for key in keys if key >= "s40"]) >= 4  # a third of the set, a third of what findings leave
    assert (page.data["total"], page.data["scanned"]) == (60, 60)
    assert sum(page.chart("bucket")["counts"]) == 60
    missing = next(finding for finding in page.data["findings"] if finding["kind"] == "missing")
    assert missing["count"] == 38
    assert missing["hidden"] == 38 - len([key for key in keys if key < "s40" and key not in ("s07", "s08")])


def test_of_a_huge_set_an_even_spread_is_measured(drawn):
    for number in range(30):
        drawn.add(f"s{number:02}", cells=(4, 4), mask=None, image=None)
    page = report(drawn, scanned=10)
    assert [sample["key"] for sample in page.data["samples"]] == [f"s{3 * n:02}" for n in range(10)]
    assert (page.data["total"], page.data["scanned"]) == (30, 10)


def test_of_very_many_reasons_the_first_are_shown(drawn):
    page = report(drawn.add("a"), notes={"unused": [f"m{n}.png" for n in range(600)]})
    (finding,) = page.data["findings"]
    assert finding["count"] == 600
    assert finding["lines"] == [*(f"m{n}.png" for n in range(500)), "and 100 more"]


# ---------------------------------------------------------------- the file


def test_nothing_in_a_caption_or_name_ends_the_data(drawn):
    caption = "</script><img src=x onerror=alert(1)><!-- <script> \u2028 & \" ' $data ${style}"
    key = "a <b>&'\"$x"
    page = report(drawn.add(key, caption=caption), notes={"unused": ["</script><b>.png"]})
    assert page.sample(key)["caption"] == caption
    assert page.data["findings"][0]["lines"] == ["</script><b>.png"]
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not {"img", "b"} & {tag for tag, _ in page.tags}


def test_the_page_has_the_colours_of_every_other_image_of_regions(drawn):
    page = report(drawn.add("a"))
    assert page.data["colours"]["learned"] == list(region_colours.LEARNED)
    assert page.data["colours"]["preserved"] == list(region_colours.PRESERVED)
    for name, colour in (("learn", region_colours.LEARNED), ("keep", region_colours.PRESERVED)):
        assert f"--{name}: rgb{colour};" in page.parts["style"]


def test_the_page_may_load_nothing_and_run_nothing_but_itself(drawn):
    page = report(drawn.add("a"))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for part in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.parts[part].encode()).digest()).decode()
        assert rules[f"{part}-src"] == f"'sha256-{digest}'"
    loading = [a for _, a in page.tags if "src" in a or a.get("href", "#")[:1] not in ("#", "d")]
    assert loading == []
    assert not any(name == "style" or name.startswith("on") for _, a in page.tags for name in a)


def test_the_page_lies_beside_the_cache_and_replaces_an_older_report_only(drawn, tmp_path):
    cache = drawn.add("a").write()
    path, _ = Report(str(cache.folder)).run(THRESHOLD)
    assert path == tmp_path / "cache_report.html"
    before = path.read_text()
    Report(str(cache.folder)).run(CONTINUOUS)
    assert path.read_text() != before
    path.write_text("<!doctype html><p>my page")
    with pytest.raises(ValueError, match=r"cache_report.html is there already and is no report of mpp; choose another"):
        Report(str(cache.folder)).run(THRESHOLD)
    assert path.read_text() == "<!doctype html><p>my page"


def test_a_folder_is_no_path_for_the_page(drawn, tmp_path):
    folder = tmp_path / "x.html"
    folder.mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file"):
        report(drawn.add("a"), output=str(folder))


def test_a_page_that_cannot_be_written_leaves_the_older_one(drawn, tmp_path, monkeypatch):
    cache = drawn.add("a").write()
    path, _ = Report(str(cache.folder)).run(THRESHOLD)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="no space left"):
        Report(str(cache.folder)).run(CONTINUOUS)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.name != "cache"] == ["cache_report.html"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit and scanned must be at least 1, got 0 and 20000"),
        ({"scanned": 0}, "got 2000 and 0"),
        ({"output": "page.pdf"}, r"output=page.pdf must end in .html"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Report("cache", **settings)


def test_a_cache_that_is_not_there_or_empty_is_said(drawn, tmp_path):
    with pytest.raises(ValueError, match="no cache at"):
        Report(str(tmp_path / "none")).run(THRESHOLD)
    with pytest.raises(ValueError, match="is not finished"):
        Report(str(drawn.cache.folder)).run(THRESHOLD)
    drawn.write()
    with pytest.raises(ValueError, match="holds no samples"):
        Report(str(drawn.cache.folder)).run(THRESHOLD)


# ---------------------------------------------------------------- the command


def test_a_prepared_cache_is_reported_as_configured(prepared, tmp_path, capsys):
    out = tmp_path / "page.html"
    cfg = config("report", [f"data.cache_dir={prepared}", "loss=continuous", f"output={out}", "limit=5"])
    assert mpp.report.run(cfg) == out
    page = Page(out)
    assert page.data["loss"]["settings"]["mask_gamma"] == 0.7
    assert len(page.data["samples"]) == 5
    assert page.data["total"] == 8
    said = capsys.readouterr().out
    assert "warning: No mask: 2" in said
    assert f"wrote {out}" in said


@pytest.mark.slow
def test_the_command_names_the_preset_and_bad_input_in_one_message(drawn, tmp_path):
    drawn.add("a").write()

    def command(*arguments):
        words = [sys.executable, "-m", "mpp.report", *arguments]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    good = command("data.cache_dir=cache", "loss=binary", "loss.mask_gamma=0.6", "output=here.html")
    assert good.returncode == 0, good.stderr
    loss = Page(tmp_path / "here.html").data["loss"]
    assert (loss["name"], loss["preset"]["name"], loss["settings"]["mask_gamma"]) == ("binary", "binary", 0.6)
    assert (loss["preset"]["settings"]["mask_gamma"], loss["preset"]["settings"]["prior_weight"]) == (1.0, 1.0)
    bad = command("data.cache_dir=cache", "limit=many")
    assert bad.returncode == 1
    assert "report.limit should be a valid integer" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_a_wheel_carries_the_page_and_the_weights_of_the_mask_tool(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    parts = (REPOSITORY / "src" / "mpp" / "reporting" / "page").iterdir()
    assert {f"mpp/reporting/page/{part.name}" for part in parts} <= names
    assert {"mpp/configs/report.yaml", "mpp/masking/u2netp.safetensors", "mpp/masking/u2netp.NOTICE"} <= names
