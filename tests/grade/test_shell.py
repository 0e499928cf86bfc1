"""The student's shell: it shows what a notebook shows, and nothing brings it down or fills it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import course.grade

MIB = 2**20
# As in the sandbox, the folder `inside` is a package of its own and there is one warm parent, in
# which nothing but the shell was made; each line that it reads is a notebook for a forked child.
PARENT = """
import json, os, sys, threading, time
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
from inside.shell import Shell
shell = Shell(2**20)
print(json.dumps({"tasks": len(os.listdir("/proc/self/task")), "files": os.listdir(".")}))
sys.stdout.flush()
for line in sys.stdin:
    answers, writer = os.pipe()
    if os.fork() == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        records = []
        for source in json.loads(line):
            started = time.process_time()
            outputs, error = shell.run(source)
            records.append((outputs, error, time.process_time() - started))
        with os.fdopen(writer, "w") as file:
            json.dump(records, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(answers) as file:
        answer = file.read()
    status = os.wait()[1]
    print(answer or json.dumps(status), flush=True)
"""


class Notebook:
    """The warm parent, and a way to run cells in a fresh child of it."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, Path(course.grade.__file__).parent],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
            | {"HOME": str(folder), "OPENBLAS_NUM_THREADS": "1"},
        )
        self.start = json.loads(self.process.stdout.readline())

    def records(self, *cells):
        self.process.stdin.write(json.dumps(cells) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *cells):
        """The outputs and the error of the last cell."""
        return self.records(*cells)[-1][:2]

    def text(self, *cells, name="stdout"):
        return "".join(o["text"] for o in self.run(*cells)[0] if o.get("name") == name)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    yield notebook
    notebook.process.stdin.close()
    notebook.process.wait(10)
    notebook.process.stdout.close()


# What a cell shows


def test_a_cell_shows_its_last_value_and_the_next_ones_remember_it(notebook):
    first, second = notebook.records("20 + 1", "_ * 2, _1, Out[1], In[1], __name__")
    assert first[0] == [
        {
            "output_type": "execute_result",
            "data": {"text/plain": "21"},
            "metadata": {},
            "execution_count": 1,
        }
    ]
    assert second[0][0]["data"]["text/plain"] == "(42, 21, 21, '20 + 1', '__main__')"
    assert second[0][0]["execution_count"] == 2


def test_outputs_of_every_kind_come_in_the_order_they_were_made(notebook):
    outputs, error = notebook.run(
        "import ctypes, os, subprocess, sys\n"
        "from IPython.display import display\n"
        "print('one'); os.write(1, b'two\\n'); subprocess.run(['echo', 'three'])\n"
        "print('four'); display(4); print('five', file=sys.stderr); os.system('echo six >&2')\n"
        "get_ipython().system('echo seven; echo eight >&2'); ctypes.CDLL(None).puts(b'nine');"
    )
    assert error is None
    assert [(o.get("name"), o.get("text") or o["data"]["text/plain"]) for o in outputs] == [
        ("stdout", "one\ntwo\nthree\nfour\n"),
        (None, "4"),
        ("stderr", "five\nsix\n"),
        ("stdout", "seven\neight\nnine\n"),
    ]


def test_what_is_written_to_a_descriptor_stays_before_what_is_printed_after_it(notebook):
    source = "import os\nfor i in range(300):\n    n = os.write(1, b'w'); print('p')"
    assert notebook.text(source) == "wp\n" * 300


def test_what_a_cell_writes_last_is_its_own(notebook):
    records = notebook.records("import os", *["n = os.write(1, b'x' * 50_000)"] * 18)
    assert [len(record[0][0]["text"]) for record in records[1:]] == [50_000] * 18


