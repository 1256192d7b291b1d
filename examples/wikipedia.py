"""Plain text of the Wikipedia articles that come with gensim's test data."""

import bz2
import functools
import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

MARKUP = tuple(
    (re.compile(pattern, flags), replacement)
    for pattern, replacement, flags in (
        (r"<!--.*?-->", "", re.DOTALL),
        (r"<ref[^<>]*/>", "", 0),
        (r"<(ref|math|gallery|timeline|source|pre)\b[^<>]*>.*?</\1>", "", re.DOTALL),
        (r"</?[a-zA-Z][^<>]*>", "", 0),
        (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", 0),  # [[page|words]] -> words
        (r"\[(?:https?|ftp)://\S+ ?([^\[\]]*)\]", r"\1", 0),  # [address words] -> words
        (r"'{2,}", "", 0),
        (r"^[=*#:;|!].*$", "", re.MULTILINE),  # headings, list items, remains of tables
        (r"__[A-Z]+__", "", 0),
        (r"[ \t]+", " ", 0),
        (r" ?\n ?", "\n", 0),
        (r"\n{3,}", "\n\n", 0),
    )
)
# They nest: the innermost goes first, until none is left.
NESTED = (
    re.compile(r"\{\{[^{}]*\}\}"),
    re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL),
    re.compile(r"\[\[(?:File|Image|Category|[a-z]{2,3}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I),
)


SHORTEST = 1000  # characters; a shorter page is a list of links


@functools.cache
def read(dump: Path) -> str:
    """The articles of a bz2 MediaWiki dump as plain text, in order, blank lines between them."""
    texts = (plain(source) for source in _articles(dump))
    return "\n\n".join(text for text in texts if len(text) >= SHORTEST)


def plain(source: str) -> str:
    """The words of a page of wikitext: templates, tables, notes, images and markup taken out."""
    text = html.unescape(source)
    (comments, nothing), *rest = MARKUP
    text = comments.sub(nothing, text)
    for pattern in NESTED:
        count = 1
        while count:
            text, count = pattern.subn("", text)
    for pattern, replacement in rest:
        text = pattern.sub(replacement, text)
    return text.strip()


def _articles(dump: Path) -> Iterator[str]:
    """The wikitext of each article; pages of other kinds and redirects are left out."""
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            space = element.findtext("{*}ns")
            source = element.findtext("{*}revision/{*}text") or ""
            if space == "0" and not source.lower().startswith("#redirect"):
                yield source
            element.clear()
