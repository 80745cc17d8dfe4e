"""The text of an HTML page of documentation: paragraphs, headings, lists and code, without navigation."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Where the text begins in pages of different tools: Sphinx, DocBook, Erlang's. Else it begins at <body>.
BEGINNINGS = ('role="main"', '<div id="content"', '<div class="body"', "<body")
SKIPPED_TAGS = frozenset({"button", "form", "head", "nav", "noscript", "script", "select", "style", "svg", "title"})
SKIPPED_CLASSES = frozenset(
    {
        "footer", "headerlink", "indextable", "navfooter", "navheader", "related", "sphinxsidebar", "toc",
        "toctree-wrapper",
        "viewcode-link", "skip", "leftnav", "lineno", "linenos",
    }
)  # fmt: skip
VOID_TAGS = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})
BLOCK_TAGS = frozenset(
    {
        "address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt", "figure", "h1", "h2",
        "h3",
        "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section", "table", "tbody", "thead", "tr", "ul",
    }
)  # fmt: skip
_SPACE = re.compile(r"[ \t\r\n\f]+")


def html_text(page: str) -> str:
    """The text of `page`, with an empty line between paragraphs; only code keeps its line breaks and indentation."""
    beginning = next((place for mark in BEGINNINGS if (place := page.find(mark)) >= 0), 0)
    parser = _TextParser()
    parser.feed(page[max(0, page.rfind("<", 0, beginning + 1)) :])
    parser.close()
    return parser.text()


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[str] = []
        self._line: list[str] = []  # of the block that is being read
        self._skipped: list[str] = []  # open tags, from the one whose content is left out
        self._in_code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            if tag not in VOID_TAGS:
                self._skipped.append(tag)
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in SKIPPED_TAGS or not SKIPPED_CLASSES.isdisjoint(classes):
            if tag not in VOID_TAGS:
                self._skipped.append(tag)
            return
        if tag in BLOCK_TAGS:
            self._end_block()
            self._in_code += tag == "pre"
            if tag == "li":
                self._line.append("- ")
        elif tag == "br":
            self._line.append("\n" if self._in_code else " ")
        elif tag in ("td", "th"):
            self._line.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag in self._skipped:  # unclosed tags within it end with it
                del self._skipped[len(self._skipped) - 1 - self._skipped[::-1].index(tag) :]
            return
        if tag in BLOCK_TAGS:
            self._end_block()
            self._in_code = max(0, self._in_code - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._line.append(data)

    def _end_block(self) -> None:
        text = "".join(self._line)
        text = text.strip("\n").rstrip() if self._in_code else _SPACE.sub(" ", text).strip()
        if text.strip() not in ("", "-"):
            self._blocks.append(text)
        # A list entry that begins with a paragraph: its mark is kept for the text that follows.
        self._line = ["- "] if text.strip() == "-" else []

    def text(self) -> str:
        self._end_block()
        return "\n\n".join(self._blocks)