def test_an_error_ends_its_cell_only_and_is_told_with_name_and_message(notebook):
    first, second = notebook.records("print('a')\nx = 1\nraise KeyError('k')\nx = 2", "x")
    outputs, error, _ = first
    assert error == ["KeyError", "'k'"]
    assert [output["output_type"] for output in outputs] == ["stream", "error"]
    assert (outputs[1]["ename"], outputs[1]["evalue"]) == ("KeyError", "'k'")
    assert "----> 3" in re.sub(r"\x1b\[[\d;]*m", "", "".join(outputs[1]["traceback"]))
    assert second[0][0]["data"]["text/plain"] == "1"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def f(:\n", "SyntaxError", r"invalid syntax \(.*\.py, line 1\)"),
        ("raise SystemExit(3)", "SystemExit", "3"),
        ("import sys; sys.exit()", "SystemExit", ""),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
        ("input('name? ')", "StdinNotImplementedError", "raw_input was called, but .*"),
        ("import getpass; getpass.getpass()", "StdinNotImplementedError", "getpass was .*"),
        ("breakpoint()", "StdinNotImplementedError|BdbQuit", ".*"),
        ("%nonsense", "UsageError", "Line magic function .*"),
        ("!sleep 1 &", "OSError", "Background processes not supported."),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError", "maximum recursion depth .*"),
        ("await undefined", "NameError", ".*"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "E", r"\(its .*\)"),
        (
            "raise type('E', (Exception,), {'__bool__': lambda self: 1 / 0})",
            "E|ZeroDivisionError",
            ".*",
        ),
        ("raise ValueError('x' * 10**6)", "ValueError", "x{2000}"),
        ("raise ExceptionGroup('both', [ValueError(1)])", "ExceptionGroup", "both .*"),
    ],
)
def test_whatever_is_raised_is_an_error_and_the_next_cell_runs(notebook, source, name, message):
    failed, after = notebook.records(source, "'alive'")
    assert re.fullmatch(name, failed[1][0])
    assert re.fullmatch(message, failed[1][1])
    assert after[0][0]["data"]["text/plain"] == "'alive'"
    assert sum(len(str(output)) for output in failed[0]) < 50_000


def test_a_process_that_ends_itself_is_not_stopped(notebook):
    assert os.waitstatus_to_exitcode(notebook.records("import os; os._exit(3)")) == 3
    assert notebook.text("print('the next student')") == "the next student\n"


def test_an_interrupt_ends_the_cell_and_leaves_the_next_ones_alone(notebook):
    ring = "import os, threading, time\nthreading.Timer(0.2, os.kill, (os.getpid(), 2)).start()\n"
    for wait in (
        "while True: pass",
        "time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "!sleep 60",
        "import asyncio; await asyncio.sleep(60)",
    ):
        started = time.monotonic()
        stopped, after = notebook.records(ring + wait, "print('alive')")
        assert time.monotonic() - started < 10
        assert stopped[1][0] in ("KeyboardInterrupt", "CancelledError"), wait
        assert [output["output_type"] for output in stopped[0]] == ["error"]
        assert after[0][0]["text"] == "alive\n"


def test_interrupts_between_cells_are_ignored(notebook):
    ring = (
        "import os, threading, time\n"
        "def ring():\n    while True: os.kill(os.getpid(), 2); time.sleep(0.0005)\n"
        "threading.Thread(target=ring, daemon=True).start()"
    )
    records = notebook.records(ring, *["pass"] * 300)
    assert len(records) == 301  # an interrupt outside of a cell would have ended the process
    assert {record[1] and record[1][0] for record in records} <= {
        None,
        "KeyboardInterrupt",
        "CancelledError",
    }


def test_cells_may_await_and_see_a_running_event_loop(notebook):
    assert (
        notebook.text(
            "import asyncio\nseen = []\nasync def later(): seen.append(1)\n"
            "task = asyncio.get_running_loop().create_task(later())",
            "await asyncio.sleep(0); print(seen)",
        )
        == "[1]\n"
    )
    assert notebook.run("import asyncio\nasyncio.run(asyncio.sleep(0))")[1][0] == "RuntimeError"


def test_figures_are_shown_at_the_end_of_their_cell_whatever_window_was_asked_for(notebook):
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    for before in (
        "",
        "%matplotlib inline\n",
        "%matplotlib widget\n",
        "%matplotlib tk\n",
        "import matplotlib; matplotlib.use('TkAgg')\n",
        "%gui qt\n",
    ):
        outputs, error = notebook.run(before + plot)
        assert error is None
        assert [list(output["data"]) for output in outputs] == [["text/plain", "image/png"]]
        assert outputs[0]["data"]["image/png"].startswith("iVBORw0KGgo")
    assert notebook.run("import matplotlib.pyplot as plt\nplt.figure(); plt.close()")[0] == []


def test_a_figure_costs_no_import(notebook):
    modules = "import sys; before = set(sys.modules)"
    plot = "import matplotlib.pyplot as plt; plt.plot([1]); plt.title('$x^2$');"
    assert notebook.text(modules, plot, "1 / 0", "print(set(sys.modules) - before)") == "set()\n"


def test_the_courses_own_figures_carry_their_description_and_one_picture(notebook):
    outputs, _ = notebook.run(
        "from IPython.display import display\n"
        "bundle = {'text/html': '<img src=\"data:image/png;base64,iVBORw0KGgo=\">',\n"
        "          'image/png': 'iVBORw0KGgo=', 'text/plain': 'a line'}\n"
        "display(bundle, raw=True, metadata={'image/png': {'alt': 'a line', 'onload': 'x()'}})"
    )
    assert outputs == [
        {
            "output_type": "display_data",
            "data": {"text/plain": "a line", "image/png": "iVBORw0KGgo="},
            "metadata": {"image/png": {"alt": "a line"}},
        }
    ]


