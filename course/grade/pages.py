"""What the feedback and the report have in common: one HTML page that needs nothing but itself.

No script, no address outside the page, one style sheet inside it: it can be mailed, printed, kept
for years, and read on a phone in the dark. What a student wrote is data. Every value is cleaned and
escaped on its way into a template, and the page's own policy forbids scripts, frames and requests,
so that a browser would refuse what slipped through.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

# Sequences that colour a terminal, set its title or move its cursor.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
# Control characters but tab and newline, halves of surrogate pairs, what is no character, and the
# marks that make text read in another order than it is written.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)


def clean(text: str) -> str:
    """The text without what a page cannot show or must not obey; a replaced character is seen."""
    if text.isascii() and text.isprintable():
        return text
    return _UNFIT.sub("\ufffd", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def number(value: float) -> str:
    """A number of points as a person writes it: 2 and 1.5, never 2.0."""
    return f"{round(value, 2):.12g}"


def counted(count: float, one: str, many: str = "") -> str:
    """`1 point`, `2 points`."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def prose(text: str) -> Markup:
    """A sentence in which words between backticks are code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(clean(text)))))


def signed(value: float | None) -> str:
    """A correlation with its sign; a dash where there is none."""
    return "–" if value is None else f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share as whole percent; 100% and 0% are said of all and none only."""
    whole = min(99, max(1, round(100 * share))) if 0 < share < 1 else round(100 * share)
    return f"{whole}%"


def render(template: str, values: Mapping[str, object]) -> str:
    """Fill one of `templates/`; what comes back can be encoded as UTF-8."""
    return _ENVIRONMENT.get_template(f"{template}.html").render(values).rstrip("\n") + "\n"


def _finalize(value: object) -> object:
    """Applied to every value of every template, before it is escaped.

    Markup is made in this file only, from text that was cleaned and escaped.
    """
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_ENVIRONMENT.filters |= {
    "number": number,
    "counted": counted,
    "prose": prose,
    "percent": percent,
    "signed": signed,
}
