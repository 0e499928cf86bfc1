"""Runs a student's cells as a notebook would, in a process of the student's own.

`Shell` is made once, in the warm parent, where it loads and rehearses what a first cell needs; the
forked children use it. Nothing is opened before the fork: no thread, no pipe, no event loop, no
history file, because a fork would share them among students.

What the shell shows is what ipykernel shows (its `ZMQInteractiveShell` is the model here), but for
progress bars, which are collapsed, and for the limit on all output.

In the child, descriptors 0, 1 and 2 must be open, on /dev/null best: the first cell puts pipes into
the places of 1 and 2. Outside a cell, SIGINT is ignored and all output is dropped.
"""

import asyncio
import ctypes
import importlib
import inspect
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

from IPython.core import page
from IPython.core.autocall import ZMQExitAutocall
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import StdinNotImplementedError
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Any, Type

from .capture import Pipes, Recorder, Stream, words_of

INLINE = "module://matplotlib_inline.backend_inline"
ENVIRONMENT = {
    "MPLBACKEND": INLINE,
    # What ipykernel sets, so that programs do not wait for a key in a pager.
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    # The sandbox has no network: say at once that a package is missing, do not try five times.
    "PIP_NO_INDEX": "1",
    "PIP_RETRIES": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}

# What IPython imports when a cell, a magic or an error first needs it.
REHEARSED = (
    *("bdb", "getpass", "termios", "IPython.core.logger", "IPython.core.debugger"),
    *("IPython.core.magics.execution", "IPython.core.magics.osm", "IPython.core.magics.script"),
    *("IPython.core.magics.packaging", "IPython.core.magics.pylab", "pygments.lexers.python"),
)


class Shell:
    """A notebook's kernel without its sockets. `namespace` is where the cells' names live."""

    def __init__(self, output_bytes):
        self._recorder = Recorder(output_bytes)
        InteractiveShell.clear_instance()
        self._notebook = _Notebook.instance(recorder=self._recorder)
        self.namespace = self._notebook.user_ns
        self._pipes = self._loop = None  # each child has its own
        _rehearse(self._notebook)

    def run(self, source):
        """Run a cell; return its outputs as nbformat writes them, and its error's (name, value).

        An error of None means that the cell ran to its end.
        """
        if self._pipes is None:
            self._move_in()
        self._recorder.begin()
        error = None
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            error = self._execute(source)
        except BaseException as trouble:  # an interrupt just before or after the student's code
            error = trouble
        finally:
            _ignore_interrupts()
        _flush_c_streams()
        self._pipes.drain()
        outputs = self._recorder.end()
        return outputs, None if error is None else words_of(error)

    def _move_in(self):
        """What a forked child needs of its own before its first cell."""
        self._pipes = Pipes(self._recorder)
        self._recorder.before = self._pipes.drain
        sys.stdout = Stream("stdout", 1, self._recorder)
        sys.stderr = Stream("stderr", 2, self._recorder)
        os.environ.update(ENVIRONMENT)
        sys.argv[:] = ["ipykernel_launcher.py"]
        if "" not in sys.path:
            sys.path.insert(0, "")  # the notebook's folder, where %%writefile puts modules
        _refuse_input()
        # Between cells the grader calls the student's functions, which may use get_ipython().
        self._notebook.builtin_trap.activate()

    def _execute(self, source):
        """Run a cell inside a running event loop, as ipykernel does; return its error."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(self._notebook.run_notebook_cell(source))
        try:
            result = self._loop.run_until_complete(task)
        except KeyboardInterrupt:
            if task.done():
                raise
            # It came while the cell awaited something: end that, and show where.
            task.cancel()
            result = self._loop.run_until_complete(task)
        early = result.error_before_exec
        return result.error_in_exec if early is None else early


class _Publisher(DisplayPublisher):
    """Takes what `display` shows."""

    recorder = Any()

    def publish(self, data, metadata=None, *, transient=None, update=False, **kwargs):
        self._validate_data(data, metadata)
        self.shell.recorder.before()
        display_id = (transient or {}).get("display_id")
        if update:
            self.shell.recorder.update(data, metadata, display_id)
        else:
            self.shell.recorder.show("display_data", data, metadata, display_id=display_id)

    def clear_output(self, wait=False):
        self.shell.recorder.before()
        self.shell.recorder.clear(wait)


class _Result(DisplayHook):
    """Takes the value of a cell's last line."""

    def write_output_prompt(self):
        pass

    def write_format_data(self, format_dict, md_dict=None):
        self.shell.recorder.before()
        count = self.prompt_count
        self.shell.recorder.show("execute_result", format_dict, md_dict, count=count)

    def finish_displayhook(self):
        self._is_active = False


class _Compiler(CachingCompiler):
    """Names a cell as a file that does not exist, as ipykernel does: tracebacks are quick then."""

    def get_code_name(self, raw_code, code, number):
        return super().get_code_name(raw_code, code, number).strip("<>") + ".py"

    def cache(self, *given, **named):
        name = super().cache(*given, **named)
        # Or inspect looks through all loaded modules, for each line of a traceback.
        inspect.modulesbyfile[os.path.abspath(name)] = "__main__"
        return name


