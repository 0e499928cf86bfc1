"""Several graders at once: nothing is lost, nothing is graded twice, and nothing is left behind.

A fake grader, which does what a submission's bytes say, stands in for the real one; it runs in the
same processes, on this machine and in the workers of a Dask cluster.
"""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from course.grade import job, schedule
from course.grade.records import Limits, Result, Submission
from course.source import CourseError

HERE = Path(__file__).parent
WEEKS = HERE.parent / "weeks"
WEEK = "w99_sample"
SECRET = b"a secret that is nowhere to be read"


@dataclass(frozen=True)
class Settings:
    log: Path  # one line for each beginning: the student, the grader's process, its helper
    secret: bytes = field(default=SECRET, repr=False)
    folder: Path = WEEKS
    limits: Limits = field(default_factory=Limits)


class FakeGrader:
    """Does what the submission says. A helper process stands in for the sandbox."""

    def __init__(self, settings):
        self.settings = settings
        self.helper = subprocess.Popen(["sleep", "600"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.helper.kill()
        self.helper.wait()

    def grade(self, student, week, content):
        line = f"{student} {os.getpid()} {self.helper.pid}\n".encode()
        with open(self.settings.log, "ab") as log:
            log.write(line)
        order, _, value = content.decode().partition(" ")
        notes = getattr(self, order)(value, student) or {}
        digest = hashlib.sha256(content).hexdigest()
        return Result(student, week, digest, "tests", (), notes), content.upper()

    def wait(self, seconds, _):
        time.sleep(float(seconds))

    def crash(self, number, _):
        os.kill(os.getpid(), int(number))

    def leave(self, code, _):
        os._exit(int(code))

    def leave_the_first_time(self, code, student):
        if begun(self.settings.log)[student] == 1:
            os._exit(int(code))

    def fail(self, message, _):
        raise ValueError(message)

    def refuse(self, message, _):
        raise CourseError(message)

    def run_out(self, name, _):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def look_around(self, _, __):
        everything = repr([sys.orig_argv, dict(os.environ)])
        sockets = f"readlink /proc/{os.getpid()}/fd/* | grep -c socket"
        passed_on = "readlink /proc/self/fd/* | grep -c socket"
        count = [
            subprocess.run(["sh", "-c", line], close_fds=False, capture_output=True).stdout
            for line in (sockets, passed_on)
        ]
        return {"sees": everything, "own": count[0].decode(), "passed on": count[1].decode()}


class CannotStart:
    def __init__(self, settings):
        raise CourseError("No sandbox can be had here.")


class EndsAtStart:
    def __init__(self, settings):
        print("no room for torch", file=sys.stderr, flush=True)
        os._exit(9)


def begun(log):
    """How often each student's submission was begun."""
    return Counter(line.split()[0] for line in Path(log).read_text().splitlines())


def processes(log):
    """The processes that graded, and those that they started."""
    return {int(pid) for line in Path(log).read_text().splitlines() for pid in line.split()[1:]}


def gone(pids, seconds=15.0):
    """Whether the processes have ended, or end soon."""

    def runs(pid):
        try:
            # One that ended stays as a zombie until its parent, or the system, has noticed.
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + seconds
    while any(map(runs, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def class_of(*orders, tests="tests"):
    return [
        (Submission(f"s{number}", WEEK, shown=order), tests) for number, order in enumerate(orders)
    ]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def fakes(monkeypatch):
    """This module under a name that the processes can import it by."""
    monkeypatch.syspath_prepend(str(HERE))
    return import_module("test_schedule")


@pytest.fixture
def run(fakes, log, monkeypatch):
    """`schedule.run` with the fake grader; what a submission holds is in its `shown`."""
    from course.grade import intake

    def read(submission):
        if submission.shown == "unreadable":
            raise intake.Damaged("it is a link, not a file")
        return submission.shown.encode()

    monkeypatch.setattr(intake, "read_submission", read)

    def call(entries, jobs=2, scheduler=None, make="FakeGrader"):
        jobs = None if scheduler else jobs
        return schedule.run(entries, fakes.Settings(log), jobs, scheduler, getattr(fakes, make))

    return call


def reasons(result):
    return {row.reason for row in result.rows}


# On this machine


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_submission_has_one_result_and_its_own(run, log, jobs):
    orders = [f"wait 0.0{number}" for number in range(9)]
    results = list(run(class_of(*orders), jobs))
    assert sorted(result.student for result, _ in results) == [f"s{n}" for n in range(9)]
    for result, notebook in results:
        order = orders[int(result.student[1:])]
        assert result.submission_digest == hashlib.sha256(order.encode()).hexdigest()
        assert notebook == order.upper().encode()
    assert set(begun(log).values()) == {1}
    assert len(processes(log)) == 2 * jobs
    assert gone(processes(log))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("crash 9", "ended (SIGKILL, most likely for want of memory), twice"),
        ("crash 11", "ended (SIGSEGV), twice"),
        ("leave 3", "ended (exit code 3), twice"),
        ("leave 0", "ended (exit code 0), twice"),
        ("fail too deep", "the grader failed on it with ValueError: too deep, twice"),
    ],
)
def test_a_process_that_dies_costs_its_own_submission_only(run, log, order, reason):
    orders = ["wait 0", "wait 0.1", order, "wait 0.1", "wait 0"]
    results = {result.student: result for result, _ in run(class_of(*orders))}
    stopped = results.pop("s2")
    assert {row.status for row in stopped.rows} == {"stopped"}
    assert stopped.points == 0
    assert sum(row.max_points for row in stopped.rows) == 7
    (said,) = reasons(stopped)
    assert said.endswith(reason)
    assert stopped.submission_digest == hashlib.sha256(order.encode()).hexdigest()
    assert stopped.tests_digest == "tests"
    assert all(result.rows == () for result in results.values())
    assert len(results) == 4
    assert begun(log) == {"s0": 1, "s1": 1, "s2": 2, "s3": 1, "s4": 1}
    first, second = (line.split()[1] for line in log.read_text().splitlines() if "s2" in line)
    assert first != second, "the second try is in a new process"
    assert gone(processes(log))


def test_a_process_that_hangs_is_ended_and_its_submission_stopped(run, log, monkeypatch):
    monkeypatch.setattr(job, "hard_limit", lambda settings, week: 0.5)
    results = {r.student: r for r, _ in run(class_of("wait 600", *["wait 0"] * 3))}
    (said,) = reasons(results["s0"])
    assert said == "the process that graded it gave no answer for 0 s, twice"
    assert [results[f"s{n}"].rows for n in (1, 2, 3)] == [(), (), ()]
    assert begun(log)["s0"] == 2
    assert gone(processes(log))


def test_the_hard_limit_is_beyond_what_a_grader_may_take_by_itself():
    seconds = job.hard_limit(Settings(Path(), limits=Limits(seconds=60)), WEEK)
    # Cells twice; each of two exercises twice, and the cells again for it.
    assert seconds > 60 * (2 + 2 * (2 + 1))


def test_a_submission_that_was_unlucky_once_is_graded_at_the_second_try(run, log):
    ((result, notebook),) = run(class_of("leave_the_first_time 1"))
    assert (result.rows, notebook) == ((), b"LEAVE_THE_FIRST_TIME 1")
    assert begun(log) == {"s0": 2}


def test_what_no_other_try_would_mend_ends_the_run(run, log):
    with pytest.raises(CourseError, match=r"^The solution fails\.$"):
        list(run(class_of("wait 0", "refuse The solution fails.", "wait 0.1")))
    assert begun(log)["s1"] == 1
    with pytest.raises(OSError, match="No space left on device"):
        list(run(class_of("run_out ENOSPC", "wait 0.1")))
    assert gone(processes(log))


def test_a_broken_pipe_inside_a_grader_is_no_reason_to_end_the_run(run):
    (said,) = reasons(next(run(class_of("run_out EPIPE")))[0])
    assert said == "the grader failed on it with BrokenPipeError: [Errno 32] Broken pipe, twice"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("CannotStart", r"^No sandbox can be had here\.$"),
        ("EndsAtStart", r"exit code 9\) \(no room for torch\), before it had a submission; close"),
    ],
)
def test_a_grader_that_cannot_start_says_why(run, make, said):
    with pytest.raises(CourseError, match=said):
        list(run(class_of("wait 0"), make=make))


