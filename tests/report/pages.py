"""A page as tests read it: its text, its elements, and the tables that it offers as CSV."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from grafting.runs.record import write_report

# elements without an end
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """A page's text by section, and whether its elements are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script = data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes.get(name) or "" for found, attributes in self.tags if found == tag]


def page_of(folder: Path) -> Page:
    """A run's report."""
    return whole_page(write_report(folder))


def whole_page(path: Path) -> Page:
    """A page whose elements are all closed."""
    page = Page(path.read_text())
    assert page.open == []
    return page


def tables_of(page: Page) -> dict[str, list[list[str]]]:
    """The tables that the page offers as CSV, by what they hold."""
    prefix = "data:text/csv;charset=utf-8,"
    links = [a for tag, a in page.tags if tag == "a"]
    assert all(a["href"].startswith(prefix) for a in links)
    return {
        a["download"].rsplit("-", 1)[1]: list(csv.reader(io.StringIO(unquote(a["href"][len(prefix) :]))))
        for a in links
    }
