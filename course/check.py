"""Runs whole weeks with papermill and says what each one cost.

The solved notebook of a week is built in memory, run from the first cell to the last (training and
plots too) in a temporary folder, and kept with its outputs in build/check/, where a person can look
at the plots. Several weeks run at once, each in a process of its own with its share of the cores.

The two bars are the course's promise to a learner with a laptop: a week ends within 90 seconds and
never needs more than 2 GiB.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

from course.classroom import write_atomically
from course.source import CourseError, read_week, repo_root, week_names

SECONDS_BAR = 90.0
MEMORY_BAR_MIB = 2048.0
SAMPLE_EVERY = 0.1  # seconds between two looks at the memory of a running notebook
# The kernel warns on the terminal that its loopback connection is not encrypted.
QUIET_KERNEL = ["--IPKernelApp.log_level=ERROR"]
TRACEBACK_LINES = 12  # the end of a traceback names the place; the rest is in the kept notebook


@dataclass(frozen=True)
class Failure:
    """Where a notebook stopped. `cell` counts all cells of the solved notebook from 1."""

    cell: int
    cell_id: str
    first_line: str
    error: str
    traceback: str

    @property
    def place(self) -> str:
        """In words. papermill's own cell, which sets the parameters, has no number."""
        if not self.cell_id:
            return "its start, before the first cell"
        return f"cell {self.cell} ({self.cell_id})" if self.cell else "the cell of the parameters"


@dataclass(frozen=True)
class Run:
    """One week, run. `peak_mib` is the most that the kernel and its children held at one time."""

    week: str
    seconds: float
    peak_mib: float
    notebook: str
    failure: Failure | None = None

    @property
    def over(self) -> list[str]:
        """The bars that this run missed, in words."""
        missed = []
        if self.seconds > SECONDS_BAR:
            missed.append(f"over {SECONDS_BAR:.0f} s")
        if self.peak_mib > MEMORY_BAR_MIB:
            missed.append(f"over {MEMORY_BAR_MIB / 1024:.0f} GiB")
        return missed

    def as_json(self) -> dict:
        """The row that `course check --json` prints."""
        return asdict(self) | {"status": "failed" if self.failure else "ok", "over": self.over}


def default_jobs() -> int:
    """Two notebooks at once, or one on a single core: each needs memory as well as a core."""
    return min(2, cores())


def cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check(
    weeks: list[str] | None = None,
    *,
    device: str = "cpu",
    scale: str = "cpu",
    data: str = "embedded",
    seed: int = 0,
    jobs: int | None = None,
    folder: Path | None = None,
    to: Path | None = None,
    on_cell: Callable[[str, int, int], None] | None = None,
) -> Iterator[Run]:
    """Run weeks (all of them by default) and yield each Run as it ends.

    `on_cell(week, cell, cells)` is told how far each notebook is. `folder` holds week sources other
    than the course's own. Everything is validated before the first kernel starts.
    Raises: CourseError, for an unknown week, a value that is not offered, or a missing GPU.
    """
    notebooks, parameters, jobs = _plan(weeks, device, scale, data, seed, jobs, folder)
    to = to or repo_root() / "build" / "check"
    to.mkdir(parents=True, exist_ok=True)
    return _run_all(notebooks, parameters, jobs, to, on_cell)


def _plan(weeks, device, scale, data, seed, jobs, folder):
    from course.build import solution_notebook

    for name, value, offered in (
        ("--scale", scale, ("cpu", "gpu")),
        ("--data", data, ("embedded", "hub")),
    ):
        if value not in offered:
            raise CourseError(f"{name} is {value!r}; wanted one of {', '.join(offered)}.")
    if jobs is not None and jobs < 1:
        raise CourseError(f"--jobs is {jobs}; wanted 1 or more.")
    parameters = {"SEED": seed, "DEVICE": resolve_device(device), "SCALE": scale, "DATA": data}
    names = weeks or week_names(folder)
    if not names:
        raise CourseError("There is no week to check: course/weeks holds no wNN_topic.py.")
    notebooks = {name: solution_notebook(read_week(name, folder)) for name in dict.fromkeys(names)}
    return notebooks, parameters, min(jobs or default_jobs(), len(notebooks))


