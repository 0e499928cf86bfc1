"""What a browser finds in a page: its elements and texts, and whether anything sticks out of it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """The elements of a page with their attributes, and its texts without the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.texts, self.styling = [], [], False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.styling = tag == "style"
        self.texts.append(" " if tag in ("p", "td") else "")

    def handle_data(self, data):
        if not self.styling:
            self.texts.append(data)

    def handle_endtag(self, tag):
        self.styling = False
        self.texts.append(" " if tag in ("th", "td", "p", "title", "summary") else "")

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [found[name] for _, found in self.elements if name in found]

    def assert_in_order(self) -> None:
        """Headings do not skip a level, ids are unique, links lead somewhere, pictures speak."""
        levels = [int(tag[1]) for tag, _ in self.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        ids = self.values("id")
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in self.values("href") if link.startswith("#")} <= set(ids)
        assert set(self.values("aria-labelledby")) <= set(ids)
        assert "width=device-width, initial-scale=1" in self.values("content")
        for tag, found in self.elements:
            assert tag != "img" or found["alt"]
            assert tag != "svg" or found["role"] == "img"
            assert tag != "th" or found["scope"] in ("row", "col")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def overflow(html: str, width: int, folder: Path) -> int:
    """By how many pixels a page is wider than a screen of that width, with all folds open."""
    inside = (
        html.replace("<details>", "<details open>").replace("&", "&amp;").replace('"', "&quot;")
    )
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{inside}"></iframe>'
        "<script>onload = () => { const page = frames[0].document.documentElement;"
        "document.title = `over ${page.scrollWidth - page.clientWidth}`; }</script>",
        encoding="utf-8",
    )
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
    profile = f"--user-data-dir={folder / 'profile'}"
    shown = subprocess.run(
        [CHROMIUM, *options.split(), profile, f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(re.search(r"<title>over (-?\d+)</title>", shown.stdout)[1])