def test_displays_can_be_updated_and_cleared(notebook):
    outputs, _ = notebook.run("h = display('old', display_id='d'); print(1); h.update('new')")
    assert [o.get("text") or o["data"]["text/plain"] for o in outputs] == ["'new'", "1\n"]
    clear = "from IPython.display import clear_output\nfor i in range(3):\n    "
    assert notebook.text(clear + "clear_output(); print(i)") == "2\n"
    assert notebook.text(clear + "print(i); clear_output(wait=True)") == "2\n"


def test_widgets_and_progress_bars_are_text(notebook):
    outputs, error = notebook.run("import ipywidgets\nipywidgets.IntSlider()")
    assert (list(outputs[0]["data"]), error) == (["text/plain"], None)
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(3), ascii=True, ncols=20): pass"
    assert re.fullmatch(r"100%\|.*\|? ?3/3.*\n", notebook.text(bar, name="stderr"))
    assert notebook.run("from tqdm.notebook import tqdm\nfor i in tqdm(range(3)): pass")[1] is None


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (r"print('10%\r100%')", "100%\n"),
        (r"print('long line\rshort')", "shortline\n"),
        (r"print('a\r\nb\r\r\n')", "a\nb\n\n"),
        (r"print('abc\b\bX')", "aXc\n"),
        (r"print('\rab', end='\r'); print('c', end='')", "cb"),
        (r"[print(f'\r{i:06}', end='') for i in range(50_000)]; print()", "049999\n"),
        (r"[print(f'{i}', end='\b' * 5) for i in range(10_000, 60_000)]; print()", "59999\n"),
    ],
)
def test_a_progress_bar_leaves_what_a_terminal_shows_in_the_end(notebook, source, shown):
    assert notebook.text(source + ";") == shown


def test_many_short_returns_in_one_long_line_take_linear_time(notebook):
    source = r"print('x' * 300_000, end=''); print('\r' * 300_000, end=''); print('\ry' * 300_000)"
    (outputs, error, seconds), *_ = notebook.records(source)
    assert error is None
    assert outputs[0]["text"] == "y" + "x" * 299_999 + "\n"
    assert seconds < 5


def test_odd_characters_and_bytes_come_through_or_are_replaced(notebook):
    assert notebook.text(r"print('\ud800 \0 \x1b[31mred')") == "\ud800 \0 \x1b[31mred\n"
    assert (
        notebook.text(r"import os; os.write(1, b'\xff\xc3'); os.write(1, b'\xa9\n');")
        == "\ufffdé\n"
    )


def test_forked_workers_and_threads_print_too(notebook):
    pool = "import multiprocessing\nwith multiprocessing.get_context('fork').Pool(1) as pool:\n"
    assert notebook.text(pool + "    pool.map(print, ['from a worker'])") == "from a worker\n"
    thread = "import threading\nt = threading.Thread(target=print, args=('from a thread',))\n"
    assert notebook.text(thread + "t.start(); t.join()") == "from a thread\n"


def test_a_library_that_kept_an_older_stderr_is_still_heard(notebook):
    said = notebook.text("import sys; print('early', file=sys.__stderr__)", name="stderr")
    assert said == "early\n"


# Limits


def test_output_is_cut_at_the_limit_and_one_line_says_so(notebook):
    first, second, third = notebook.records(
        "print('x' * 1000 * 1000)", "for i in range(10**6): print(i)", "print('more')\n1 / 0"
    )
    kept = [output["text"] for output in first[0] + second[0]]
    assert MIB - 1000 < sum(len(text) for text in kept[:-1]) <= MIB
    assert kept[-1] == "output is cut at 1 MiB\n"
    assert third[:2] == [[], ["ZeroDivisionError", "division by zero"]]


def test_a_picture_above_the_limit_is_left_out(notebook):
    big = "display({'image/png': 'iVBORw0KGgo' + 'A' * 2**20}, raw=True); print('after')"
    assert notebook.run(big)[0] == [
        {"output_type": "stream", "name": "stderr", "text": "output is cut at 1 MiB\n"}
    ]


