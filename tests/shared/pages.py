"""A report read back: its words, tags and figures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from photon.dashboard import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Parses strictly enough to find unbalanced tags, and collects what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.stack, self.tags, self.words, self.ids, self.refs = text, [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self._see(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._see(tag, attrs)

    def _see(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.refs.append(value)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def titles(self):
        return re.findall(r"<h3>([^<]+)</h3>", self.raw)


def read(path):
    return Page(path.read_text("utf-8"))


def report(folder, events, **options):
    return read(write_report(folder(events), **options))
