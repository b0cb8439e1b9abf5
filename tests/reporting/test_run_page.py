"""The page of a run: what it holds against the event files, across resumes, and in a browser."""

import itertools
import json
import random
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpp.reporting.run_page import flat, render_run, spread
from mpp.training.history import PAGE, Course, read_course
from mpp.training.metrics import Point
from tests.helpers import prepare, train
from tests.reporting.browsing import ARROW_LEFT, ARROW_RIGHT, HOSTILE, in_chromium

PROMPTS = "sampling.prompts=[a red box, a blue box at night]"
SMALL = [PROMPTS, "sampling.steps=2", "sampling.width=64", "sampling.height=64"]
SHOWN = "callbacks.page._target_=mpp.training.history.RunPage"  # which the tests' runs leave out
RUN = [
    *SMALL, SHOWN, "logger=tensorboard", "data.val_fraction=0.25", "trainer.val_check_interval=3",
    "callbacks.checkpoints.every_n_steps=3", "callbacks.samples.every_n_steps=3", "optimizer.lr=0.02",
]  # fmt: skip


def course(folder, points=(), validations=(), settings=None):
    """A run by hand."""
    return Course(
        folder=folder, status="running", step=points[-1].step if points else 0, total=None, seconds=5, points=points,
        validations=validations, prompts=(), settings=settings or {}, facts={"base": HOSTILE},
    )  # fmt: skip


def data_of(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


@pytest.mark.parametrize("seed", range(10))
def test_a_page_gives_back_the_course_that_it_was_made_of(tmp_path, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, 10_000), draw.randint(1, 60)))
    points, validations = (
        [Point(step, {name: draw.uniform(-5, 5) for name in draw.sample("abcd", draw.randint(1, 4))}) for step in steps]
        for _ in range(2)
    )
    (tmp_path / PAGE).write_text(render_run(course(tmp_path, points, validations)), encoding="utf-8")
    until = draw.choice([0, draw.randint(1, 10_000), 10_000])
    assert read_course(tmp_path / PAGE, until) == (
        [point for point in points if point.step <= until], [point for point in validations if point.step <= until]
    )  # fmt: skip


@pytest.mark.parametrize(
    "content", [None, "", "<html>", '<script type="application/json" id="data">{"points": 3}</script>']
)
def test_a_page_that_is_damaged_or_not_there_has_no_course(tmp_path, content):
    if content is not None:
        (tmp_path / PAGE).write_text(content)
    assert read_course(tmp_path / PAGE, 100) == ([], [])


def test_nothing_in_the_data_ends_its_element_or_is_no_json(tmp_path):
    points = [Point(1, {"train/loss": float("nan"), HOSTILE: 1.0})]
    page = render_run(course(tmp_path, points, settings={"a": {"b": HOSTILE, "c": None, "d": True, "e": {}}}))
    assert page.count("</script>") == 3
    (tmp_path / PAGE).write_text(page, encoding="utf-8")
    found = data_of(tmp_path / PAGE)
    assert found["points"] == [[1, {"train/loss": None, HOSTILE: 1.0}]]
    assert found["settings"] == [["a.b", HOSTILE], ["a.c", "null"], ["a.d", "true"], ["a.e", "{}"]]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_spread_holds_the_ends_and_keeps_the_order(seed):
    draw = random.Random(seed)
    rows, most = list(range(draw.randint(1, 3000))), draw.randint(2, 1000)
    found = spread(rows, most)
    assert len(found) == min(len(rows), most)
    assert (found[0], found[-1]) == (rows[0], rows[-1])
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_settings_are_named_as_they_are_typed():
    assert flat({"a": {"_target_": "x", "b": 1}, "c": [1, 2]}) == {"a._target_": "x", "a.b": "1", "c": "[1, 2]"}


@pytest.fixture(scope="module")
def ran(pipeline, tmp_path_factory):
    """A run that was stopped at its end and went on, with samples."""
    from tests.helpers import draw_photos

    root = tmp_path_factory.mktemp("run_page")
    draw_photos(root / "photos", root / "masks")
    prepare(pipeline, root, *SMALL)
    out = root / "a run"
    train(pipeline, root / "cache", out, *RUN, "trainer.max_steps=6")
    train(pipeline, root / "cache", out, *RUN, "trainer.max_steps=11", f"resume={out}")
    return out


