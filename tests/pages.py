# SPDX-License-Identifier: Apache-2.0
"""What tests of reports share: hostile names, a page taken apart, and a browser of the size of a telephone."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = [
    "<script>alert(1)</script>.jpg",
    "\"><img src=x onerror=alert(1)>'.jpg",
    "not-utf8-\udcff\udc80.jpg",
    "{{ 7 * 7 }}{% include 'x' %}.jpg",
    "line\nbreak \x1b[31m \u202egpj.exe",
    "</code></pre></style><svg onload=alert(1)>",
]
# All that a report may be made of.
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3", "p",
    "small", "dl", "div", "dt", "dd", "ul", "li", "figure", "figcaption", "b", "i", "u", "span", "svg", "path", "img",
    "hr", "table", "thead", "tbody", "tr", "th", "td", "pre", "code",
}  # fmt: skip


class Page(HTMLParser):
    """Every element, attribute and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def images(self) -> list[bytes]:
        """The content of every picture."""
        return [base64.b64decode(value.partition(",")[2]) for name, value in self.attributes if name == "src"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(folder: Path, width: int, height: int, *arguments: str) -> str:
    """A page with the report in a frame of the given width, because a window cannot be as narrow as a telephone."""
    (folder / "frame.html").write_text(
        f"""<!doctype html><meta name="color-scheme" content="light dark"><style>body {{ margin: 0 }}
        iframe {{ border: 0; width: {width}px; height: {height}px }}</style><iframe src="page.html"></iframe><p></p>
        <script>onload = () => {{
          const view = document.querySelector("iframe").contentDocument.documentElement
          const wide = [...view.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg"))
            .filter(e => e.getBoundingClientRect().right > view.clientWidth + 1).map(e => e.tagName + "." + e.className)
          document.querySelector("p").textContent = JSON.stringify([view.clientWidth, view.scrollWidth, wide])
        }}</script>""",
        encoding="utf-8",
    )
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-quic", "--no-first-run",
        "--disable-sync", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
        "--allow-file-access-from-files",
    ]  # fmt: skip
    place = [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},{height}"]
    address = (folder / "frame.html").as_uri()
    done = subprocess.run(
        [str(CHROMIUM), *flags, *place, *arguments, address], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout
