"""Several graders at once, on this machine or on a Dask cluster, with the same promises.

`run` takes submissions as it goes and yields each result as it comes. On this machine each of N
threads has a process of its own that grades (`job.py`). On a cluster the same code runs inside the
workers: the bytes of a submission go out, its result comes back, and the tests are read from the
worker's own checkout. Both hold only a window of submissions in memory at a time.

Every submission has exactly one result, whatever it did to the process that graded it, and no other
submission pays for that. When `run` is left, by Ctrl-C too, all processes end: the graders at once,
their sandboxes within two seconds.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from course.check import cores
from course.grade.job import CLOSE_SECONDS, Closed, Jobs, plan_of, stopped_result
from course.grade.records import Result, Submission
from course.source import CourseError, weeks_folder

Entry = tuple[Submission, str]  # with the digest of the tests that it is to be graded by

ANSWER_SECONDS = 10.0  # until a Dask scheduler must have answered
WORKER_SECONDS = 60.0  # until it must have a worker
MIB_PER_JOB = 1024  # a trusted process and a warm sandbox, each with torch


def run(
    entries: Iterable[Entry],
    settings,
    jobs: int | None = None,
    scheduler: str | None = None,
    make: Callable | None = None,
) -> Iterator[tuple[Result, bytes]]:
    """Grade every entry; yield its result and executed notebook in the order in which they come.

    `settings` is what a Grader takes. `scheduler` is the address of a Dask cluster, whose workers
    see the course's secret and must be trusted. `make` makes a grader out of the settings, if it
    is to be another than `Grader`; it must be importable.
    Raises: CourseError, when a grader cannot be started, the cluster cannot be reached, or the
    tests are no longer those that the entries name; OSError, when the machine is out of something.
    """
    if jobs is not None and jobs < 1:
        raise CourseError(f"--jobs is {jobs}; wanted 1 or more.")
    if jobs is not None and scheduler is not None:
        raise CourseError("--jobs is for this machine; the Dask workers decide about their own.")
    where = Cluster(scheduler, settings, make) if scheduler else Machine(settings, jobs, make)
    at_once = True
    try:
        yield from _as_they_end(entries, settings, where)
        at_once = False
    finally:
        where.close(at_once)


def default_jobs() -> int:
    """As many as there are cores, and as fit into the memory that is free."""
    import psutil

    return max(1, min(cores(), psutil.virtual_memory().available // (MIB_PER_JOB * 2**20)))


def _as_they_end(entries: Iterable[Entry], settings, where) -> Iterator[tuple[Result, bytes]]:
    from course.grade.intake import Damaged, read_submission

    entries, ended, pending = iter(entries), queue.SimpleQueue(), {}
    unreadable = []

    def fill() -> None:
        while len(pending) < where.window and (entry := next(entries, None)) is not None:
            submission, tests = entry
            try:
                content = read_submission(submission)
            except Damaged as damage:
                unreadable.append(_damaged(submission, tests, settings, damage))
                continue
            future = where.submit(submission, content, tests)
            pending[id(future)] = future, submission, content, tests
            future.add_done_callback(ended.put)

    fill()
    while pending or unreadable:
        while unreadable:
            yield unreadable.pop()
        if not pending:
            break
        future = ended.get()
        _, submission, content, tests = pending.pop(id(future))
        result, notebook = where.take(future, submission, content, tests)
        if result.tests_digest != tests:
            raise CourseError(
                f"The tests of {submission.week} are others where {submission.student} was graded "
                f"({where.name}) than where the run began: bring both to the same version of the "
                "course and grade again."
            )
        fill()
        yield result, notebook


def _damaged(submission: Submission, tests: str, settings, damage) -> tuple[Result, bytes]:
    from course.grade.plan import nothing

    digest = sha256(f"no notebook: {damage}".encode()).hexdigest()
    items = plan_of(submission.week, settings.folder).items
    key = submission.student, submission.week
    return nothing(*key, digest, tests, items, "damaged", str(damage)), b""


# Where they run


class Machine:
    """Threads of this process, each with a process that grades."""

    name = "here"

    def __init__(self, settings, jobs: int | None, make: Callable | None) -> None:
        jobs = jobs or default_jobs()
        self.window = 2 * jobs
        self.jobs = Jobs(settings, make)
        self.threads = ThreadPoolExecutor(jobs, "grade")

    def submit(self, submission: Submission, content: bytes, tests: str):
        return self.threads.submit(self.jobs.grade, submission, content, tests)

    def take(self, future, *_) -> tuple[Result, bytes]:
        return future.result()

    def close(self, at_once: bool) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.jobs.close(at_once)
        self.threads.shutdown(wait=True)


class Cluster:
    """The workers of a Dask cluster, each thread of which has a process that grades."""

    def __init__(self, address: str, settings, make: Callable | None) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise CourseError(
                "--scheduler needs dask.distributed, which is not installed: install it with "
                "`pip install 'mmlearn-course[cluster]'`, here and on each machine of the cluster."
            ) from None
        self.name, self.make = f"a worker of {address}", make
        # A worker on another machine has the course's weeks in its own checkout.
        is_ours = settings.folder and Path(settings.folder) == weeks_folder()
        self.settings = replace(settings, folder=None) if is_ours else settings
        try:
            _knock(address)
            self.client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise CourseError(
                f"No Dask scheduler answers at {address} ({why}): "
                "start one with `dask scheduler`, workers with `dask worker ADDRESS`, and name its "
                "address as tcp://HOST:PORT."
            ) from None
        self.futures: dict[int, object] = {}
        self.counted = -1e9  # when the workers were

    @property
    def window(self) -> int:
        """Two for each thread of each worker that is there; workers come and go."""
        if time.monotonic() > self.counted + 2:
            self.counted, self.threads = time.monotonic(), sum(self.client.nthreads().values())
        if not self.threads:
            try:
                self.client.wait_for_workers(1, timeout=WORKER_SECONDS)
            except TimeoutError:
                raise CourseError(
                    f"The Dask scheduler at {self.client.scheduler.address} has no workers: start "
                    "some with `dask worker ADDRESS --nthreads 1`."
                ) from None
            self.counted = -1e9
            return self.window
        return 2 * self.threads

    def submit(self, submission: Submission, content: bytes, tests: str):
        nameless = replace(submission, place=None, member="", shown="")  # paths mean nothing there
        work = self.settings, self.make, nameless, content, tests
        future = self.client.submit(grade_on_worker, *work, pure=False)
        self.futures[id(future)] = future
        return future

    def take(
        self, future, submission: Submission, content: bytes, tests: str
    ) -> tuple[Result, bytes]:
        from distributed import KilledWorker

        self.futures.pop(id(future))
        try:
            kind, *answer = future.result()
        except KilledWorker:
            reason = "the cluster lost every worker that graded it, one after the other"
            return stopped_result(submission, content, tests, self.settings, reason)
        except Exception as error:  # a worker without the course, a scheduler that is gone
            first = (str(error).splitlines() or [""])[0]
            raise CourseError(
                f"The Dask cluster did not grade {submission.student}'s {submission.week} "
                f"({type(error).__name__}: {first}); what was graded is kept: see that the "
                "scheduler runs and that every worker has this version of the course, and run "
                "the same command again."
            ) from error
        finally:
            future.release()
        if kind == "refused":
            raise answer[0]
        record, notebook = answer
        return Result.from_json(record), notebook

    def close(self, at_once: bool) -> None:
        def end() -> None:
            with suppress(Exception):
                self.client.cancel(list(self.futures.values()))
                self.client.run(close_on_worker, self.settings, at_once, on_error="ignore")

        # In a thread, because a worker that is no longer there might never answer.
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(0.7 if at_once else CLOSE_SECONDS + 2)
        with suppress(Exception):
            self.client.close(timeout=1)


def _knock(address: str) -> None:
    """Raise OSError or ValueError unless somebody listens there: Dask itself tries for long."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if not parts.hostname or parts.port is None:
        raise ValueError("that is no address")
    socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_SECONDS).close()


_on_worker: dict[object, Jobs] = {}  # in a Dask worker: the processes of each run
_lock = threading.Lock()


def grade_on_worker(settings, make, submission: Submission, content: bytes, tests: str) -> tuple:
    """Grade in a Dask worker. Returns what went wrong: Dask logs the arguments of what raises."""
    with _lock:
        jobs = _on_worker.setdefault(settings, Jobs(settings, make))
    try:
        result, notebook = jobs.grade(submission, content, tests)
    except (CourseError, OSError) as error:
        return "refused", error
    except Closed:
        return "refused", CourseError("The run was ended.")
    return "graded", result.as_json(), notebook


def close_on_worker(settings, at_once: bool) -> None:
    """End the processes of a run in a Dask worker."""
    with _lock:
        jobs = _on_worker.pop(settings, None)
    if jobs is not None:
        jobs.close(at_once)
