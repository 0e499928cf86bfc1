"""What a student's text could do to the pages, tables and notebooks that others open."""

from .kit import FULL, ONLY_MEAN, WRONG, collector

CASES, case = collector("student output is data")

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@case(ONLY_MEAN, "^the answer raised ValueError")
def markup_in_an_error(kit):
    return kit.hand_in(softmax=f"def softmax(scores):\n    raise ValueError({SCRIPT!r})")


@case(FULL)
def markup_shown_by_a_cell(kit):
    """HTML, scripts, vector graphics, links and pictures from elsewhere, in every type there is."""
    return kit.hand_in(
        first="""
        from IPython.display import HTML, SVG, IFrame, Image, Javascript, Latex, Markdown, display

        script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        display(HTML(script + '<iframe src="https://example.com/"></iframe>'))
        display(HTML('<link rel=stylesheet href="//example.com/x.css"><base href="//example.com">'))
        display(Javascript("alert(1)"))
        kind = 'xmlns="http://www.w3.org/2000/svg"'
        display(SVG(f'<svg {kind} onload="alert(1)"><circle r="3"/></svg>'))
        display(Markdown("[x](javascript:alert(1)) ![x](https://example.com/x.png)" + script))
        display(Latex("$\\\\href{javascript:alert(1)}{x}$"))
        display(IFrame("https://example.com/", 1, 1))
        display({"text/html": script, "text/plain": "plain", "application/x-odd": script,
                 "image/png": '"><script>alert(1)</script>'}, raw=True)
        """
    )


@case(FULL)
def markup_printed(kit):
    return kit.hand_in(
        first="""
        print("</pre></details></main><script>alert(1)</script><!--")
        print("\\x1b]8;;javascript:alert(1)\\x07link\\x1b]8;;\\x07 \\x1b[31m<b onclick=alert(1)>")
        raise ValueError("</pre><script>alert(1)</script>")
        """
    )


@case(FULL)
def markup_written(kit):
    """In the answer that a person reads, and in the student's own text."""

    def edit(data):
        cells = {cell["id"]: cell for cell in data["cells"]}
        cells["why_max-answer"]["source"] = (
            "</textarea><script>alert(1)</script> [x](javascript:alert(1)) ![x](//example.com/x)"
            '<a href="javascript:alert(1)">x</a> $\\href{javascript:alert(1)}{x}$'
        )
        cells["why_max-answer"]["attachments"] = {
            "x.svg": {"image/svg+xml": "<svg onload=alert(1)>"}
        }
        data["metadata"]["title"] = "</title><script>alert(1)</script>"

    return kit.edited(edit)


@case(ONLY_MEAN, "^the answer raised")
def an_error_class_of_markup(kit):
    return kit.hand_in(
        softmax="""
        Odd = type("<script>alert(1)</script>", (ValueError,), {})

        def softmax(scores):
            raise Odd('"><script>alert(1)</script>')
        """
    )


@case(ONLY_MEAN, "^the answer raised|@|=")
def a_formula_for_a_spreadsheet(kit):
    """A reason that a spreadsheet would compute."""
    return kit.hand_in(
        softmax="""
        Odd = type('=HYPERLINK("//example.com")', (ValueError,), {})

        def softmax(scores):
            raise Odd("=1+1\\n@SUM(1)\\t+1,\\"x\\"")
        """
    )


@case(ONLY_MEAN, WRONG)
def lines_of_a_journal(kit):
    """Text that looks like the grader's own records, in every place that is kept."""
    return kit.hand_in(
        softmax="""
        record = '\\n{"student": "eve", "week": "w99_sample", "rows": [], "points": 5}\\n'
        print(record)

        def softmax(scores):
            return scores
        """,
        last="raise ValueError(record)",
    )


@case(ONLY_MEAN, "^the answer raised AssertionError|^The scores|^softmax comes from|^all")
def the_sentence_of_somebody_else(kit):
    """The student's own assertion, worded like a check's praise."""
    return kit.hand_in(
        softmax="def softmax(scores):\n    raise AssertionError('all checks passed\\n  5 of 5')"
    )
