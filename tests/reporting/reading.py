"""What a page holds, read as a browser would."""

import base64
import json
import zlib
from html.parser import HTMLParser

import numpy as np


class _Scripts(HTMLParser):
    """Contents of elements by id, and of those without one by tag."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self._open = {}, [], None

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._open = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data):
        if self._open:
            self.found[self._open] = self.found.get(self._open, "") + data


class Page:
    """A report's data, images and weights."""

    def __init__(self, path):
        parser = _Scripts()
        parser.feed(path.read_text("utf-8"))
        self.parts, self.tags = parser.found, parser.tags
        self.data = json.loads(self.parts["data"])
        self.images = self.parts.get("images", "").split("\n")
        self.weights = self.parts.get("weights", "").split("\n")

    def sample(self, key):
        """A sample's row."""
        return next(sample for sample in self.data["samples"] if sample["key"] == key)

    def weights_of(self, key):
        """Bytes `(3, views, h, w)`: raw mask, target, prior."""
        sample = self.sample(key)
        content = zlib.decompress(base64.b64decode(self.weights[sample["weights"]]))
        return np.frombuffer(content, np.uint8).reshape(3, -1, *sample["cells"])

    def image(self, key, view=0):
        """Bytes of a view's JPEG."""
        return base64.b64decode(self.images[self.sample(key)["views"][view]["image"]])

    def chart(self, name):
        """A chart by name."""
        return next(chart for chart in self.data["charts"] if chart["name"] == name)
