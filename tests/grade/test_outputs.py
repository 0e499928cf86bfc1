"""What a student's process claims to have shown becomes valid, bounded and harmless."""

import base64
import json
import re
import struct
import warnings
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from course.grade.outputs import (
    AS_SOURCE,
    LEFT_OUT,
    MOST_PROSE,
    clean_outputs,
    clean_text,
    executed,
)
from course.source import repo_root


def b64(content):
    return base64.b64encode(content).decode()


def png(width=1, height=1):
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\0\0\0\0"


def jpeg(width=1, height=1):
    frame = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", height, width) + b"\x03" + b"\0" * 9
    return b"\xff\xd8" + b"\xff\xe0\0\x04ab" + frame + b"\xff\xd9"


def outcome(*outputs, error=None):
    return SimpleNamespace(outputs=list(outputs), error=error, seconds=0.1)


def notebook_of(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def prose(source, **fields):
    return nbformat.v4.new_markdown_cell(source, **fields)


def code(source="1"):
    return nbformat.v4.new_code_cell(source)


@pytest.fixture(scope="module")
def formgrader(tmp_path_factory):
    """The exporter that formgrader renders an autograded notebook with, and its page's fields."""
    import nbgrader.server_extensions.formgrader.handlers as handlers
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import Config

    config = Config()
    config.HTMLExporter.template_name = "formgrade"
    config.HTMLExporter.extra_template_basedirs = [handlers.template_path]
    exporter = HTMLExporter(config=config)

    def render(notebook):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nbconvert's about alternative texts
            fields = {"metadata": {"name": "w"}, "index": 0, "total": 1}
            return exporter.from_notebook_node(notebook, resources=fields)[0]

    # What the page holds without anybody's cells: its own scripts, buttons and fields.
    render.empty = dangers(render(notebook_of()))
    return render


def dangers(html):
    """What in a page, parsed as a browser parses it, can run, load or post something."""
    from bleach._vendor import html5lib

    found = []
    for element in html5lib.parse(html, namespaceHTMLElements=False).iter():
        if not isinstance(element.tag, str):
            continue
        if element.tag in (
            *("script", "style", "iframe", "object", "embed", "form", "base", "link", "meta"),
            *("svg", "math", "video", "audio", "template", "button", "textarea", "select"),
        ):
            found.append(element.tag)
        for name, value in element.attrib.items():
            value = re.sub(r"[\x00-\x20]", "", value).lower()
            if name.startswith("on") or name in ("style", "srcdoc", "srcset", "formaction"):
                found.append((element.tag, name, value))
            is_address = name in ("href", "src", "action", "data", "xlink:href")
            plain = r"https?://|mailto:|#|data:image/(png|jpeg);|$"
            if is_address and not re.match(plain, value):
                found.append((element.tag, name, value))
    return [d for d in found if d not in ALLOWED]


ALLOWED = [("td", "style", f"text-align:{side}") for side in ("left", "right", "center")]
ALLOWED += [("th", name, value) for _, name, value in ALLOWED]


# Outputs


def test_honest_outputs_of_every_kind_are_kept():
    raw = [
        {"output_type": "stream", "name": "stderr", "text": "a\n\x1b[31mred\x1b[0m"},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["one", "two"]},
        {
            "output_type": "display_data",
            "data": {"text/plain": "a line", "image/png": b64(png()) + "\n"},
            "metadata": {"image/png": {"alt": "a line"}},
        },
        {"output_type": "execute_result", "data": {"text/plain": "2"}, "execution_count": 9},
    ]
    stream, error, picture, result = clean_outputs(raw)
    assert stream == raw[0]
    assert error == raw[1]
    assert picture.data == {"text/plain": "a line", "image/png": b64(png())}
    assert picture.metadata == {"image/png": {"alt": "a line"}}
    assert (result.data, result.output_type) == ({"text/plain": "2"}, "execute_result")


