"""What every HTML report has: the page around it, cells and tables; all text is escaped here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from sparsefx import report_words as words

Columns = tuple[tuple[str, bool], ...]
"""Heading, and whether the column holds numbers: they are right-aligned and sorted as numbers."""


@dataclass(frozen=True)
class Page:
    """One self-contained page: no other file, no network, readable without scripts.

    title, facts, tiles (figure, what it is), heading and hint are plain text. body and tables are
    HTML. choices: the filter beside the text filter, `data-fate` of a row -> label, {} for none.
    style and script come after those of the page.
    """

    title: str
    facts: Mapping[str, str]
    tiles: Sequence[tuple[str, str]]
    body: str
    heading: str
    hint: str
    tables: str
    choices: Mapping[str, str]
    style: str = ""
    script: str = ""

    def html(self) -> str:
        """The whole page."""
        template = Template(files("sparsefx").joinpath("report.html").read_text(encoding="utf-8"))
        return template.substitute(
            title=text(self.title),
            facts="".join(
                f"<li>{text(name)} <b>{text(fact)}</b></li>" for name, fact in self.facts.items()
            ),
            tiles="".join(
                f'<div class="card tile"><b>{text(figure)}</b><span>{text(note)}</span></div>'
                for figure, note in self.tiles
            ),
            body=self.body,
            heading=text(self.heading),
            hint=text(self.hint),
            choices="".join(
                f'<option value="{text(fate)}">{text(label)}</option>'
                for fate, label in self.choices.items()
            ),
            tables=self.tables,
            style=self.style,
            script=self.script,
        )


def text(plain: str) -> str:
    """`plain` as HTML, on one line and without control characters; also inside quotes."""
    return escape(words.printable(plain))


def dotted(name: str) -> str:
    """A module's or parameter's name as HTML that may break after each dot."""
    return text(name).replace(".", ".<wbr>")


def table(columns: Columns, rows: Iterable[str], caption: str = "") -> str:
    """A table of rows that are HTML already; `caption` is plain text, "" for none."""
    head = "".join(
        f'<th scope="col"{" class=n" if numbers else ""}>{label}</th>' for label, numbers in columns
    )
    said = f"<caption>{text(caption)}</caption>" if caption else ""
    body = "\n".join(rows)
    return (
        f'<table class="bare">{said}\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n'
        "</table>\n"
    )


def word(label: str, plain: str, style: str = "") -> str:
    """A cell of text under the heading `label`."""
    return f'<td{_classes(style, plain)} data-label="{label}">{text(plain)}</td>'


def number(label: str, value: float | None, shown: str, style: str = "") -> str:
    """A cell that is written as `shown` and sorted as `value`; None and NaN are sorted last."""
    sortable = repr(value) if value is not None and math.isfinite(value) else ""
    classes = _classes(f"n {style}", shown)
    return f'<td{classes} data-label="{label}" data-value="{sortable}">{shown}</td>'


def _classes(style: str, shown: str) -> str:
    names = style.split() + ([] if shown else ["empty"])
    return f' class="{" ".join(names)}"' if names else ""
