"""Makes what came out of a student's process harmless, and puts it into the notebook to keep.

Formgrader shows that notebook in the instructor's browser, inside a Jupyter server that can run
anything: a script in it would run as the instructor. nbconvert escapes text and draws PNG and JPEG;
it hands on HTML, SVG, widgets, and the HTML and `javascript:` links of Markdown as they are. So:

- an output is text, or a picture whose first bytes say PNG or JPEG, or it is left out;
- Markdown is rendered as formgrader will render it, and kept if every tag in the result is on a
  short list, written in one exact way; otherwise the cell shows its source;
- of all metadata only nbgrader's and plain tags remain.

Nothing here trusts the shell: its process belongs to the student.
"""

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from functools import lru_cache

from nbformat import NotebookNode

from course.grade.records import Limits

OVERHEAD = 64  # bytes that an output counts besides its content
SLACK = 2**14  # bytes above the shell's limit, for its own last line and for errors of ours
LONGEST_NAME, LONGEST_VALUE, LONGEST_ALT = 200, 2_000, 300
MOST_COLOURS = 20_000  # nbconvert takes a tenth of a millisecond for each
MOST_PIXELS = 40_000_000  # a small file can claim to be so large that a browser gives up
LONGEST_PROSE = 20_000  # characters of a cell: mistune's time grows with their square
MOST_PROSE = 100_000  # characters of a notebook that are rendered
UNTOLD = re.compile(r"<IPython\.core\.display\.\w+ object>")
LEFT_OUT = "(an output that is neither text nor a PNG or JPEG picture is left out)"
AS_SOURCE = "*This cell holds more than text, links and formulas; here is its source:*"

# Text

# nbconvert's own pattern for these takes quadratic time on broken ones.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~])?")
_COLOUR = re.compile(r"\x1b\[(?:\d{1,3}(?:;\d{1,3}){0,9})?m")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean_text(text: object, most: int | None = None) -> str:
    """Text that a page and a file can hold; of a terminal's commands the colours are kept."""
    if type(text) is not str:
        return ""
    text = text[:most].replace("\r\n", "\n").replace("\x0c", "\n")
    text = _ESCAPE.sub(lambda match: match[0] if _COLOUR.fullmatch(match[0]) else "", text)
    return _UNPRINTABLE.sub("\ufffd", text)


def _line(text: object, most: int) -> str:
    """One line without colours."""
    return " ".join(_COLOUR.sub("", clean_text(text, most)).split())


# Pictures


def _picture(content: object, kind: str) -> str:
    """The base64 of a PNG or JPEG file of a bearable size, or nothing."""
    if type(content) is not str:
        return ""
    try:
        content = base64.b64decode(re.sub(r"[ \n]", "", content), validate=True)
    except (binascii.Error, ValueError):
        return ""
    width, height = (_png_size if kind == "image/png" else _jpeg_size)(content)
    return base64.b64encode(content).decode() if 0 < width * height <= MOST_PIXELS else ""