class _Notebook(InteractiveShell):
    """IPython's shell with a recorder where ipykernel has sockets."""

    compiler_class = Type(_Compiler)
    displayhook_class = Type(_Result)
    display_pub_class = Type(_Publisher)
    recorder = Any()

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.exiter = ZMQExitAutocall(self)
        self.user_ns.update(exit=self.exiter, quit=self.exiter)
        self.user_ns_hidden.update(exit=self.exiter, quit=self.exiter)
        self.db = {}  # %cd keeps its places here: in memory, not in a home folder
        self.register_magic_function(lambda line: None, magic_name="autosave")

    # A profile folder, a history file with its thread, and another environment's packages.

    def init_ipython_dir(self, ipython_dir):
        pass

    def init_profile_dir(self, profile_dir):
        pass

    def init_virtualenv(self):
        pass

    def init_history(self):
        self.config.HistoryManager.enabled = False
        self.config.HistoryManager.hist_file = ":memory:"
        super().init_history()

    @contextmanager
    def _tee(self, channel):
        """Keep no second copy of what is printed: IPython's history has no limit."""
        yield

    def _format_exception_for_storage(self, exception, *given, **named):
        """Format no traceback a second time, for that history."""
        return {}

    # What a notebook shows.

    async def run_notebook_cell(self, source):
        trouble = None
        try:
            transformed = self.transform_cell(source)
        except Exception:
            transformed, trouble = source, sys.exc_info()
        result = None
        try:
            result = await self.run_cell_async(
                source,
                store_history=True,
                transformed_cell=transformed,
                preprocessing_exc_tuple=trouble,
            )
        finally:
            self.events.trigger("post_execute")
            self.events.trigger("post_run_cell", result)
        return result

    def _showtraceback(self, etype, evalue, stb):
        self.recorder.before()
        self.recorder.error(etype, evalue, stb)

    def init_hooks(self):
        super().init_hooks()
        # A notebook shows `name?` beside the page, not in the cell's output.
        self.set_hook("show_in_pager", page.as_hook(lambda *given, **named: None), 99)

    def ask_exit(self):
        """Go on: exit() at the end of a notebook is no reason to lose what stands above it."""

    def system(self, command):
        """Run `!command`; its two streams come out as one, as from ipykernel's terminal."""
        if command.rstrip().endswith("&"):
            raise OSError("Background processes not supported.")
        command = self.var_expand(command, depth=1)
        self.recorder.before()
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=1, stderr=1)
        self.user_ns["_exit_code"] = done.returncode

    # Every figure is shown inline: there is no window and no browser to draw in.

    def enable_gui(self, gui=None):
        pass

    def enable_matplotlib(self, gui=None):
        return super().enable_matplotlib("inline")


# libtorch, zmq and the like are loaded once; names here are looked up in what is loaded.
_c_library = ctypes.CDLL(None)


def _flush_c_streams():
    """Bring what lies in Python's own and in C's buffers to the descriptors."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(BaseException):
            stream.flush()
    _c_library.fflush(None)


def _ignore_interrupts():
    """From here on no interrupt cuts anything short, not even one that comes at this moment."""
    while True:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return
        except KeyboardInterrupt:
            continue


def _refuse_input():
    """Nobody is there to answer: say so, in the words that ipykernel uses."""
    import builtins
    import getpass

    def input(prompt="", /):
        raise StdinNotImplementedError(
            "raw_input was called, but this frontend does not support input requests."
        )

    def ask_secretly(prompt="", stream=None, **kwargs):
        raise StdinNotImplementedError(
            "getpass was called, but this frontend does not support input requests."
        )

    builtins.input, getpass.getpass = input, ask_secretly


def _rehearse(notebook):
    """Load before the fork what a first cell, figure and error load, so that no child pays."""
    for module in REHEARSED:
        with suppress(ImportError):
            importlib.import_module(module)
    notebook.transform_cell("!true\n%pwd\nawait x")
    notebook.display_formatter.format({"value": 1.0})
    code = "def f(x):\n    return 1 / x  # a line of each kind\n\nf('0')"
    try:
        exec(compile(code, notebook.compile.cache(code, 0), "exec"), {})
    except TypeError:
        notebook.InteractiveTB.structured_traceback(*sys.exc_info(), tb_offset=0)
    with suppress(ImportError):
        _rehearse_figures(notebook)


def _rehearse_figures(notebook):
    import matplotlib

    matplotlib.use(INLINE)
    import matplotlib.pyplot as plt

    notebook.enable_matplotlib("inline")
    figure, axes = plt.subplots()
    axes.plot([0, 1], label="$x^2$")
    axes.legend()
    notebook.display_formatter.format(figure)
    plt.close(figure)
    switch = plt.switch_backend

    def switch_where_possible(name):
        """matplotlib.use("TkAgg") needs a screen: without one, stay with inline figures."""
        try:
            switch(name)
        except ImportError:
            switch(INLINE)

    plt.switch_backend = switch_where_possible
