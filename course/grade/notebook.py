"""A submitted file becomes plain cells, whatever wrote it and whatever spoiled it.

Formats 1 to 4 of Jupyter's notebooks, and those to come that still have cells, differ in where a
cell keeps its text and in little else. So nothing is converted or validated here: text, type, id,
tags and grade id are picked out of the JSON, and all else (outputs, widgets, views) is left behind.
What a student could do to the reader is bounded before it is done: size, number of values, depth,
number of cells, length of the code.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator

from nbformat import NotebookNode

from course.grade.intake import LARGEST_NOTEBOOK, Damaged

MOST_CELLS = 2000
# Values of JSON, by their separators: three million take some 200 MB of memory to read.
MOST_VALUES = 3_000_000
# Words and signs of all code cells: parsing one takes up to 1.8 kB of memory. A week has 8,000.
MOST_WORDS = 100_000
MOST_CODE = 4 * 2**20  # characters of all code cells; a pasted picture is one word of many
MOST_LINES = 100_000  # of all cells
_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_UNFIT = re.compile("[\x00\ud800-\udfff]")  # no file can hold half a character, no program a NUL
_IMAGES = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8\xff", "image/gif": b"GIF8"}
_KERNELS = {"ir": "R", "bash": "bash", "julia": "julia"}  # for files that name only the kernel
_OTHER_FILES = {
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"%PDF": "a PDF",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}


def read_notebook(content: bytes) -> NotebookNode:
    """A submitted file as cells of the present format, without their outputs.

    Cell ids are as they were, so they may be missing or double; `healing.heal` makes them whole.
    `metadata.language` is what the file calls its language, `metadata.mended` says in plain words
    what had to be mended to read it.
    Raises: Damaged, saying what is wrong with it.
    """
    mended: list[str] = []
    data = _read_json(_decode(content, mended), mended)
    if not isinstance(data, dict):
        raise Damaged("the file is JSON but no notebook")
    cells = []
    for raw in _raw_cells(data):
        if len(cells) == MOST_CELLS:
            raise Damaged(f"it has more than {MOST_CELLS:,} cells")
        if isinstance(raw, dict):
            cells.append(_cell(raw, mended))
    if not cells:
        raise Damaged("it has no cells")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    if sum(map(len, code)) > MOST_CODE or sum(map(_words, code)) > MOST_WORDS:
        raise Damaged(
            f"its code is too long; the limit is {MOST_WORDS:,} words and signs, or "
            f"{MOST_CODE // 2**20} MiB"
        )
    if sum(cell.source.count("\n") for cell in cells) > MOST_LINES:
        raise Damaged(f"it has more than {MOST_LINES:,} lines")
    metadata = {"language": _language(data), "mended": list(dict.fromkeys(mended))}
    return NotebookNode(cells=cells, metadata=NotebookNode(metadata), nbformat=4, nbformat_minor=5)


# From bytes to JSON


def _decode(content: bytes, mended: list[str]) -> str:
    if len(content) > LARGEST_NOTEBOOK:
        raise Damaged(f"the file is larger than {LARGEST_NOTEBOOK // 2**20} MiB")
    if not content.strip(b"\x00 \t\r\n"):
        raise Damaged("the file is empty")
    for start, kind in _OTHER_FILES.items():
        if content.lstrip().startswith(start):
            raise Damaged(f"the file is {kind}, not a notebook")
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        mended.append("the file was not in UTF-8 but in another encoding of Unicode")
        return content.decode(encoding, "replace").removeprefix("\ufeff")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        mended.append("the file was not in UTF-8: some characters may be others than you typed")
    # A single damaged byte leaves the others readable; without any, an old Windows editor wrote it.
    if re.search(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}", content):
        return content.decode(encoding, "replace")
    return content.decode("cp1252", "replace")


def _read_json(text: str, mended: list[str]) -> object:
    if sum(map(text.count, "{[,:")) > MOST_VALUES:
        raise Damaged(f"the file holds more than {MOST_VALUES:,} values")
    start = len(text) - len(text.lstrip("\x00 \t\r\n"))
    # Not strict: a line break inside a text is clear. Numbers are of no use here, and a long one
    # takes Python long to read.
    decoder = json.JSONDecoder(strict=False, parse_int=len, parse_float=len, parse_constant=len)
    try:
        data, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        conflict = re.search(r"^<{7}", text, re.MULTILINE)
        if conflict and "\n=======" in text[conflict.end() :]:
            line = text.count("\n", 0, conflict.start()) + 1
            raise Damaged(
                f"two versions of it were merged, and at line {line} both of them are left"
            ) from None
        where = f"it breaks off or is damaged at line {error.lineno}"
        raise Damaged(f"the file is not JSON: {where}") from None
    except RecursionError:
        raise Damaged("the file is nested too deeply") from None
    if text[end:].strip("\x00\x1a \t\r\n"):
        mended.append("what stood below the notebook's end in the file was left out")
    return data


# From JSON to cells


def _raw_cells(data: dict) -> Iterator[object]:
    """The cells, wherever this version of the format has them."""
    sheets = [data]
    if isinstance(data.get("worksheets"), list):
        sheets += [sheet for sheet in data["worksheets"] if isinstance(sheet, dict)]
    lists = [sheet["cells"] for sheet in sheets if isinstance(sheet.get("cells"), list)]
    if not lists:
        raise Damaged("the file is JSON but no notebook")
    for cells in lists:
        yield from cells


def _cell(raw: dict, mended: list[str]) -> NotebookNode:
    kind, metadata = raw.get("cell_type"), raw.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    # Format 4 and markdown cells before it say source, format 3 says input, format 1 code or text.
    texts = (raw[key] for key in ("source", "input", "code", "text") if raw.get(key))
    source = _clean(_joined(next(texts, "")), mended)
    if kind == "heading":
        level = str(raw.get("level"))  # numbers are read as the length of their digits: always 1
        source = f"{'#' * (int(level) if level in '123456' else 1)} {source}"
    if kind not in ("code", "markdown", "raw"):
        is_code = any(key in raw for key in ("outputs", "execution_count", "input", "code"))
        kind = "code" if is_code else "markdown"
    cell = NotebookNode(cell_type=kind, id=_id(raw, metadata), metadata={}, source=source)
    cell.metadata = _metadata(metadata)
    if kind == "code":
        cell.outputs, cell.execution_count = [], None
    elif kind == "markdown" and (images := _images(raw.get("attachments"))):
        cell.attachments = images
    return cell


def _words(code: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", code))


def _joined(source: object) -> str:
    if isinstance(source, list):
        return "".join(line for line in source if isinstance(line, str))
    return source if isinstance(source, str) else ""


def _clean(text: str, mended: list[str]) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _UNFIT.search(text):
        mended.append("a character that no file can hold was replaced")
        text = _UNFIT.sub("\ufffd", text.replace("\x00", ""))
    return text


def _id(raw: dict, metadata: dict) -> str:
    """The cell's id; Colab keeps it in the metadata."""
    for given in (raw.get("id"), metadata.get("id")):
        if isinstance(given, str) and _ID.fullmatch(given):
            return given
    return ""