def _png_size(content: bytes) -> tuple[int, int]:
    if len(content) < 24 or content[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
        return 0, 0
    return struct.unpack(">II", content[16:24])


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Walk from segment to segment to the one that says the size."""
    at = 2 if content[:3] == b"\xff\xd8\xff" else len(content)
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker, length = struct.unpack(">BH", content[at + 1 : at + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", content[at + 5 : at + 9])
            return width, height
        at += 2 + length
    return 0, 0


# Outputs


def clean_outputs(raw: list, limit: int = Limits().output_bytes + SLACK) -> list[NotebookNode]:
    """Rebuild a cell's outputs, as nbformat wants them, from what the student's process claims."""
    return _Cleaner(limit).clean(raw)


class _Cleaner:
    """Cleans outputs of several cells until they are together as large as the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit
        self.colours = MOST_COLOURS

    def clean(self, raw: object, count: int | None = None) -> list[NotebookNode]:
        kept = []
        for output in raw if type(raw) in (list, tuple) else ():
            if self.left <= 0:
                break
            done = self._output(output, count)
            if done is None:
                continue
            self.left -= OVERHEAD + _size(done)
            if self.left <= 0:
                done = _stream("stderr", f"output is cut at {self.limit:,} bytes\n")
            kept.append(done)
        return kept

    def _text(self, text: object, parts: int = 1) -> str:
        """Clean text of at most a part of what is left, coloured while there are colours left."""
        text = clean_text(text, self.left // parts)
        self.colours -= text.count("\x1b")
        return text if self.colours >= 0 else _COLOUR.sub("", text)

    def _output(self, output: object, count: int | None) -> NotebookNode | None:
        if type(output) is not dict:
            return None
        kind = output.get("output_type")
        if kind == "stream":
            name = "stderr" if output.get("name") == "stderr" else "stdout"
            text = self._text(output.get("text"))
            return _stream(name, text) if text else None
        if kind == "error":
            lines = output.get("traceback")
            lines = lines[:1000] if type(lines) in (list, tuple) else []
            traceback = [self._text(line, len(lines)) for line in lines]
            return _error(output.get("ename"), output.get("evalue"), traceback)
        if kind in ("display_data", "execute_result"):
            data = output.get("data")
            data, metadata = self._bundle(data if type(data) is dict else {}, output)
            fields = {"output_type": kind, "data": data, "metadata": metadata}
            return _node(fields | ({"execution_count": count} if kind == "execute_result" else {}))
        return None

    def _bundle(self, data: dict, output: dict) -> tuple[dict, dict]:
        """Text and at most one picture, with what describes the picture."""
        plain = self._text(data.get("text/plain"))
        if not plain or UNTOLD.fullmatch(plain):
            sources = (data.get(f"text/{kind}") for kind in ("markdown", "latex", "html"))
            plain = next(filter(None, map(self._text, sources)), plain)
        for kind in ("image/png", "image/jpeg"):
            if picture := _picture(data.get(kind), kind):
                about = output.get("metadata")
                about = about.get(kind) if type(about) is dict else None
                alt = _line(about.get("alt"), LONGEST_ALT) if type(about) is dict else ""
                alt = re.sub(r'[<>"]', "", alt)
                bundle = {kind: picture} | ({"text/plain": plain} if plain else {})
                return bundle, {kind: {"alt": alt}} if alt else {}
        return {"text/plain": plain or LEFT_OUT}, {}


def _size(output: NotebookNode) -> int:
    texts = [output.get("text", ""), output.get("evalue", "")]
    texts += [*output.get("traceback", ()), *output.get("data", {}).values()]
    return sum(len(text.encode()) for text in texts)


def _node(fields: dict) -> NotebookNode:
    from nbformat import from_dict

    return from_dict(fields)


def _stream(name: str, text: str) -> NotebookNode:
    return _node({"output_type": "stream", "name": name, "text": text})


def _error(name: object, value: object, traceback: list[str]) -> NotebookNode:
    name = _line(name, LONGEST_NAME) or "Error"
    value = clean_text(value, LONGEST_VALUE)
    traceback = traceback or [f"{name}: {value}"]
    fields = {"output_type": "error", "ename": name, "evalue": value, "traceback": traceback}
    return _node(fields)


# Prose

_ADDRESS = r"(?:https?://|mailto:|#)[^\s\"<>`]*"
_BADGES = r"https://(?:colab\.research\.google\.com/assets|kaggle\.com/static/images)/[\w.-]+"
_TITLES = r"(?: (?:alt|title)=\"[^\"<>]*\")*"
# Every tag in its one spelling. No value holds a bracket or a quote, no element's content is
# anything but more of the same, so that a browser can read the whole in no other way.
_SAFE_TAG = re.compile(
    r"</?(?:p|h[1-6]|a|em|strong|b|i|u|s|del|ins|sub|sup|kbd|code|pre|small|mark|cite|q|blockquote"
    r"|ul|ol|li|dl|dt|dd|table|thead|tbody|tfoot|tr|th|td|caption|span|div|details|summary)>"
    r"|<(?:br|hr) ?/?>"
    r"|<h[1-6] id=\"[^\"<>]*\">"
    rf"|<a(?: class=\"anchor-link\")? href=\"{_ADDRESS}\"{_TITLES}>"
    rf"|<img src=\"(?:{_BADGES}|data:image/(?:png|jpeg);base64,)\"{_TITLES} ?/?>"
    r"|<t[hd] style=\"text-align:(?:left|right|center)\">"
    r"|<ol start=\"\d{1,9}\">"
    r"|<li class=\"task-list-item\">"
    r"|<input class=\"task-list-item-checkbox\" type=\"checkbox\" disabled(?: checked)? ?/?>"
    r"|<div class=\"highlight(?: hl-\w+)?\">"
    r"|<code class=\"language-[\w+-]+\">"
    r"|<span class=\"[a-z]{1,3}\d?\">"
)
# What MathJax turns into links, attributes, styles, actions or more extensions.
_RISKY_TEX = re.compile(
    r"\\(?:href|url|class|cssId|style|mmlToken|require|unicode|toggle|mathtip|texttip|bbox"
    r"|html\w*|data|includegraphics)(?![a-zA-Z])"
)


@lru_cache(maxsize=1024)
def is_safe_prose(source: str, attached: tuple[str, ...] = ()) -> bool:
    """Whether this Markdown becomes nothing but text, links, tables, code, formulas and pictures.

    `attached` names the pictures that come with the cell. What is not there breaks the page.
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    if len(source) > LONGEST_PROSE or _RISKY_TEX.search(source):
        return False
    pictures = {name: {"image/png": ""} for name in attached}
    renderer = IPythonRenderer(escape=False, attachments=pictures)
    try:
        html = MarkdownWithMath(renderer=renderer).render(source)
    except Exception:
        return False
    # A space in each tag's place: what stood around it must not close up to a new one.
    return not re.search(r"<[A-Za-z/!?]", _SAFE_TAG.sub(" ", html))


def _as_source(source: str) -> str:
    longest = max(map(len, re.findall(r"`+", source)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{AS_SOURCE}\n\n{fence}\n{source}\n{fence}"


# The notebook


def executed(
    notebook: Mapping, outcomes: Mapping, limit: int = Limits().output_bytes + SLACK
) -> NotebookNode:
    """The healed notebook with what its cells showed, safe to open and valid.

    `outcomes` gives, by the index of a cell, the `CellOutcome` of what was run. An outcome whose
    error is in no output (the process was stopped) gets one.
    """
    cleaner, cells, used, prose, count = _Cleaner(limit), [], set(), MOST_PROSE, 0
    for index, cell in enumerate(notebook["cells"]):
        done = _cell(cell, index, used)
        if done.cell_type == "code":
            done.outputs, done.execution_count = [], None
            if (outcome := outcomes.get(index)) is not None:
                count += 1
                done.execution_count = count
                done.outputs = cleaner.clean(outcome.outputs, count)
                if outcome.error and not any(o.output_type == "error" for o in done.outputs):
                    done.outputs.append(_error(*outcome.error, []))
        else:
            pictures = _attachments(cell.get("attachments"))
            prose -= len(done.source)
            is_text = done.cell_type == "markdown" and prose >= 0
            if not (is_text and is_safe_prose(done.source, tuple(pictures))):
                done.source = _as_source(done.source)
            done.cell_type = "markdown"  # nbconvert shows a raw cell as it is
            if pictures:
                done.attachments = pictures
        cells.append(done)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return _node({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _cell(cell: Mapping, index: int, used: set[str]) -> NotebookNode:
    """A cell with its source and the few things besides that are known to be plain."""
    name = cell.get("id")
    if type(name) is not str or not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) or name in used:
        name = next(n for i in range(10_000) if (n := f"cell-{index}-{i}") not in used)
    used.add(name)
    given = cell.get("metadata", {})
    metadata = {k: given[k] for k in ("deletable", "editable") if type(given.get(k)) is bool}
    tags = given.get("tags")
    if isinstance(tags, list) and all(re.fullmatch(r"[\w-]{1,50}", str(tag)) for tag in tags):
        metadata["tags"] = [str(tag) for tag in tags]
    marks = given.get("nbgrader")
    if isinstance(marks, Mapping) and re.fullmatch(r"[\w.-]{1,100}", str(marks.get("grade_id"))):
        kinds = (str, bool, int, float)
        metadata["nbgrader"] = {k: v for k, v in marks.items() if type(v) in kinds}
    kind = cell["cell_type"] if cell["cell_type"] in ("code", "markdown") else "raw"
    fields = {"id": name, "cell_type": kind, "metadata": metadata}
    return _node(fields | {"source": _COLOUR.sub("", clean_text(cell["source"]))})


def _attachments(given: object) -> dict:
    """Pictures that were pasted into a Markdown cell."""
    kept = {}
    for name, bundle in given.items() if isinstance(given, Mapping) else ():
        if re.fullmatch(r"[\w.%-]{1,100}", str(name)) and isinstance(bundle, Mapping):
            pictures = {kind: _picture(bundle.get(kind), kind) for kind in bundle}
            pictures = {k: p for k, p in pictures.items() if p and k in ("image/png", "image/jpeg")}
            if pictures:
                kept[str(name)] = pictures
    return kept