def resolve_device(device: str) -> str:
    """cpu, cuda or auto, made into what this machine has.

    Raises: CourseError, for cuda on a machine whose torch sees none.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise CourseError(f"--device is {device!r}; wanted cpu, cuda or auto.")
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise CourseError(
        "--device is cuda, but torch sees no CUDA device here; use --device cpu, or run "
        "`python -m course doctor` to see what it found."
    )


def _run_all(notebooks, parameters, jobs, to, on_cell) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="course-check-", ignore_cleanup_errors=True) as scratch:
        environment = kernel_environment(Path(scratch), threads=max(1, cores() // jobs))
        if parameters["DATA"] == "embedded":
            environment["HF_HUB_OFFLINE"] = "1"  # proves that the default path needs no network
        events = get_context("spawn").Queue()
        listener = threading.Thread(target=_listen, args=(events, on_cell), daemon=True)
        listener.start()
        try:
            # A fresh process for each notebook: the peak that the operating system reports for a
            # finished kernel is then this kernel's own.
            with process_pool(jobs, environment, events, tasks_per_worker=1) as pool:
                futures = {
                    pool.submit(_run_one, week, notebook, parameters, scratch, str(to)): week
                    for week, notebook in notebooks.items()
                }
                for future in as_completed(futures):
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        raise CourseError(
                            f"The process that ran {futures[future]} was killed, most likely for "
                            "want of memory; close other programs or use --jobs 1."
                        ) from None
        finally:
            # A killed worker may have held the queue's lock: wait for nothing that needs it.
            events.cancel_join_thread()
            events.put(None)
            listener.join(timeout=2)


def _listen(events, on_cell) -> None:
    while (event := events.get()) is not None:
        if on_cell is not None:
            on_cell(*event)


_events = None  # the queue to the parent, set once when a worker starts


def _run_one(week: str, notebook, parameters: dict, scratch: str, to: str) -> Run:
    import nbformat
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    class Reporting(NBClientEngine):
        """papermill's own engine, which also says which cell it starts."""

        @classmethod
        def execute_managed_notebook(cls, manager, kernel_name, **kwargs):
            start = manager.cell_start

            def cell_start(cell, cell_index=None, **more):
                if _events is not None:
                    _events.put((week, cell_index, len(manager.nb.cells)))
                return start(cell, cell_index, **more)

            manager.cell_start = cell_start
            return super().execute_managed_notebook(manager, kernel_name, **kwargs)

    papermill_engines.register("course", Reporting)
    work = Path(scratch) / week
    work.mkdir()
    executed = work / f"{week}.executed.ipynb"
    failed = None
    with peak_memory() as memory:
        started = time.perf_counter()
        try:
            execute_notebook(
                notebook,
                executed,
                parameters=parameters,
                engine_name="course",
                kernel_name="python3",
                extra_arguments=list(QUIET_KERNEL),
                progress_bar=False,
                cwd=work,
            )
        except PapermillExecutionError as error:
            failed = (f"{error.ename}: {error.evalue}", "\n".join(error.traceback))
        except DeadKernelError:
            failed = ("The kernel died: out of memory, or the code ended its own process", "")
        except OSError:
            raise
        except Exception as error:  # the kernel does not start, or talks nonsense
            failed = (f"{type(error).__name__}: {error}", "")
        seconds = time.perf_counter() - started
    result = nbformat.read(executed, as_version=4)
    kept = Path(to) / f"{week}.ipynb"
    write_atomically(kept, executed.read_bytes())
    failure = _describe(notebook, result, *failed) if failed else None
    return Run(week, seconds, memory.mib, str(kept), failure)


def _describe(notebook, executed, error: str, traceback: str) -> Failure:
    """Name the cell that failed by its place in the solved notebook.

    papermill adds cells of its own (parameters, error markers), so places are found by cell id.
    """
    from nbconvert.filters import strip_ansi

    started = [c for c in executed.cells if c.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return Failure(0, "", "", strip_ansi(error), "")
    stopped = started[-1]
    ids = [cell.id for cell in notebook.cells]
    lines = strip_ansi(traceback).rstrip().splitlines()
    return Failure(
        cell=ids.index(stopped.id) + 1 if stopped.id in ids else 0,
        cell_id=stopped.id,
        first_line=next((line for line in stopped.source.splitlines() if line.strip()), ""),
        error=strip_ansi(error),
        traceback="\n".join(lines[-TRACEBACK_LINES:]),
    )


class _Peak:
    mib = 0.0


@contextmanager
def peak_memory() -> Iterator[_Peak]:
    """Measure the most memory that this process's children, taken together, held at one time.

    Two readings, of which the larger counts: the sum over the process tree, sampled, sees a kernel
    with helpers of its own; the operating system's own peak of a finished child sees a spike
    between two samples. Pages that processes share are counted once for each of them.
    """
    import resource

    import psutil

    peak, done = _Peak(), threading.Event()
    this = psutil.Process()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY):
            total = 0
            for child in this.children(recursive=True):
                with suppress(psutil.Error):
                    total += child.memory_info().rss
            peak.mib = max(peak.mib, total / 2**20)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
        peak.mib = max(peak.mib, largest * unit / 2**20)


def kernel_environment(scratch: Path, threads: int = 1) -> dict[str, str]:
    """Environment variables under which notebooks run with this Python and leave nothing behind.

    The kernel called python3 must be this environment's, whatever the user has registered;
    nbgrader runs `alembic` from PATH when it makes a gradebook; a profile in the home folder must
    not change results; connection files and temporary files go where they are removed.
    """
    binaries = str(Path(sys.executable).parent)
    for name in ("runtime", "ipython", "tmp"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.pathsep.join([binaries, os.environ.get("PATH", os.defpath)]),
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "TMPDIR": str(scratch / "tmp"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def process_pool(
    jobs: int, environment: dict[str, str], events=None, tasks_per_worker: int | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers are gone when the block is left, also by Ctrl-C or an error.

    Workers lead their own session, so that Ctrl-C reaches only the parent, which ends them; and a
    worker whose parent was killed ends itself, and with it its kernel.
    """
    before = set(active_children())
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(environment, os.getpid(), events),
        max_tasks_per_child=tasks_per_worker,
    )
    try:
        yield pool
    except BaseException:
        for worker in set(active_children()) - before:
            kill_tree(worker.pid)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def kill_tree(pid: int) -> None:
    """End everything a process started, in other sessions too, and then the process itself."""
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


def _start_worker(environment: dict[str, str], parent: int, events) -> None:
    global _events
    _events = events
    os.environ.update(environment)
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