def _metadata(metadata: dict) -> NotebookNode:
    kept = NotebookNode()
    tags, marks = metadata.get("tags"), metadata.get("nbgrader")
    if isinstance(tags, list):
        words = (tag for tag in tags[:20] if isinstance(tag, str) and len(tag) < 100)
        # The format forbids a comma in a tag, and the same tag twice.
        kept.tags = list(dict.fromkeys(tag for tag in words if tag and "," not in tag))
    if isinstance(marks, dict) and isinstance(marks.get("grade_id"), str):
        kept.nbgrader = NotebookNode(grade_id=marks["grade_id"])
    return kept


def _images(attachments: object) -> NotebookNode:
    """The pictures pasted into a text cell, if they are what they say they are."""
    kept = NotebookNode()
    for name, kinds in attachments.items() if isinstance(attachments, dict) else ():
        for kind, data in kinds.items() if isinstance(kinds, dict) else ():
            data = _joined(data)
            if kind in _IMAGES and name.isprintable():
                try:
                    start = base64.b64decode(data[:16], validate=True)
                except (binascii.Error, ValueError):
                    continue
                if start.startswith(_IMAGES[kind]) and re.fullmatch(r"[A-Za-z0-9+/=\s]*", data):
                    kept[name] = NotebookNode({kind: data})
    return kept


def _language(data: dict) -> str:
    """What the notebook says it is written in: "python" when it says nothing."""
    metadata = data.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    info, kernel = metadata.get("language_info"), metadata.get("kernelspec")
    said = [info.get("name")] if isinstance(info, dict) else []
    if isinstance(kernel, dict):
        said += [kernel.get("language"), _KERNELS.get(str(kernel.get("name")))]
    words = [word for word in said if isinstance(word, str) and word.isprintable() and word]
    return words[0][:40] if words else "python"
