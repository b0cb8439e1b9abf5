"""A headless Chromium that looks at a report."""

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.core.loss import MaskedPriorLoss

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
    ),
]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
]
WAIT = 8.0
THRESHOLD = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1, normalization="per_sample")
CONTINUOUS = MaskedPriorLoss(prior_weight=1.0, mask_gamma=0.7, normalization="per_sample")
LEARN, KEEP, HATCHING, GREY = (213, 94, 0), (0, 114, 178), (150, 205, 245), 128
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> <b>bold</b> & 'quotes'"
TIERS = torch.tensor([[1.0, 0.5, 0.05], [0.31, 0.0, 0.8]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
ARROW_RIGHT, ARROW_LEFT, ARROW_DOWN, ENTER, ESCAPE, END = "\ue014", "\ue012", "\ue015", "\ue007", "\ue00c", "\ue010"
ALL = ["@val/v", "bare", "black", "blind", "clip@0", "hostile", "p1", "p2", "p10", "tiers"]


class Browser:
    """Chromium on a fresh profile, and what tests ask of it."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(service=Service(DRIVER), options=options)
        self.path = None

    def open(self, path, address="", *, size=(1280, 900), features=()):
        """A report at a window size, with emulated media features as (name, value); waits until it is drawn."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": name, "value": value} for name, value in features]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.path = path
        self.driver.get(f"{path.as_uri()}#{address}" if address else path.as_uri())
        self.until("document.documentElement.dataset.ready === '1'")
        return self

    def js(self, script, *arguments):
        """The value of an expression in the page."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def until(self, script, *arguments):
        """Wait for an expression to be true."""
        end = time.monotonic() + WAIT
        while not self.js(script, *arguments):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def find(self, css):
        """One element."""
        return self.driver.find_element("css selector", css)

    def click(self, css):
        """Click an element where a mouse would."""
        element = self.find(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys):
        """Keys into whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, css):
        """Move the mouse onto an element."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(self.find(css)).perform()

    def select(self, name, value):
        """Choose an option; the control has the focus afterwards."""
        from selenium.webdriver.support.select import Select

        Select(self.find(f"#{name}")).select_by_value(value)
        self.js("arguments[0].focus()", self.find(f"#{name}"))

    def shown(self):
        """Names of the samples on the grid, in order."""
        return self.js("[...document.querySelectorAll('.card')].map((card) => card.dataset.key)")

    def texts(self, css):
        """Visible texts of elements."""
        return [element.text for element in self.driver.find_elements("css selector", css)]

    def screenshot(self, path=None):
        """The window as pixels `(height, width, 3)`; also saved where a path is given."""
        content = self.driver.get_screenshot_as_png()
        if path is not None:
            path.write_bytes(content)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def complaints(self):
        """What the console holds since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that the page asked for since it was opened, those within itself left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        own = self.path.as_uri()
        return [url for url in urls if url.split("#")[0] != own and not url.startswith("data:")]


def cells_of(browser, css, cells=None):
    """A canvas as `(h, w, 4)`; with a number of rows and columns the middle of each cell."""
    browser.until(f'document.querySelector("{css}").width > 0 && !document.querySelector("{css}").hidden')
    script = (
        f'(() => {{ const c = document.querySelector("{css}"); return [c.height, c.width, '
        "...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    height, width, *values = browser.js(script)
    found = np.array(values).reshape(height, width, 4)
    if cells is None:
        return found
    down, across = (
        ((np.arange(count) + 0.5) * size / count).astype(int)
        for count, size in zip(cells, found.shape[:2], strict=True)
    )
    return found[np.ix_(down, across)]


def off_colour(got, colours):
    """How far pixels `(..., 3)` are from the nearest of some colours, at most."""
    return np.min([np.abs(got - colour).max(-1) for colour in colours], axis=0).max()
