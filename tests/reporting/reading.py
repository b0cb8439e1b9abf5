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
    """A report's data, images and masks."""

    def __init__(self, path):
        parser = _Scripts()
        parser.feed(path.read_text("utf-8"))
        self.parts, self.tags = parser.found, parser.tags
        self.data = json.loads(self.parts["data"])
        self.images = self.parts.get("images", "").split("\n")
        self.masks = self.parts.get("masks", "").split("\n")

    def sample(self, key):
        """A sample's row."""
        return next(sample for sample in self.data["samples"] if sample["key"] == key)

    def mask_of(self, key):
        """Raw masks of the frames that it holds, float32 `(frames, h, w)`."""
        sample = self.sample(key)
        content = zlib.decompress(base64.b64decode(self.masks[sample["raw"]]))
        planes = np.frombuffer(content, np.uint8).reshape(4, -1)
        found = b"".join(bytes(number) for number in planes.T)
        return np.frombuffer(found, "<f4").reshape(len(sample["held"]), *sample["cells"])

    def image(self, key, view=0):
        """Bytes of a view's JPEG."""
        return base64.b64decode(self.images[self.sample(key)["views"][view]["image"]])

    def chart(self, name):
        """A chart by name."""
        return next(chart for chart in self.data["charts"] if chart["name"] == name)
