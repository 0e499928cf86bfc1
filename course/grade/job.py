"""One process that grades, and the side of it that gives it its submissions.

A `Job` starts a fresh Python with one Grader in it and speaks to it through a socket pair: orders
go in, results come out. Nothing secret stands in its arguments or its environment. A process that
dies or hangs costs its submission one more try, in a new process; no other submission is in it.
When this process ends, however it ends, the other sees its socket close and ends too.
"""

import errno
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from course.check import kill_tree
from course.grade.records import Result, Submission
from course.source import CourseError, read_week

START_SECONDS = 300.0  # until a grader has imported torch and started its sandbox
CLOSE_SECONDS = 5.0  # that a grader may take to close its sandbox before it is killed
IDLE_SECONDS = 600.0  # after which a grader whose run was lost, on a cluster, ends itself
# No fault of a submission, and nothing that another try would mend.
MACHINE_TROUBLE = {getattr(errno, name) for name in "ENOSPC EDQUOT EMFILE ENFILE EROFS EIO".split()}
# Checks compare small tensors: a second thread would only disturb the neighbour.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}


class Died(Exception):
    """The process that graded a submission ended or hung; the message completes "because ..."."""


class Closed(Exception):
    """The run is over, and this submission with it."""


class Job:
    """One process with one Grader, started for its first submission and again when it has died."""

    def __init__(self, settings, make: Callable | None) -> None:
        self.settings, self.make = settings, make
        self.process: subprocess.Popen | None = None
        self.channel: Connection | None = None
        self.said = None  # what the process complains of, for when it does not start
        self.closed = False
        self.starting, self.busy = threading.Lock(), threading.Lock()

    def grade(
        self, student: str, week: str, content: bytes, seconds: float
    ) -> tuple[Result, bytes]:
        """Raises: Died; CourseError and OSError, which another try would not mend."""
        with self.busy:
            if self.process is None or self.process.poll() is not None:
                self._start()
            return self._ask((student, week, content), seconds)

    def _start(self) -> None:
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from course.grade.job import work\n"
            "work({fd})"
        )
        with self.starting:
            if self.closed:
                raise Closed
            self._forget()
            self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _forget)
            ours, theirs = socket.socketpair()
            with theirs:
                self.channel = Connection(ours.detach())
                self.process = subprocess.Popen(
                    [sys.executable, "-c", program.format(fd=theirs.fileno())],
                    env=os.environ | ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self.said,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for this process, which ends that one
                )
        try:
            # Not in the arguments or the environment, where others on this machine could read it.
            self._ask((self.settings, self.make), START_SECONDS)
        except Died as death:
            self.said.seek(0)
            lines = self.said.read().decode("utf-8", "replace").strip().splitlines()
            last = f" ({lines[-1]})" if lines else ""
            raise CourseError(
                f"Grading cannot go on: {death}{last}, before it had a submission; close other "
                "programs if memory is short, and see `python -m course doctor`."
            ) from None

    def _ask(self, request, seconds: float):
        try:
            self.channel.send(request)
            if not self.channel.poll(seconds):
                self.end()
                raise Died(f"the process that graded it gave no answer for {seconds:.0f} s")
            kind, answer = self.channel.recv()
        except (EOFError, OSError):
            # What it was spoken to through closes a moment before it has ended.
            raise Died(f"the process that graded it ended ({self.end(patience=1.0)})") from None
        if kind == "failed":
            self.end()  # another try begins with a grader that nothing has happened to
            raise Died(answer)
        if kind == "refused":
            raise answer
        return answer

    def let_go(self) -> None:
        """Ask it to end as soon as it is idle; it closes its sandbox first."""
        with self.starting:
            self.closed = True
            if self.channel is not None:
                # Not closed: another thread may be waiting for what comes through it.
                with suppress(OSError), socket.socket(fileno=os.dup(self.channel.fileno())) as ours:
                    ours.shutdown(socket.SHUT_WR)

    def end(self, patience: float = 0.0) -> str:
        """End it and all that it started, and say in words how it ended."""
        if self.process is None:
            return ""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            kill_tree(self.process.pid)
        code = self.process.wait()
        with suppress(OSError):  # what it started and did not take with it
            os.killpg(self.process.pid, signal.SIGKILL)
        if code >= 0:
            return f"exit code {code}"
        why = ", most likely for want of memory" if code == -signal.SIGKILL else ""
        with suppress(ValueError):
            return f"{signal.Signals(-code).name}{why}"
        return f"signal {-code}"

    def close(self, patience: float) -> None:
        """End it, and let go of what it was spoken to through, once nobody waits for it."""
        self.end(patience)
        with self.busy:
            self._forget()

    def _forget(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.said.close()
            self.channel = None


class Jobs:
    """The processes that grade for one run on one machine: one for each thread that asks."""

    def __init__(self, settings, make: Callable | None) -> None:
        self.settings, self.make = settings, make
        self.here = threading.local()
        self.all: list[Job] = []
        self.closed = False
        self.lock = threading.Lock()

    def grade(self, submission: Submission, content: bytes, tests: str) -> tuple[Result, bytes]:
        """Grade one submission, with one more try when its process dies or hangs."""
        seconds = hard_limit(self.settings, submission.week)
        for _ in range(2):
            try:
                return self._job().grade(submission.student, submission.week, content, seconds)
            except Died as death:
                reason = f"{death}, twice"
        return stopped_result(submission, content, tests, self.settings, reason)

    def _job(self) -> Job:
        if not hasattr(self.here, "job"):
            with self.lock:
                if self.closed:
                    raise Closed
                self.here.job = Job(self.settings, self.make)
                self.all.append(self.here.job)
        return self.here.job

    def close(self, at_once: bool) -> None:
        """End them all, at the same time; a grader that is not killed closes its sandbox."""
        with self.lock:
            self.closed = True
        for job in self.all:
            job.let_go()
        until = time.monotonic() + (0.0 if at_once else CLOSE_SECONDS)
        for job in self.all:
            job.close(max(0.0, until - time.monotonic()))


# Results without one


def stopped_result(
    submission: Submission, content: bytes, tests: str, settings, reason: str
) -> tuple[Result, bytes]:
    from course.grade.plan import stopped

    plan = plan_of(submission.week, settings.folder)
    return stopped(submission, content, tests, plan, reason), b""


@cache
def plan_of(week: str, folder: Path | None):
    from course.grade.plan import Plan

    return Plan.of(read_week(week, folder))


@cache
def hard_limit(settings, week: str) -> float:
    """Seconds after which a grader hangs: more than all of its own limits together.

    Its cells may take their time twice, and so may each exercise, with what it costs each time to
    bring the cells back; the first submission of a week waits for the course's own solution too.
    """
    exercises = len(read_week(week, settings.folder).exercises)
    return START_SECONDS + settings.limits.seconds * (4 + 4 * exercises)


# Inside that process


def work(fd: int) -> None:
    """Grade what comes through the socket, until its other end closes."""
    # Nothing that this process starts, a sandbox least of all, may hold a way to its orders.
    os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel, inbox = Connection(fd), queue.SimpleQueue()
    try:
        settings, make = channel.recv()
        if make is None:
            from course.grade.grader import Grader as make
        threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
        grader = make(settings)
    except BaseException as error:
        channel.send(_told(error))
        return
    with grader, suppress(queue.Empty, BrokenPipeError):
        channel.send(("ready", None))
        while (request := inbox.get(timeout=IDLE_SECONDS)) is not None:
            try:
                answer = "graded", grader.grade(*request)
            except BaseException as error:
                answer = _told(error)
            channel.send(answer)


def _told(error: BaseException) -> tuple[str, object]:
    """An error as it is sent: one that ends the run, or one that another try may mend."""
    if isinstance(error, CourseError):
        return "refused", CourseError(str(error))
    if isinstance(error, OSError) and error.errno in MACHINE_TROUBLE:
        return "refused", OSError(error.errno, os.strerror(error.errno))
    first = (str(error).splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return "failed", f"the grader failed on it with {said}"


def _listen(channel: Connection, inbox: queue.SimpleQueue) -> None:
    with suppress(Exception):  # the other end is closed, or is no longer understood
        while True:
            inbox.put(channel.recv())
    inbox.put(None)  # an idle grader closes its sandbox and ends; one at work has a moment
    time.sleep(CLOSE_SECONDS)
    kill_tree(os.getpid())