def test_what_was_cleared_or_overwritten_does_not_count(notebook):
    loop = "from IPython.display import clear_output\nfor i in range(40):\n    "
    assert notebook.text(loop + "clear_output(); print('x' * 99_999)") == "x" * 99_999 + "\n"
    assert notebook.text(loop + r"print('\r' + 'x' * 99_999, end='')") == "x" * 99_999
    pictures = "h = display('x', display_id=True)\nfor i in range(40): h.update('x' * 99_999)"
    assert notebook.run(pictures)[1] is None
    assert len(notebook.run(pictures)[0]) == 1


@pytest.mark.parametrize(
    "flood",
    [
        "for i in range(200): print('x' * 2**20)",
        "import os\nfor i in range(200): os.write(1, b'x' * 2**20)",
        "import subprocess; subprocess.run('head -c 200000000 /dev/zero', shell=True)",
        "!head -c 200000000 /dev/zero",
        "import sys\nfor i in range(10**6): print(i, file=sys.stderr)",
        "import sys\nfor i in range(9_000): print('x' * 999); print('x' * 999, file=sys.stderr)",
        "for i in range(20_000): display(i)",
        "import ctypes; c = ctypes.CDLL(None)\nfor i in range(20): c.puts(b'x' * 10**7)",
    ],
)
def test_a_flood_never_blocks_its_writer_nor_fills_memory(notebook, flood):
    peak = "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    (outputs, error, seconds), *_ = notebook.records(flood)
    assert error is None
    assert sum(len(str(output)) for output in outputs) < 8 * MIB
    assert outputs[-1]["text"] == "output is cut at 1 MiB\n"
    assert seconds < 10
    watched = f"import resource\n{flood}\nm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    grown = notebook.run(peak.replace("print", "a = int"), watched, "m - a")[0]
    assert grown == [] or int(grown[0]["data"]["text/plain"]) < 200_000


def test_a_c_function_that_lets_nobody_else_run_may_print_as_much_as_a_pipe_holds(notebook):
    holds_the_gil = "import ctypes; ctypes.PyDLL(None).puts(b'x' * 1_000_000);"
    assert len(notebook.text(holds_the_gil)) == 1_000_001


def test_what_background_programs_say_between_cells_is_dropped_and_blocks_nobody(notebook):
    talk = "import subprocess; p = subprocess.Popen('while :; do echo x; done', shell=True)"
    started = time.monotonic()
    records = notebook.records(talk, "import time; time.sleep(0.5)", "p.kill(); p.wait();")
    assert [record[1] for record in records] == [None, None, None]
    assert time.monotonic() - started < 20


def test_closed_and_replaced_streams_harm_only_their_owner(notebook):
    for trick in (
        "import os; os.close(1); os.close(2)",
        "import os; os.close(200); os.close(201)",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout = None",
        "import sys; sys.__stdout__.close()",
        "import builtins; builtins.print = None",
    ):
        records = notebook.records(trick, "x = 1", "x")
        assert [record[1] for record in records] == [None, None, None], trick
        assert records[2][0][0]["data"]["text/plain"] == "1"


# What is absent


def test_the_parent_has_one_thread_and_wrote_nothing_into_its_folder(notebook):
    assert notebook.start["tasks"] == 1
    assert not any("ipython" in name for name in notebook.start["files"])


def test_a_child_has_no_history_file_and_one_thread_beside_the_main_one(notebook):
    source = (
        "import os, threading\n"
        "print([t.name for t in threading.enumerate()], len(os.listdir('/proc/self/task')))\n"
        "print([f for f in os.listdir('/proc/self/fd') "
        "if 'sqlite' in os.path.realpath(f'/proc/self/fd/{f}')])"
    )
    assert notebook.text(source) == "['MainThread', 'outputs'] 2\n[]\n"


def test_the_magics_that_notebooks_use_work(notebook):
    (notebook.folder / "sub").mkdir(exist_ok=True)
    for source in (
        "%cd sub",
        "%pwd",
        "%load_ext autoreload\n%autoreload 2",
        "%autosave 0",
        "%timeit -n1 -r1 1",
        "%%time\nx = 1",
        "%%capture out\nprint(1)",
        "%%writefile written.py\nvalue = 5\n",
        "%env A=1",
        "%who",
        "%history",
        "%config InlineBackend.figure_format = 'retina'",
        "len?",
        "exit()",
        "quit",
        "x = !echo listed\nassert x == ['listed']",
        "%%bash\necho x",
    ):
        assert notebook.run(source)[1] is None, source
    assert (
        notebook.text("%%writefile near.py\nvalue = 5", "import near; print(near.value)") == "5\n"
    )


