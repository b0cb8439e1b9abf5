"""One browser and the pages it looks at."""

import pytest
import torch
from PIL import Image

from mpp.reporting.output import Report
from tests.reporting.browsing import CONTINUOUS, GREY, HOSTILE, THRESHOLD, TIERS, Browser
from tests.reporting.drawn import Drawn, disc, smooth


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """Images with and without faults, a clip, and a caption that tries to break out."""
    drawn = Drawn(tmp_path_factory.mktemp("page") / "mychar")
    drawn.add("p1", mask=disc(radius=0.2), caption="a cat by the sea")
    drawn.add("p2", mask=disc(radius=0.4), caption="a dog by the sea", kind="masklabel")
    drawn.add("p10", mask=disc(12, 20, 0.3), caption="a cat at home")
    drawn.add("tiers", mask=TIERS, image=Image.new("RGB", (48, 32), (GREY,) * 3), caption="tiers")
    drawn.add("bare", mask=None, caption="no mask here")
    drawn.add("black", mask=torch.zeros(16, 16), caption="an empty mask")
    drawn.add("hostile", caption=HOSTILE)
    drawn.add("blind", image=None, caption="without preview")
    greys = [Image.new("RGB", (128, 64), (40 * n, 40 * n, 40 * n)) for n in range(6)]
    masks = torch.stack([disc(8, 16, 0.3, (0.5, 0.2 + 0.1 * n)) for n in range(6)])
    drawn.add("clip@0", mask=masks, image=greys, caption="a clip", source="clip")
    drawn.add("@val/v", split="val", caption="for validation")
    drawn.write(unused=("stray.png",))
    return Report(str(drawn.cache.folder)).run(THRESHOLD, ("threshold", THRESHOLD))[0]


@pytest.fixture(scope="session")
def layers(tmp_path_factory):
    drawn = Drawn(tmp_path_factory.mktemp("layers") / "layered", layered=True)
    for number in range(2):
        masks = torch.stack([torch.ones(8, 8), 1 - disc(8, 8), disc(8, 8)])
        drawn.add(f"l{number}", mask=masks, image=[smooth(10 * number + n, 64, 64) for n in range(3)])
    drawn.write()
    return Report(str(drawn.cache.folder)).run(CONTINUOUS)[0]


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    drawn = Drawn(tmp_path_factory.mktemp("many") / "many")
    for number in range(250):
        mask = disc(4, 4, 0.1 + number / 600)
        drawn.add(f"s{number:03}", mask=mask, image=Image.new("RGB", (32, 32), (number % 256, 90, 200)))
    drawn.write()
    return Report(str(drawn.cache.folder)).run(THRESHOLD)[0]