def test_submissions_are_read_only_as_fast_as_they_are_graded(run):
    taken = 0

    def entries():
        nonlocal taken
        for entry in class_of(*["wait 0"] * 20):
            taken += 1
            yield entry

    for had, _ in enumerate(run(entries(), jobs=2)):
        # Two in work and two in waiting, and those whose results came.
        assert taken <= had + 1 + 4
    assert taken == 20


def test_what_cannot_be_read_is_damaged_and_costs_nobody_else_anything(run):
    results = {r.student: r for r, _ in run(class_of("unreadable", "wait 0", "unreadable"))}
    assert {row.status for row in results["s0"].rows} == {"damaged"}
    assert reasons(results["s2"]) == {"it is a link, not a file"}
    assert results["s1"].rows == ()


def test_tests_that_changed_under_way_end_the_run(run):
    with pytest.raises(CourseError, match=f"The tests of {WEEK} are others where s0 was graded"):
        list(run(class_of("wait 0", tests="older tests")))


def test_leaving_early_ends_every_process(run, log):
    with closing(run(class_of("wait 0", *["wait 600"] * 3))) as results:
        next(results)
        started = time.monotonic()
    assert gone(processes(log))
    assert time.monotonic() - started < 10  # and not 600: nothing was waited for


DRIVER = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import test_schedule
from course.grade import intake, schedule