def test_pip_says_at_once_that_there_is_no_network(notebook):
    cell = 'get_ipython().run_line_magic("pip", "install no-such-package-at-all")'
    started = time.monotonic()
    outputs, error = notebook.run(cell)
    assert error is None
    assert "No matching distribution" in str(outputs)
    assert "indexes" not in str(outputs)
    assert notebook.text("import os; print(os.environ['PIP_NO_INDEX'])") == "1\n"
    assert time.monotonic() - started < 20
    assert notebook.run("%pip install -q einops")[1] is None


def test_between_cells_students_functions_find_a_notebook_and_print_into_nothing(notebook):
    at_exit = (
        "import builtins\ndef use():\n    print('x'); display(1)\n"
        "    seen.append(hasattr(builtins, 'get_ipython'))\n"
        "    try: input()\n    except NotImplementedError as e: seen.append(type(e).__name__)\n"
        "seen = []\n"
        # The hook runs in `run`, before the next cell's outputs are recorded.
        "import signal; real = signal.signal\n"
        "def late(*a):\n    signal.signal = real; use(); return real(*a)\n"
    )
    outputs, error = notebook.run(at_exit, "signal.signal = late", "print(seen)")
    assert error is None
    assert outputs[-1]["text"] == "[True, 'StdinNotImplementedError']\n"


# The same as a real kernel

CELLS = """
1 + 1
---
print('out'); import sys; print('err', file=sys.stderr); print('again')
---
def f():
    return g()
def g():
    raise ValueError('deep\\nlines')
f()
---
def f(:
  pass
---
raise SystemExit(3)
---
import warnings; warnings.warn('careful')
---
from IPython.display import display, HTML, Markdown, Latex
display(HTML('<b>x</b>')); display(Markdown('**y**')); display(1, 'two')
Latex('$x$')
---
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.title('t');
---
fig, ax = plt.subplots(2)
---
plt.figure(); plt.show(); print('after'); plt.figure(); plt.plot([3])
---
import pandas
pandas.DataFrame({'a': [1, 2]})
---
%who
---
x = !echo listed
x
---
%%bash
echo b; echo e >&2
---
await __import__('asyncio').sleep(0)
'awaited'
---
len?
---
help(len)
---
%nonsense
---
h = display('first', display_id='k'); h.update('second')
---
from IPython.display import clear_output
print('gone'); clear_output(); print('stays')
---
class A:
    def _repr_html_(self): return '<i>a</i>'
A()
---
class B:
    def __repr__(self): raise RuntimeError('no repr')
B()
---
In[1], Out[1], _1, __name__
---
'quiet';
---
exec('1+')
---
raise ExceptionGroup('g', [ValueError(1)])
---
assert 1 == 2, 'no'
---
import torch
torch.zeros(2)
---
torch.zeros(2).reshape(3)
---
async def c(): raise KeyError('k')
await c()
---
%matplotlib inline
---
import inspect; print(inspect.getsource(g))
---
%%capture cap
print('hidden')
---
cap.stdout
---
%run nofile.py
---
from __future__ import annotations
def q(a: zzz): pass
---
%history -n 1-2
---
raise StopIteration
---
return 1
""".strip().split("\n---\n")


def comparable(outputs):
    """Outputs without what differs from run to run: addresses, file names, how a path in the home
    is written, and the order between the streams, which a kernel sends as they fill."""
    said = {"stdout": "", "stderr": ""}
    others = []
    for output in outputs:
        if output["output_type"] == "stream":
            said[output["name"]] += output["text"]
            continue
        output = {key: value for key, value in output.items() if key != "metadata"}
        for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/")]:
            output["data"] = {**output["data"], kind: output["data"][kind].strip()}
        others.append(output)
    text = re.sub(r"0x[0-9a-f]+", "0x", json.dumps([said, others], sort_keys=True))
    text = text.replace(str(Path.home()), "~")  # the kernel's home, but not the shell's
    text = re.sub(r"/tmp/ipykernel_\d+/\d+\.py|ipython-input-[\w-]+\.py", "CELL", text)
    return json.loads(re.sub(r"\((\d+\.py|CELL), line", "(CELL, line", text))


@pytest.mark.slow
def test_what_is_shown_equals_what_a_real_kernel_shows(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.delenv("MPLBACKEND")  # the tests' own: a kernel sets it for inline figures

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    real = nbformat.v4.new_notebook(cells=cells)
    quiet = ["--IPKernelApp.log_level=ERROR"]
    NotebookClient(
        real,
        timeout=60,
        allow_errors=True,
        kernel_name="python3",
        extra_arguments=quiet,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    for cell, (ours, _, _) in zip(real.cells, notebook.records(*CELLS), strict=True):
        assert comparable(ours) == comparable(cell.outputs), cell.source
