"""Damaged notebooks: healed where the intent is clear, and told; otherwise a reason."""

import json
from copy import deepcopy

from .kit import FULL, NOTHING, ONLY_MEAN, ONLY_SOFTMAX, WRONG, cells_of, collector

CASES, case = collector("damaged")


def unreadable(name: str, content, reason: str) -> None:
    """Add the case of a file that is no notebook; `content` is its bytes or makes them."""

    def build(kit) -> bytes:
        return content(kit) if callable(content) else content

    build.__name__ = name
    case(NOTHING, reason, status="damaged")(build)


unreadable("empty", b"", "empty")
unreadable("blank", b" \n\t\n", "empty")
unreadable("nul_bytes", bytes(4096), "empty|not JSON")
unreadable("cut_in_half", lambda kit: kit.hand_in()[:3000], "not JSON")
unreadable("noise", bytes(range(256)) * 40, "not JSON|not UTF-8")
unreadable("a_list", b"[1, 2, 3]", "no notebook")
unreadable("an_empty_object", b"{}", "no notebook")
unreadable(
    "cells_that_are_a_number",
    b'{"cells": 3, "metadata": {}, "nbformat": 4}',
    "no notebook|no valid|no cells",
)
unreadable(
    "cells_that_are_no_cells",
    b'{"cells": [1, null, "x", []], "nbformat": 4, "metadata": {}}',
    "no ",
)
unreadable(
    "nested_deeply",
    b'{"cells": ' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "nested too deeply|no notebook",
)
unreadable("objects_nested_deeply", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply")
unreadable(
    "a_web_page", b"<!DOCTYPE html><html><title>w99_sample</title></html>", "web page|not JSON"
)
unreadable("a_zip_file", b"PK\x03\x04" + bytes(200), "zip|not JSON|not UTF-8")
unreadable(
    "merge_conflict",
    lambda kit: kit.hand_in().replace(
        b'"# Exercise softmax', b'<<<<<<< HEAD\n"a",\n=======\n>>>>>>> mine\n"# Exercise softmax'
    ),
    "merge|not JSON",
)
unreadable(
    "larger_than_allowed",
    lambda kit: b" " * (21 * 2**20) + kit.hand_in(),
    "20 MiB|larger than|too large",
)
unreadable(
    "more_cells_than_allowed",
    lambda kit: kit.edited(lambda data: data["cells"].extend([data["cells"][0]] * 2001)),
    "2,?000 cells",
)
unreadable(
    "millions_of_values",
    lambda kit: b'{"cells": [], "metadata": {"x": [' + b"1," * 6_000_000 + b"1]}}",
    "values|no cells",
)
unreadable(
    "another_course",
    lambda kit: (
        b'{"cells": [{"cell_type": "code", "metadata": {}, "source": "1 + 1"}],'
        b' "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    ),
    "no graded cell",
)
unreadable(
    "another_language",
    lambda kit: json.dumps(
        {
            "cells": [{"cell_type": "code", "metadata": {}, "source": "x <- c(1, 2)\nprint(x)"}],
            "metadata": {"kernelspec": {"name": "ir", "language": "R", "display_name": "R"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    ).encode(),
    "no graded cell| R",
)


# Healed: files


@case(FULL)
def a_byte_order_mark(kit):
    return b"\xef\xbb\xbf" + kit.hand_in()


@case(FULL)
def windows_line_ends(kit):
    return kit.hand_in().replace(b"\n", b"\r\n").replace(b"\\n", b"\\r\\n")


@case(FULL, notes="UTF-8|utf-16|encoding|Unicode")
def sixteen_bits(kit):
    """UTF-16 with a byte order mark, as an old Windows editor saves it."""
    return kit.hand_in().decode().encode("utf-16")


@case(FULL, notes="UTF-8")
def one_damaged_byte(kit):
    return kit.hand_in().replace(b"What was new", b"What was \xff new")


@case(FULL, notes="end")
def garbage_behind_the_end(kit):
    return kit.hand_in() + b'\n{"cells": []} trailing'


@case(FULL)
def not_a_number(kit):
    """NaN and Infinity, which are no JSON, where a number stood."""

    def edit(data):
        data["metadata"]["progress"] = float("nan")
        data["cells"][3]["metadata"]["seconds"] = float("inf")

    return kit.edited(edit)


@case(FULL)
def keys_twice(kit):
    return kit.hand_in().replace(b'"nbformat": 4', b'"nbformat": 3,\n "nbformat": 4')


@case(FULL)
def half_a_character(kit):
    return kit.hand_in().replace(b"What was new", b"What was \\ud83d")


# Healed: formats


@case(FULL)
def format_3(kit):
    import nbformat

    return nbformat.writes(nbformat.convert(kit.notebook(), 3), version=3).encode()


@case(FULL)
def format_2(kit):
    """Worksheets, and code under the name input; nothing of the metadata is left."""

    def edit(data):
        cells = []
        for cell in data["cells"]:
            text = "input" if cell["cell_type"] == "code" else "source"
            cells.append({"cell_type": cell["cell_type"], text: "".join(cell["source"])})
        return {"metadata": {"name": ""}, "nbformat": 2, "worksheets": [{"cells": cells}]}

    return kit.edited(edit)


@case(FULL)
def format_of_the_future(kit):
    def edit(data):
        data |= {"nbformat": 5, "nbformat_minor": 99, "signature": {"kind": "new"}}
        for cell in data["cells"]:
            cell["novelty"] = {"x": 1}

    return kit.edited(edit)


@case(FULL)
def an_unknown_kernel(kit):
    def edit(data):
        data["metadata"]["kernelspec"] = {"name": "conda-env-mine-py", "display_name": "mine"}

    return kit.edited(edit)


@case(FULL, notes="R|Python")
def a_kernel_of_another_language(kit):
    """The code is Python all the same."""

    def edit(data):
        data["metadata"]["kernelspec"] = {"name": "ir", "display_name": "R", "language": "R"}
        data["metadata"]["language_info"] = {"name": "R"}

    return kit.edited(edit)


@case(FULL)
def metadata_of_every_wrong_type(kit):
    def edit(data):
        odd = [None, 3, [], "x", {"nbgrader": "x"}, {"nbgrader": {"grade_id": ["softmax"]}}]
        for number, cell in enumerate(data["cells"]):
            cell["metadata"] = odd[number % len(odd)]
            cell["outputs"] = [{"output_type": number}, None, "x"]
            cell["execution_count"] = "seven"
            cell["attachments"] = [1]
        data["metadata"] = None

    return kit.edited(edit)


@case(FULL)
def sources_of_every_type(kit):
    """A list of lines, one text, and nothing."""

    def edit(data):
        for number, cell in enumerate(data["cells"]):
            if number % 2:
                cell["source"] = "".join(cell["source"])
        data["cells"] += [
            {"cell_type": "code", "metadata": {}, "source": source, "id": f"odd-{number}"}
            for number, source in enumerate([None, 3, [1, None, "x = 1"], {"a": 1}])
        ]

    return kit.edited(edit)


# Healed: cells


@case(FULL)
def stripped_metadata(kit):
    """What nbstripout and Colab leave: the ids."""

    def edit(data):
        for cell in data["cells"]:
            cell["metadata"] = {}
        data["metadata"] = {}

    return kit.edited(edit)


@case(FULL)
def stripped_of_everything(kit):
    """Neither metadata nor ids: the comments that the build wrote are left."""

    def edit(data):
        for cell in data["cells"]:
            cell.pop("id")
            cell["metadata"] = {}

    return kit.edited(edit)


@case(FULL, notes="name that it defines|found")
def stripped_of_its_comments_too(kit):
    """An answer is found by the name that its exercise asks for."""

    def edit(data):
        for cell in data["cells"]:
            lines = "".join(cell["source"]).split("\n")
            kept = [line for line in lines if not line.startswith(("# Exercise", "# Check"))]
            cell["source"] = "\n".join(kept)
            cell.pop("id")
            cell["metadata"] = {}

    return kit.edited(edit)


@case(FULL, notes="2 times")
def a_copied_cell(kit):
    """A wrong answer above, the right one in the copy below: the last counts."""

    def edit(data):
        cells = cells_of(data)
        place = data["cells"].index(cells["softmax"])
        wrong = deepcopy(cells["softmax"])
        wrong["source"] = "# Exercise softmax\ndef softmax(scores):\n    return scores"
        data["cells"].insert(place, wrong)

    return kit.edited(edit)


@case(FULL, notes="2 times")
def a_copied_stub(kit):
    """The answer, and below it the cell as it was released: the answer counts."""

    def edit(data):
        stub = next(cell for cell in kit.released().cells if cell.id == "softmax")
        place = data["cells"].index(cells_of(data)["softmax"])
        data["cells"].insert(place + 1, json.loads(json.dumps(stub)))

    return kit.edited(edit)


@case((0.0, 0.0, 2.0), "^not answered yet|^softmax is not defined", notes="delet|put back")
def a_deleted_answer(kit):
    def edit(data):
        data["cells"].remove(cells_of(data)["softmax"])

    return kit.edited(edit)


@case(FULL, notes="delet|put back")
def deleted_checks(kit):
    def edit(data):
        data["cells"] = [
            c for c in data["cells"] if not c["id"].endswith(("-example", "-overflow"))
        ]

    return kit.edited(edit)


@case(FULL)
def deleted_prose(kit):
    """Only code is left, and not the first cell."""

    def edit(data):
        code = [cell for cell in data["cells"] if cell["cell_type"] == "code"]
        data["cells"] = [*code[1:], *(c for c in data["cells"] if c["id"].startswith("why_max"))]

    return kit.edited(edit)


@case(FULL)
def renamed_cells(kit):
    """Ids of the student's own, and grade ids with a letter changed."""

    def edit(data):
        for number, cell in enumerate(data["cells"]):
            cell["id"] = f"mine-{number}"
            if marks := cell["metadata"].get("nbgrader"):
                marks["grade_id"] = marks["grade_id"].replace("s", "z")

    return kit.edited(edit)


@case(FULL)
def ids_twice(kit):
    def edit(data):
        for cell in data["cells"]:
            if "nbgrader" in cell["metadata"]:
                cell["id"] = "same"

    return kit.edited(edit)


@case(FULL)
def checks_above_their_answers(kit):
    """Reordered: the last cells come first."""

    def edit(data):
        cells = cells_of(data)
        for name in ("softmax-example", "running_mean-example"):
            data["cells"].remove(cells[name])
            data["cells"].insert(0, cells[name])

    return kit.edited(edit)


@case(FULL)
def exercises_in_another_order(kit):
    def edit(data):
        cells = cells_of(data)
        place = data["cells"].index(cells["softmax"])
        for name in ("running_mean-example", "running_mean"):
            data["cells"].remove(cells[name])
            data["cells"].insert(place, cells[name])

    return kit.edited(edit)


@case(FULL, notes="code cell")
def an_answer_typed_as_text(kit):
    def edit(data):
        cells_of(data)["softmax"]["cell_type"] = "markdown"

    return kit.edited(edit)


@case(FULL, notes="several cells|found|two")
def an_answer_over_two_cells(kit):
    """A helper stays in the answer's cell, the function moved into a cell of its own below."""

    def edit(data):
        cells = cells_of(data)
        place = data["cells"].index(cells["softmax"])
        below = {
            "cell_type": "code",
            "metadata": {},
            "id": "below",
            "outputs": [],
            "execution_count": None,
        }
        below["source"] = kit.solution("softmax")
        cells["softmax"]["source"] = "# Exercise softmax\nhelper = 1"
        data["cells"].insert(place + 1, below)

    return kit.edited(edit)


@case(FULL)
def answers_in_one_cell(kit):
    """Both answers were joined into the first one's cell."""

    def edit(data):
        cells = cells_of(data)
        cells["softmax"]["source"] = "\n\n".join(
            "".join(cells[name]["source"]) for name in ("softmax", "running_mean")
        )
        data["cells"].remove(cells["running_mean"])

    return kit.edited(edit)


@case(
    ONLY_SOFTMAX,
    "^the answer cell stopped with SyntaxError|^RunningMean is not defined",
)
def an_answer_with_merge_marks(kit):
    """A conflict inside one cell costs that cell."""
    return kit.hand_in(
        running_mean="<<<<<<< HEAD\nclass RunningMean: pass\n=======\n>>>>>>> mine\n"
    )


@case(ONLY_MEAN, WRONG, notes="check")
def an_answer_inside_the_check(kit):
    """The check's cell was edited, and holds another softmax that suits it; the answer's counts."""

    def edit(data):
        check = cells_of(data)["softmax-example"]
        check["source"] = ["expect = print\n", *check["source"]]

    return kit.edited(edit, softmax="def softmax(scores):\n    return scores")