@pytest.mark.slow
def test_the_page_holds_the_points_of_the_event_files_across_a_resume(ran):
    events = EventAccumulator(str(ran / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = data_of(ran / PAGE)
    assert (found["status"], found["step"], found["total"]) == ("finished", 11, 11)
    for kind, stage in (("points", "train"), ("validations", "val")):
        for name in ("loss", "target_loss", "prior_loss", "drift"):
            tag = f"{stage}/{name}"
            logged = {event.step + 1: event.value for event in events.Scalars(tag)}
            shown = {step: values[tag] for step, values in found[kind] if tag in values}
            first = shown.pop(0, None)  # the untrained adapter, which loggers have at their step 0
            assert stage == "train" or first is not None
            logged = {step: value for step, value in logged.items() if step in shown}
            assert shown == pytest.approx(logged, rel=1e-6)
    assert [step for step, _ in found["points"]] == list(range(1, 12))
    assert [step for step, _ in found["validations"]] == [0, 3, 6, 9]
    assert [[step for step, _ in sample["steps"]] for sample in found["samples"]] == [[0, 3, 6, 9, 11]] * 2
    assert all(sample["base"] is not None for sample in found["samples"])


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_page_of_what_was_before(pipeline, prepared, tmp_path, monkeypatch):
    from mpp.training.module import MaskedPriorModule

    good, calls = MaskedPriorModule.training_step, []

    def broken(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return good(self, batch, batch_idx)

    monkeypatch.setattr(MaskedPriorModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(pipeline, prepared, tmp_path, SHOWN)
    found = data_of(tmp_path / PAGE)
    assert (found["status"], found["step"], [step for step, _ in found["points"]]) == ("stopped", 3, [1, 2, 3])


@pytest.mark.slow
def test_a_page_that_cannot_be_written_does_not_end_the_run(pipeline, prepared, tmp_path, caplog):
    (tmp_path / PAGE).mkdir()
    trainer, _ = train(pipeline, prepared, tmp_path, SHOWN)
    assert trainer.global_step == 4
    assert "run.html could not be written, training goes on" in caplog.text


class TestInABrowser:
    """As its reader sees it."""

    pytestmark = in_chromium

    def test_it_opens_without_complaint_and_asks_for_nothing(self, browser, ran):
        browser.open(ran / PAGE)
        assert browser.complaints() == []
        assert browser.requests() == []
        assert browser.js("document.title") == "a run: mpp run"

    def test_numbers_read_off_the_page_are_those_of_the_event_files(self, browser, ran):
        events = EventAccumulator(str(ran / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        browser.open(ran / PAGE)
        browser.js("document.querySelectorAll('.plot details').forEach((one) => { one.open = true; })")
        browser.until("document.querySelector('.plot:nth-child(4) tbody tr') !== null")
        for place, name in ((1, "loss"), (2, "target_loss"), (3, "prior_loss"), (4, "drift")):
            cells = "[...row.cells].map((cell) => cell.textContent)"
            script = f"[...document.querySelectorAll(arguments[0])].map((row) => {cells})"
            rows = browser.js(script, f".plot:nth-child({place}) tbody tr")
            read = {int(step): value for step, value, _ in rows if value}
            logged = {event.step + 1: event.value for event in events.Scalars(f"train/{name}")}
            assert {step: float(value) for step, value in read.items()} == pytest.approx(logged, rel=1e-6)

    def test_arrow_keys_read_points_off_a_curve(self, browser, ran):
        found = data_of(ran / PAGE)["points"]
        browser.open(ran / PAGE)
        browser.js("document.querySelector('.plot svg').focus()")
        browser.press(ARROW_LEFT)
        assert browser.texts(".plot:first-child .at") == ["step 11"]
        for _ in range(3):
            browser.press(ARROW_LEFT)
        browser.press(ARROW_RIGHT)
        assert browser.texts(".plot:first-child .at") == ["step 9"]
        said = browser.texts(".plot:first-child .train")[0]
        assert float(said.split()[1]) == pytest.approx(dict(found)[9]["train/loss"], rel=1e-3)

    def test_the_edge_uncovers_the_base_and_the_slider_goes_through_the_steps(self, browser, ran):
        browser.open(ran / PAGE)
        prompts = browser.texts(".prompt blockquote")
        assert prompts == ["a red box", "a blue box at night"]
        set_to = (
            "(() => { const one = document.querySelectorAll(arguments[0])[0]; one.value = arguments[1]; "
            "one.dispatchEvent(new Event('input')); })()"
        )
        seen = []
        for place in range(5):
            browser.js(set_to, ".prompt input[aria-label='Step']", place)
            seen.append(
                (browser.texts("#step-0")[0], browser.js("document.querySelector('.compare img:nth-of-type(2)').src"))
            )
        assert [step for step, _ in seen] == [f"step {step}" for step in (0, 3, 6, 9, 11)]
        assert len({image for _, image in seen}) > 2
        browser.js(set_to, ".prompt input[aria-label='Base to LoRA']", 30)
        assert (
            browser.js("document.querySelector('.compare img:nth-of-type(2)').style.clipPath")
            == "inset(0px 0px 0px 30%)"
        )

    def test_it_fits_a_narrow_window(self, browser, ran):
        browser.open(ran / PAGE, size=(400, 800))
        assert browser.js("document.documentElement.scrollWidth") <= 400