@pytest.mark.parametrize(
    "raw",
    [
        None,
        {},
        "outputs",
        [None, 1, "x", [], {}],
        [{"output_type": "update_display_data", "data": {}}],
        [{"output_type": ["stream"]}],
        [{"output_type": "stream", "name": "stdout", "text": ["a"]}],
        [{"output_type": "stream", "name": "stdout", "text": None}],
    ],
)
def test_what_is_no_output_is_left_out(raw):
    assert clean_outputs(raw) == []


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
CLAIMS = st.fixed_dictionaries(
    {"output_type": st.sampled_from(["stream", "error", "display_data", "execute_result"])},
    optional={
        "name": JUNK,
        "text": JUNK,
        "ename": JUNK,
        "evalue": JUNK,
        "traceback": JUNK | st.lists(st.text()),
        "execution_count": JUNK,
        "metadata": JUNK | st.dictionaries(st.sampled_from(["image/png", "isolated"]), JUNK),
        "data": JUNK
        | st.dictionaries(
            st.sampled_from(["text/plain", "text/html", "image/png", "image/jpeg"]),
            JUNK | st.sampled_from([b64(png()), b64(jpeg()), "<script>"]),
        ),
        "transient": JUNK,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CLAIMS, max_size=4), st.lists(st.text(), max_size=3))
def test_whatever_is_claimed_becomes_a_valid_notebook_and_a_file(raw, sources):
    notebook = notebook_of(code(), *map(prose, sources))
    done = executed(notebook, {0: outcome(*raw, error=("E", "v"))})
    nbformat.validate(done)
    json.dumps(done, ensure_ascii=False).encode("utf-8")


def test_only_pictures_that_are_what_they_say_are_kept():
    def kept(kind, content):
        (output,) = clean_outputs([{"output_type": "display_data", "data": {kind: content}}])
        return kind in output.data

    assert kept("image/png", b64(png(100, 100)))
    assert kept("image/jpeg", b64(jpeg(100, 100)))
    assert not kept("image/png", b64(jpeg()))
    assert not kept("image/jpeg", b64(png()))
    assert not kept("image/png", b64(b"<svg onload=alert(1)>"))
    assert not kept("image/png", 'x" onerror="alert(1)')
    assert not kept("image/png", b64(png(2**31, 2**31)))
    assert not kept("image/jpeg", b64(jpeg(65_535, 65_535)))
    assert not kept("image/png", b64(png(0, 1)))
    assert not kept("image/jpeg", b64(jpeg()[:12]))
    assert not kept("image/jpeg", b64(b"\xff\xd8" + b"\xff\xe0\0\0" * 5))
    assert not kept("image/svg+xml", "<svg/>")
    assert not kept("application/javascript", "alert(1)")
    assert not kept("text/html", "<b>")


def test_html_markdown_and_formulas_become_their_source_as_text():
    def shown(**data):
        data = {f"text/{kind}": text for kind, text in data.items()}
        return clean_outputs([{"output_type": "display_data", "data": data}])[0].data

    assert shown(html="<b>x</b>") == {"text/plain": "<b>x</b>"}
    untold = "<IPython.core.display.Markdown object>"
    assert shown(plain=untold, markdown="**y**") == {"text/plain": "**y**"}
    assert shown(plain="a table", html="<table>") == {"text/plain": "a table"}
    assert shown() == {"text/plain": LEFT_OUT}


def test_text_keeps_colours_and_loses_other_commands_of_a_terminal():
    assert clean_text("\x1b[1;31mred\x1b[0m \x1b[2K\x1b[10Aup \x1b]0;title\x07") == (
        "\x1b[1;31mred\x1b[0m up ]0;title\ufffd"
    )
    assert clean_text("a\0b\ud800c\r\nd\x85") == "a\ufffdb\ufffdc\nd\ufffd"
    assert clean_text(["x"]) == clean_text(None) == ""


