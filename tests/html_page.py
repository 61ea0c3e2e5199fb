"""Reads a page of HTML for tests."""

import base64
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a test asks of a page: its tags, its tables as text, and all visible words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.words = [], [], ""
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        self.words += data
        if self._cell is not None:
            self._cell += data

    def row(self, name):
        return next(r[1:] for r in self.rows if r and r[0] == name)

    def all(self, tag):
        return [attrs for t, attrs in self.tags if t == tag]


def assert_self_contained(text):
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") for name in attrs), attrs
        for name in ("src", "srcset", "data", "action", "poster", "background"):
            assert attrs.get(name, "data:").startswith("data:"), attrs
        assert tag == "a" or "href" not in attrs
    for attrs in page.all("a"):
        assert re.match(r"https://(huggingface\.co|arxiv\.org)/", attrs["href"])
    assert "@import" not in text
    assert "url(" not in text
    for attrs in page.all("img"):
        assert len(attrs["alt"]) > 20
        svg = base64.b64decode(attrs["src"].removeprefix("data:image/svg+xml;base64,")).decode()
        assert "</svg>" in svg
        assert "<script" not in svg
        assert not re.findall(r'(?:href|src)="(?!#|data:)[^"]*"', svg)
        assert "<text" not in svg  # letters are outlines: no font is asked for
    return page