intake.read_submission = lambda submission: submission.shown.encode()
entries = test_schedule.class_of("wait 0", *["wait 600"] * 5)
for result, _ in schedule.run(
    entries, test_schedule.Settings(Path({log!r})), 2, None, test_schedule.FakeGrader
):
    print(result.student, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_interrupted_or_killed_leaves_no_process(log, number):
    program = DRIVER.format(here=str(HERE), log=str(log))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as driver:
        assert driver.stdout.readline() == b"s0\n"
        while len(begun(log)) < 3:
            time.sleep(0.02)
        driver.send_signal(number)
        driver.wait(15)
    assert gone(processes(log))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
def test_what_a_grader_starts_holds_no_secret_and_no_way_to_its_orders(run):
    ((result, _),) = run(class_of("look_around"), jobs=1)
    for secret in (SECRET.decode(), SECRET.hex(), repr(SECRET)):
        assert secret not in result.notes["sees"]
    assert int(result.notes["own"]) == 1
    assert int(result.notes["passed on"]) == 0


@pytest.mark.parametrize(
    ("jobs", "scheduler", "said"),
    [
        (0, None, "--jobs is 0; wanted 1 or more"),
        (2, "tcp://127.0.0.1:8786", "--jobs is for this machine"),
        (None, "elsewhere", r"No Dask scheduler answers at elsewhere \(that is no address\)"),
        (None, "tcp://127.0.0.1:1", r"127.0.0.1:1 \(Connection refused\): start one with `dask"),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_sentence(jobs, scheduler, said):
    with pytest.raises(CourseError, match=said):
        next(schedule.run([], Settings(Path()), jobs, scheduler))


def test_a_cluster_without_dask_installed_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CourseError, match=r"pip install 'mmlearn-course\[cluster\]'"):
        next(schedule.run([], Settings(Path()), scheduler="tcp://127.0.0.1:8786"))


# On a cluster


@pytest.fixture
def cluster(fakes):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address=None,
        silence_logs="CRITICAL",
    ) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_no_submission_and_has_each_result_once(
    run, cluster, log
):
    orders = [f"wait 0.0{number % 10}" for number in range(24)]
    orders[5], orders[20] = "crash 9", "fail of its own"
    came = []
    for result, notebook in run(class_of(*orders), scheduler=cluster.scheduler_address):
        came.append((result, notebook))
        if len(came) == 8:
            os.kill(cluster.workers[0].process.pid, signal.SIGKILL)
    assert Counter(result.student for result, _ in came) == {f"s{n}": 1 for n in range(24)}
    here = {result.student: (result, notebook) for result, notebook in run(class_of(*orders))}
    assert {result.student: (result, notebook) for result, notebook in came} == here
    assert gone(processes(log))


@pytest.mark.slow
def test_a_cluster_keeps_its_workers_and_gives_up_in_a_sentence(run, cluster, log):
    address = cluster.scheduler_address
    with pytest.raises(CourseError, match=r"^The solution fails\.$"):
        list(run(class_of("refuse The solution fails.", "wait 600"), scheduler=address))
    assert gone(processes(log))
    with pytest.raises(OSError, match="No space left on device"):
        list(run(class_of("run_out ENOSPC"), scheduler=address))
    with pytest.raises(CourseError, match=f"are others where s0 was graded .a worker of {address}"):
        list(run(class_of("wait 0", tests="newer tests"), scheduler=address))
    ((result, _),) = run(class_of("wait 0"), scheduler=address)
    assert result.rows == ()
    assert gone(processes(log))


@pytest.mark.slow
def test_a_cluster_without_workers_says_so(run, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(schedule, "WORKER_SECONDS", 0.2)
    with (
        distributed.LocalCluster(
            n_workers=0, host="127.0.0.1", dashboard_address=None, silence_logs="CRITICAL"
        ) as empty,
        pytest.raises(CourseError, match="has no workers: start some with `dask worker"),
    ):
        list(run(class_of("wait 0"), scheduler=empty.scheduler_address))


def test_the_weeks_of_this_checkout_are_those_of_a_workers_own(monkeypatch):
    """A path of this machine means nothing on another one."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(schedule, "_knock", lambda address: None)
    monkeypatch.setattr(distributed, "Client", lambda *_, **__: None)
    ours = Settings(Path(), folder=schedule.weeks_folder())
    assert schedule.Cluster("tcp://x:1", ours, None).settings.folder is None
    theirs = Settings(Path(), folder=WEEKS)
    assert schedule.Cluster("tcp://x:1", theirs, None).settings.folder == WEEKS