def test_colours_are_bounded_because_each_costs_the_page_time():
    def kept(part):
        text = {"output_type": "stream", "name": "stdout", "text": part * (2**16 // len(part))}
        return "".join(output.text for output in clean_outputs([text] * 16)).count("\x1b")

    assert kept("\x1b[31m") <= 20_000
    assert kept("\x1b[38;5m") <= 20_000
    assert kept("\x1b[") == kept("\x1b[1;") == kept("\x1b[1;1000m") == 0


def test_outputs_are_bounded_whatever_the_process_says():
    flood = [{"output_type": "stream", "name": "stdout", "text": "x" * 1000}] * 10_000
    kept = clean_outputs(flood, 100_000)
    assert 90_000 < sum(len(output.text) for output in kept) <= 100_000
    assert kept[-1].text == "output is cut at 100,000 bytes\n"
    assert len(clean_outputs([{"output_type": "display_data", "data": {}}] * 10**5)) < 20_000
    many = [{"output_type": "error", "ename": "E" * 10**6, "evalue": "v" * 10**6}]
    many[0]["traceback"] = ["line"] * 10**6
    (error,) = clean_outputs(many)
    assert (len(error.ename), len(error.evalue), len(error.traceback)) == (200, 2000, 1000)
    # The limit is for all cells together.
    cells = notebook_of(*[code() for _ in range(50)])
    done = executed(cells, {i: outcome(*flood[:50]) for i in range(50)}, 100_000)
    assert sum(len(o.text) for c in done.cells for o in c.outputs) <= 100_000


# The notebook


def test_outputs_and_counts_go_into_their_cells_by_index():
    notebook = notebook_of(prose("text"), code("a"), code("b"), code("c"))
    results = {
        1: outcome({"output_type": "execute_result", "data": {"text/plain": "1"}}),
        3: outcome({"output_type": "stream", "name": "stdout", "text": "x"}),
    }
    before = json.dumps(notebook)
    done = executed(notebook, results)
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, None, 2]
    assert done.cells[1].outputs[0].execution_count == 1
    assert done.cells[3].outputs[0].text == "x"
    assert done.cells[2].outputs == []
    assert json.dumps(notebook) == before
    nbformat.validate(done)


def test_a_cell_that_was_stopped_says_so():
    done = executed(notebook_of(code()), {0: outcome(error=("Stopped", "it ran longer than 60 s"))})
    (said,) = done.cells[0].outputs
    assert (said.ename, said.evalue) == ("Stopped", "it ran longer than 60 s")


def test_of_metadata_only_nbgraders_and_plain_tags_remain():
    marks = {"grade_id": "softmax-law", "grade": True, "points": 2, "locked": True}
    cell = code()
    cell.metadata = {"nbgrader": marks, "tags": ["setup"], "deletable": False, "alt": "x"}
    evil = code()
    evil.metadata = {"nbgrader": {"grade_id": '"><script>'}, "tags": ['"><script>'], "x": 1}
    raw = nbformat.v4.new_raw_cell("<script>", metadata={"raw_mimetype": "text/html"})
    notebook = notebook_of(cell, evil, raw)
    state = {"application/vnd.jupyter.widget-state+json": {"x": "</script><script>"}}
    notebook.metadata = {"widgets": state, "title": "<script>"}
    done = executed(notebook, {})
    assert done.cells[0].metadata == {"nbgrader": marks, "tags": ["setup"], "deletable": False}
    assert [dict(cell.metadata) for cell in done.cells[1:]] == [{}, {}]
    assert done.cells[2].cell_type == "markdown"
    assert set(done.metadata) == {"kernelspec", "language_info"}


def test_ids_are_valid_and_unique():
    cells = [code(), code(), code()]
    for cell, name in zip(cells, ["same", "same", "x y"]):
        cell.id = name
    done = executed({"cells": cells}, {})
    assert done.cells[0].id == "same"
    assert len({cell.id for cell in done.cells}) == 3
    nbformat.validate(done)


def test_the_courses_own_prose_is_kept_as_it_is():
    for path in sorted(repo_root().glob("*/w[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for before, after in zip(notebook.cells, executed(notebook, {}).cells, strict=True):
            assert after.source == before.source, path
            assert after.cell_type == before.cell_type
            assert after.id == before.id


@pytest.mark.parametrize(
    "source",
    [
        "A *word*, `code`, $i<j$ and $$\\sum_{i<n} x_i \\text{ if } a<b$$",
        "a < b, 3 <4, x<y, <3 and &lt;script&gt;",
        "| a | b |\n|:-:|--:|\n| 1 | 2 |",
        "```python\nprint('<script>')\n```\n\n    <script>alert(1)</script>",
        "<details><summary>More</summary>\n\ntext\n\n</details>",
        '[a link](https://example.org/x?y=1&z=2 "title") <https://example.org>',
        "- [ ] to do\n- [x] done\n\n3. three\n4. four\n\n> said\n\n---\n\n~~gone~~",
        "`<script>`",
        "# A heading with `code` & more",
        "émigré 中文 \u202ebidi",
    ],
)
def test_what_students_write_is_kept_as_they_wrote_it(source):
    assert executed(notebook_of(prose(source)), {}).cells[0].source == source


ATTACKS = [
    "<script>alert(1)</script>",
    "<scr<p>ipt>alert(1)</scr</p>ipt>",
    "<img src=x onerror=alert(1)>",
    "<IMG SRC=javascript:alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](java&Tab;script:alert(1))",
    "[x](&#x1;javascript:alert(1))",
    "[x](files/javascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "![x](https://example.org/pixel.png)",
    "![x](/logout)",
    '![x]("onerror="alert(1))',
    '![x](x.png "t" onerror=alert(1))',
    '[x](https://a.b "t&quot; onmouseover=&quot;alert(1)")',
    '[x](https://a.b/"onmouseover="alert(1))',
    '![x"onerror="alert(1)](https://a.b)',
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?x <script>alert(1)</script>?>",
    "<details ontoggle=alert(1) open>",
    "<details open ontoggle='alert(1)'>x</details>",
    "<p style='position:fixed;inset:0'>covers all</p>",
    "<div class='navbar-fixed-top'>x</div>",
    "<input class=score>",
    "<form action=/api><button>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<base href=https://example.org>",
    "<link rel=stylesheet href=https://example.org>",
    "<style>@import 'https://example.org'</style>",
    "<textarea></p><script>alert(1)</script>",
    '<title><p title="</title><script>alert(1)</script>">',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<xmp><p></xmp><script>alert(1)</script>",
    "<plaintext>",
    '<a\nhref=\n"javascript:alert(1)">x</a>',
    '<a/href="javascript:alert(1)">x</a>',
    "<p\x0conclick=alert(1)>x",
    "</script><script>alert(1)</script>",
    "$<script>alert(1)</script>$",
    "$$\n<img src=x onerror=alert(1)>\n$$",
    "\\\\(<img src=x onerror=alert(1)>\\\\)",
    "\\begin{a}<script>alert(1)</script>\\end{a}",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\let\\x=\\href \\x{javascript:alert(1)}{x}$",
    '$\\mmlToken{mi}[href="javascript:alert(1)"]{x}$',
    "$\\style{position:fixed}{x}$",
    "$\\require{x}$",
    "```mermaid\ngraph TD; A[<img src=x onerror=alert(1)>]\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "````\n```\n````\n<script>alert(1)</script>",
    "# <script>alert(1)</script>",
    '# x" onmouseover="alert(1)',
    "[^1]\n\n[^1]: <script>alert(1)</script>",
    "| <script>alert(1)</script> |\n|--|\n| <img src=x onerror=alert(1)> |",
    "![x](attachment:absent.png)",
    "\u2028<script>alert(1)</script>",
    '<ſcript>alert(1)</ſcript><a href="javaſcript:alert(1)">',
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_cell_runs_anything_in_the_instructors_browser(formgrader, attack):
    bundle = {"text/html": attack, "text/markdown": attack, "text/latex": attack}
    shown = [
        {"output_type": "display_data", "data": bundle | {"image/svg+xml": attack}},
        {"output_type": "display_data", "data": {"application/javascript": attack}},
        {
            "output_type": "display_data",
            "data": {"image/png": b64(png())},
            "metadata": {"image/png": {"alt": attack, "width": attack}, "filenames": bundle},
        },
        {"output_type": "execute_result", "data": {"text/plain": attack}},
        {"output_type": "stream", "name": attack, "text": attack},
        {"output_type": "error", "ename": attack, "evalue": attack, "traceback": [attack]},
    ]
    marks = {"grade_id": "why", "grade": True, "solution": True, "points": 1, "locked": False}
    answer = prose(attack, metadata={"nbgrader": marks})
    notebook = notebook_of(
        prose(attack),
        answer,
        prose(attack, attachments={"a.png": {"image/svg+xml": attack}}),
        nbformat.v4.new_raw_cell(attack, metadata={"raw_mimetype": "text/html"}),
        code(attack),
    )
    answer.metadata["tags"] = [attack]
    notebook.cells[-1].metadata = {"magics_language": attack, "alt": attack, "nbgrader": attack}
    notebook.metadata = {"title": attack, "language_info": {"pygments_lexer": attack}}
    done = executed(notebook, {4: outcome(*shown, error=(attack, attack))})
    page = formgrader(done)
    answered = formgrader(executed(notebook_of(prose("", metadata={"nbgrader": marks})), {}))
    assert dangers(page) == dangers(answered)


@pytest.mark.parametrize("source", [a for a in ATTACKS if a.startswith("$\\")])
def test_formulas_that_act_are_not_typeset(source):
    assert executed(notebook_of(prose(source)), {}).cells[0].source.startswith(AS_SOURCE)


def test_the_search_for_dangers_finds_them(formgrader):
    unsafe = notebook_of(prose("<script>alert(1)</script>"), prose("[x](javascript:alert(1))"))
    assert len(dangers(formgrader(unsafe))) == len(formgrader.empty) + 2


PIECES = st.lists(
    st.sampled_from(
        "< > </ <! <!-- --> <? \" ' = & &quot; &lt; &#60; ` `` ``` ~~~ $ $$ [ ] ( ) ]( ![ * _ # | "
        "|-|-| \n \n\n \t \\ \\( \\) \\[ script img svg onerror=alert(1) src=x href= javascript: "
        "style a p div details summary title alt https://a.b attachment:a.png data: / > - 1. :--: "
        "<p> </p> <a <img <p <script> <div> <pre> <b> [x]: [^1] [^1]: \u2028 \x0b \x0c \xa0".split(
            " "
        )
    )
    | st.text(max_size=3),
    max_size=25,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(PIECES)
@example(["<p>", '<a href="https://a.b">', "<img ", "src=x onerror=alert(1)>"])
def test_prose_that_is_kept_renders_to_nothing_dangerous(pieces):
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    source = executed(notebook_of(prose("".join(pieces))), {}).cells[0].source
    assert dangers(f"<body>{markdown2html_mistune(source)}</body>") == []


def test_unsafe_prose_is_shown_as_its_source(formgrader):
    source = "text with ``` and <script>alert(1)</script>"
    done = executed(notebook_of(prose(source)), {})
    assert done.cells[0].source == f"{AS_SOURCE}\n\n````\n{source}\n````"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in formgrader(done)


def test_pasted_pictures_are_kept_with_the_words_around_them(formgrader):
    pasted = prose("see ![x](attachment:a.png)", attachments={"a.png": {"image/png": b64(png())}})
    done = executed(notebook_of(pasted), {})
    assert done.cells[0] == pasted
    assert f"data:image/png;base64,{b64(png())}" in formgrader(done)


@pytest.mark.slow
def test_prose_that_takes_long_to_render_is_not_rendered():
    import time

    cells = [prose("\\begin{a}" * 2000 + str(i)) for i in range(300)]
    started = time.process_time()
    done = executed(notebook_of(*cells, prose("[" * 10**6)), {})
    assert time.process_time() - started < 20
    assert done.cells[-1].source.startswith(AS_SOURCE)
    assert sum(len(cell.source) for cell in cells) > MOST_PROSE
