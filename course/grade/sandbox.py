"""Where students' code runs: probes what this machine can isolate with, and keeps a warm parent.

A tier says which walls stand, the strongest first: bubblewrap makes a root folder of named parts
only; without it we make that ourselves, with Landlock as the wall behind; else there is a bare
process with limits, for students whom the instructor trusts. In the first two a child has
namespaces of its own, no network, no capability, a filter of system calls, and sized memory to
write into. What this file starts is told once which folders exist in the sandbox, and no secret.
"""

import atexit
import itertools
import json
import logging
import os
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import course
import mmlearn
from course.grade.inside import confine, landlock, seccomp
from course.grade.records import Limits
from course.source import CourseError

PLACE = "/grader"  # where `inside` and `mmlearn` lie in the sandbox
START_SECONDS = 180.0  # to import all that is warm, on a slow disk
ANSWER_SECONDS = 30.0  # for the warm parent to fork a child, on a machine under load
GENTLE_SECONDS = 3.0  # for it to end itself, once its control socket is closed
END_SECONDS = 30.0  # for it to end one, tens of milliseconds on a quiet machine; then all is killed

# Imported before the first fork, so that no student waits for it.
WARM = (
    "numpy",
    "torch",
    "torch.nn.functional",
    "torch.utils.data",
    "IPython",
    "matplotlib.pyplot",
    "mmlearn.feedback",
    "torch._dynamo",  # the first step of an optimizer imports it: 1.8 s
)
PROGRAM = """
from inside.serve import main
from inside.shell import Shell

def prepare(limits):
    return Shell(limits["output_bytes"])
"""
# All that a process in the sandbox finds in its environment.
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "HOME": confine.HOME,
    "TMPDIR": "/tmp",
    "USER": "student",
    "LOGNAME": "student",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    # A process that has run parallel code must not fork.
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}
PASSWD = (
    "root:x:0:0::/:/usr/sbin/nologin\n"
    f"student:x:{confine.INSIDE_ID}:{confine.INSIDE_ID}::{confine.HOME}:/bin/sh\n"
    f"nobody:x:{confine.NOBODY}:{confine.NOBODY}::/:/usr/sbin/nologin\n"
)
GROUP = f"root:x:0:\nstudent:x:{confine.INSIDE_ID}:\nnogroup:x:{confine.NOBODY}:\n"
# Of the system, what programs and libraries need to run, and no /home, /root, /srv, /var, /run.
# Nor /usr/local, unless Python is there: nbgrader's exchange may be in its share.
SYSTEM = (
    *(f"/usr/{part}" for part in ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "share")),
    *("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/etc/localtime", "/etc/mime.types"),
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tier:
    """A kind of isolation: `detail` says what it enforces here, `better` how to get a better."""

    number: int
    name: str
    detail: str
    better: str = ""


class Ending(NamedTuple):
    """How a child ended: `how` is exit, signal, memory, processes, or killed (by us, in time).

    `code` is the exit code or the signal's number.
    """

    how: str
    code: int
    peak_mib: float
    cpu_seconds: float


class NoSandbox(CourseError):
    """There is no process to run a student's code in; `problem` says why, in some words."""

    def __init__(self, tier: Tier, what: str, problem: str):
        self.problem = problem
        super().__init__(
            f"The sandbox ({tier.name}) {what}: {problem}. "
            "`python -m course doctor` says what this machine can isolate with."
        )


class Child:
    """One confined process for one submission, connected through `sock`."""

    def __init__(self, sandbox: "Sandbox", sock: socket.socket):
        self.sandbox, self.sock = sandbox, sock
        self.ending: Ending | None = None

    def interrupt(self) -> None:
        """Have the child's Python raise KeyboardInterrupt."""
        if self.ending is None:
            self.sandbox._ask_about(self, {"do": "interrupt"})

    def end(self) -> Ending:
        """Kill the child and all that it started, wait until they are dead, say how it ended."""
        if self.ending is None:
            answer = self.sandbox._ask_about(self, {"do": "end"})
            self.ending = Ending(**answer) if answer else Ending("killed", 9, 0.0, 0.0)
            self.sock.close()
        return self.ending


class Sandbox:
    """Keeps one warm parent, which forks a child for each submission, one at a time.

    `preload` names modules to import before the first fork; one that fails is passed over.
    `program` and `warm` are what the warm parent runs and imports; tests give their own.
    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        tier: Tier,
        limits: Limits,
        preload: Sequence[str] = (),
        *,
        program: str = PROGRAM,
        warm: Sequence[str] = WARM,
    ):
        self.tier = tier
        self.restarts = 0
        self._settings = {
            "limits": asdict(limits),
            "imports": [*warm, *preload],
            "program": program,
            "confined": tier.name != "process",
            "as_root": os.geteuid() == 0,
        }
        self._process = self._control = self._errors = self._scratch = None
        self._parent_pid: int | None = None
        self._child: Child | None = None
        atexit.register(self.close)
        self._start()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def parent_pid(self) -> int | None:
        """The warm parent's process id, as this process sees it; None when it is closed."""
        return self._parent_pid

    def start_child(self) -> Child:
        """Fork a child; the one before is ended. A warm parent that died is started anew, once.

        Raises: NoSandbox, when no child can be had.
        """
        if self._child is not None:
            self._child.end()
        problem = ""
        for attempt in (1, 2):
            if self._control is None:
                self._start()
            ours, its = socket.socketpair()
            try:
                answer = self._ask({"do": "start"}, its.fileno())
                if "started" in answer:
                    self._child = Child(self, ours)
                    return self._child
                problem = answer["error"]
            except (OSError, ValueError) as error:
                problem = self._what_it_said() or f"the warm parent is gone ({error})"
            finally:
                its.close()
            ours.close()
            self._stop()
            if attempt == 1:
                self._say_anew(problem)
        raise NoSandbox(self.tier, "starts no process", problem)

    def close(self) -> None:
        """End everything that was started; doing so twice does no harm."""
        atexit.unregister(self.close)
        child = self._child
        self._stop()
        if child is not None:
            child.end()

    # The warm parent

    def _start(self):
        """Start the warm parent and wait until it has imported everything.

        Raises: NoSandbox, with the last line that it said.
        """
        ours, its = socket.socketpair()
        report_out, report_in = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _stop)
        inherited = [its.fileno(), report_in]
        environment = dict(ENVIRONMENT)
        environment["PYTHONPATH"] = os.pathsep.join(_site_folders())
        steps = layout()
        if self._settings["confined"]:
            readable = ["/proc", *(path for step in steps if (path := _reachable(step)))]
            command = _python(PLACE, "parent.main(int(sys.argv[2]))", str(its.fileno()))
            wrap = _bubblewrap if self.tier.name == "bubblewrap" else _own_root
            command, files = wrap(steps, command, report_in)
            inherited += files
        else:
            files, scratch = [], tempfile.mkdtemp(prefix="course-grade-")
            self._scratch = scratch
            environment |= {"HOME": scratch, "TMPDIR": scratch}
            readable = [step[1] for step in steps if step[0] in ("bind", "device")]
            for package in (confine, mmlearn):
                folder = Path(package.__file__).parent
                os.symlink(folder, Path(scratch, folder.name))
            command = _python(scratch, "parent.main(int(sys.argv[2]))", str(its.fileno()))
        self._control = ours
        try:
            with its, os.fdopen(report_in, "wb"):
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=environment,
                    cwd=self._scratch or "/",
                    pass_fds=inherited,
                    start_new_session=True,  # Ctrl-C is for the grader
                )
            self._parent_pid = self._process.pid
            if self._settings["confined"]:
                with os.fdopen(report_out, "rb", closefd=False) as report:
                    self._parent_pid = json.load(report)["child-pid"]
            here = {"readable": readable, "scratch": self._scratch}
            here["covered"] = [s[2] for s in steps if s[0] == "bind" and _is_in_writable(s[2])]
            self._ask(self._settings | here, wait=START_SECONDS)
        except (OSError, ValueError) as error:
            problem = self._what_it_said() or str(error)
            self._stop()
            raise NoSandbox(self.tier, "does not start", problem) from None
        finally:
            for descriptor in (report_out, *files):
                os.close(descriptor)

    def _stop(self):
        """End the warm parent, gently for a moment, then not; all in its namespace die with it."""
        if self._child is not None:
            with suppress(OSError):
                self._child.sock.shutdown(socket.SHUT_RDWR)  # whoever waits for it hears the end
            self._child = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(GENTLE_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in (self._parent_pid, self._process.pid):
                    with suppress(OSError):
                        os.kill(pid, 9)
                self._process.wait()
            self._process = self._parent_pid = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _ask_about(self, child, request):
        """Ask about a child that may be gone with its parent; {} when it is."""
        if child is not self._child or self._control is None:
            return {}
        if request["do"] == "end":
            self._child = None
        try:
            return self._ask(request, wait=END_SECONDS)
        except (OSError, ValueError) as error:
            problem = self._what_it_said() or f"the warm parent is gone ({error})"
            self._stop()
            self._say_anew(problem)
            return {}

    def _say_anew(self, problem):
        self.restarts += 1
        log.warning("the sandbox's warm parent was lost and is started anew: %s", problem)

    def _ask(self, request, descriptor=None, wait=ANSWER_SECONDS):
        """One line there, one line back. Raises: OSError or ValueError, when none comes."""
        self._control.settimeout(wait)
        line = json.dumps(request).encode() + b"\n"
        if descriptor is None:
            self._control.sendall(line)
        else:
            socket.send_fds(self._control, [line], [descriptor])
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._control.recv(65_536)
            if not part:
                raise ConnectionResetError("the warm parent ended")
            answer += part
        return json.loads(answer)

    def _what_it_said(self):
        """The last line that the warm parent, or what starts it, wrote to stderr."""
        if self._errors is None:
            return ""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        self._errors.seek(0)
        lines = self._errors.read()[-10_000:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1].rstrip(".") if lines else ""


# --------------------------------------------------------------------------- what is possible here

# A child that tries what none may do. It answers with what it could do, and which walls it found.
TRIAL = """
import importlib.util, json, os, socket

def prepare(limits):
    return None

def main(sock, shell):
    request = json.loads(sock.makefile().readline())
    could = []
    for what, path in request["hidden"]:
        if os.path.lexists(path):
            could.append("see " + what)
    for what, path in request["write"]:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            could.append("write " + what)
        except OSError:
            pass
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        could.append("open a network socket")
    except OSError:
        pass
    try:
        os.kill(request["pid"], 0)
        could.append("signal the grader")
    except OSError:
        pass
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    for name, wanted in (("CapEff", "0" * 16), ("CapPrm", "0" * 16), ("NoNewPrivs", "1")):
        if status[name].strip() != wanted:
            could.append(f"keep {name} {status[name].strip()}")
    for name in ("mmlearn", "torch"):
        try:
            open(importlib.util.find_spec(name).origin).close()
        except (OSError, AttributeError):
            could.append("not read " + name)
    sock.sendall(json.dumps(could).encode() + b"\\n")
"""
NAMES = ("bubblewrap", "landlock", "process")
# Settings by which distributions keep ordinary users from namespaces, and the value that lets them.
NAMESPACE_SETTINGS = {
    "kernel.apparmor_restrict_unprivileged_userns": 0,
    "kernel.unprivileged_userns_clone": 1,
    "user.max_user_namespaces": 10_000,
}


def probe(wanted: str | None = None) -> Tier:
    """Find the best tier that works here, or the wanted one, by starting a child that attacks it.

    Raises: CourseError with the way out, when there is none; "process" is for asking only.
    """
    if wanted is not None and wanted not in NAMES:
        raise CourseError(f"No isolation is called {wanted}; wanted one of {', '.join(NAMES)}.")
    if wanted is not None:
        problem = why_not(wanted)
    else:
        problems = {name: why_not(name) for name in NAMES[:2]}
        wanted = next((name for name in problems if not problems[name]), None)
        problem = "; ".join(f"{name}: {why}" for name, why in problems.items())
    if wanted is None or (problem and why_not(wanted)):
        raise CourseError(
            f"Students' code cannot be isolated here ({problem}). {way_to_better()} Or grade "
            "with `--isolation process --i-trust-these-students`, for students whom you trust."
        )
    number = NAMES.index(wanted) + 1
    works = next((name for name in NAMES[: NAMES.index(wanted)] if not why_not(name)), None)
    better = f"Leave out `--isolation`: {works} works here." if works else way_to_better()
    better = "" if wanted == NAMES[0] else better
    return Tier(number if wanted != "process" else 4, wanted, _detail(wanted), better)


@cache
def why_not(name: str) -> str:
    """Try a tier: "" when its walls hold, else what is wrong, in some words."""
    if name == "process":
        return "" if hasattr(os, "fork") else "this system cannot fork a process"
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if not seccomp.is_known():
        return f"the filter of system calls knows no machine of the kind {os.uname().machine}"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if name == "landlock" and not landlock.version():
        return "this kernel has no Landlock"
    weeks = Path(course.__file__).resolve().parent / "weeks"
    with tempfile.NamedTemporaryFile(prefix="course-grade-secret-") as secret:
        hidden = [("a file in /tmp", secret.name)]
        hidden += [("the grader's process", f"/proc/{os.getpid()}/root")]
        hidden += [("the weeks", str(week)) for week in sorted(weeks.glob("*.py"))]
        hidden += [("the home folder", str(place)) for place in _not_bound(Path.home())]
        request = {
            "hidden": hidden,
            "write": [
                ("the root folder", "/written"),
                ("the installed packages", str(Path(mmlearn.__file__).parent / "written")),
                ("the kernel's settings", "/proc/sys/kernel/core_pattern"),
            ],
            "pid": os.getpid(),
        }
        try:
            with Sandbox(Tier(0, name, ""), Limits(), program=TRIAL, warm=()) as sandbox:
                child = sandbox.start_child()
                child.sock.settimeout(ANSWER_SECONDS)
                child.sock.sendall(json.dumps(request).encode() + b"\n")
                could = json.loads(child.sock.makefile().readline() or '["end without a word"]')
                child.end()
        except NoSandbox as error:
            return error.problem
        except OSError as error:
            return str(error)
    return f"a child could {', '.join(could)}" if could else ""


def _not_bound(folder):
    """Some of what lies in a folder and on no way to what exists in the sandbox."""
    bound = [step[2] for step in layout() if step[0] == "bind"]
    found = itertools.islice(folder.iterdir(), 100) if os.access(folder, os.R_OK) else ()
    return [place for place in found if not any(_is_in(path, place) for path in bound)]


def way_to_better(settings: Path = Path("/proc/sys")) -> str:
    """One sentence: what to do on this machine to have a better tier."""
    if not sys.platform.startswith("linux"):
        return "Isolation needs Linux: grade in a virtual machine or on a server that runs it."
    for name, open_value in NAMESPACE_SETTINGS.items():
        setting = settings / name.replace(".", "/")
        if os.geteuid() != 0 and setting.exists() and _closed(setting.read_text(), open_value):
            return (
                "Ordinary users are kept from namespaces here, as AppArmor does on Ubuntu 24.04: "
                f"run `sudo sysctl {name}={open_value}`, or grade as root."
            )
    if shutil.which("bwrap") is None:
        return "Install bubblewrap, with `apt install bubblewrap` or your system's like."
    return (
        "Grade where users may have namespaces: outside of a container, or in one started with "
        "`--privileged`."
    )


def _closed(text, open_value):
    return text.strip() == ("1" if open_value == 0 else "0")


def _detail(name):
    found = landlock.version()
    if name != "process":
        walls = "own root, processes and user; no network, no privileges; system calls filtered"
        return f"{walls}; {f'Landlock {found}; ' if found else ''}memory watched"
    if found and seccomp.is_known():
        return f"limits, Landlock {found} and filtered system calls, but no world of its own"
    return "limits only: it can read your files and reach the network"


# --------------------------------------------------------------------------- what exists inside


def layout() -> list[list]:
    """What the root folder of the sandbox holds, in the order in which it is made.

    Each step is a list as `inside.confine.enter` takes it. Everything bound is read-only. Of this
    course there are mmlearn and `inside`: weeks, solutions and tests are not there, and where they
    lie within a folder that is needed, an empty folder covers them.
    """
    bound = {PLACE + "/inside": Path(confine.__file__).parent}
    bound[PLACE + "/mmlearn"] = Path(mmlearn.__file__).parent
    links = []
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    local = [f"/usr/local/{part}" for part in ("bin", "lib", "lib64")]
    for path in [*SYSTEM, *(local if "/usr/local" in prefixes else ())]:
        if os.path.islink(path) and not path.startswith("/etc"):
            links.append(["link", os.readlink(path), path])
        elif os.path.exists(path):
            bound[path] = Path(path)
    for path in (*prefixes, *_site_folders()):
        # Python may be asked for by the name it was started with, or by where that leads.
        for name in {path, os.path.realpath(path)}:
            if name not in ("/", "/usr", "/usr/local"):
                bound[name] = Path(name)
    outermost = {
        path: source
        for path, source in bound.items()
        if not any(path != other and _is_in(path, other) for other in bound)
    }
    folders = {"/proc", "/dev", confine.SPACE, *confine.WRITABLE, "/etc"}
    for path in (*outermost, *(link[2] for link in links)):
        folders.update(map(str, Path(path).parents))
    folders |= {path for path, source in outermost.items() if source.is_dir()}
    for path in list(folders):
        folders.update(map(str, Path(path).parents))
    under = sorted(path for path in folders if _is_in_writable(path))
    steps = [["dir", path] for path in sorted(folders - {"/", *under})]
    # The warm parent's own; each child gets its own instead.
    steps += [["dir", path] for path in confine.WRITABLE]
    steps += [["tmpfs", path, 64] for path in confine.WRITABLE]
    steps += [["dir", path] for path in under if path not in confine.WRITABLE]
    steps += links
    steps += [["bind", str(source), path] for path, source in sorted(outermost.items())]
    steps += [["mask", path] for path in _to_hide(outermost)]
    steps += [["device", path] for path in DEVICES]
    steps += [["link", "/proc/self/fd", "/dev/fd"]]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        steps.append(["link", f"/proc/self/fd/{number}", f"/dev/{name}"])
    steps += [["file", "/etc/passwd", PASSWD], ["file", "/etc/group", GROUP]]
    return steps


def _to_hide(bound):
    """Folders of the course that lie in what is bound: a package can be installed beside torch."""
    packages = {Path(course.__file__).resolve().parent}
    packages |= {
        Path(folder, "course") for folder in sys.path if Path(folder, "course/grade").is_dir()
    }
    # A working copy holds solutions, notebooks and tests beside the package.
    packages |= {p.parent for p in packages if (p.parent / "solutions").is_dir()}
    hidden = []
    for package in sorted(packages):
        for path, source in bound.items():
            if source.name in ("inside", "mmlearn") and path.startswith(PLACE):
                continue
            with suppress(ValueError):
                hidden.append(str(Path(path) / package.resolve().relative_to(source.resolve())))
    return sorted(path for path in set(hidden) if not any(_is_in(p, path) for p in bound))


def _site_folders():
    """Where packages are installed outside of the interpreter's own folders."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    if site.ENABLE_USER_SITE and os.path.isdir(site.getusersitepackages()):
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def _is_in(path, folder):
    return Path(path).is_relative_to(folder)


def _is_in_writable(path):
    return any(_is_in(path, folder) for folder in confine.WRITABLE)


def _reachable(step):
    """The path that a step makes readable, or ""."""
    if step[0] == "bind":
        return step[2]
    return step[1] if step[0] in ("device", "file") else ""


# --------------------------------------------------------------------------- the commands


def _python(folder, call, *arguments):
    """A command that calls a function of `inside`; -P keeps the working folder off its path."""
    program = (
        f"import sys; sys.path.insert(0, sys.argv[1]); from inside import parent, confine; {call}"
    )
    return [sys.executable, "-s", "-P", "-c", program, folder, *arguments]


def _bubblewrap(steps, command, report):
    """The command under bubblewrap, and the descriptors that it needs and we close."""
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    options += ["--unshare-cgroup-try", "--as-pid-1", "--info-fd", str(report)]
    if _dies_with_us():
        options += ["--die-with-parent"]
    if os.geteuid() == 0:
        # No user namespace: its root could write the host's /proc/sys as the host's root.
        options += ["--cap-drop", "ALL"]
        options += [part for name in confine.KEPT_BY_PARENT for part in ("--cap-add", name)]
    else:
        options += ["--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
    files = []
    for kind, *what in steps:
        if kind == "dir":
            options += ["--perms", "0755", "--dir", what[0]]
        elif kind == "bind":
            options += ["--ro-bind", what[0], what[1]]
        elif kind == "device":
            options += ["--dev-bind", what[0], what[0]]
        elif kind == "file":
            files.append(_descriptor_of(what[1]))
            options += ["--perms", "0644", "--file", str(files[-1]), what[0]]
        elif kind == "link":
            options += ["--symlink", what[0], what[1]]
        elif kind == "mask":
            options += ["--perms", "0755", "--tmpfs", what[0], "--remount-ro", what[0]]
        elif kind == "tmpfs":
            # No size: releases before 0.7 know none, and no student writes here.
            options += ["--perms", "1777", "--tmpfs", what[0]]
    options += ["--proc", "/proc", "--remount-ro", "/"]
    return [shutil.which("bwrap") or "bwrap", *options, "--", *command], files


def _own_root(steps, command, report):
    """The command under `inside.confine.enter`, which stands in for bubblewrap."""
    arguments = json.dumps([steps, command, os.geteuid() == 0, report, _dies_with_us()])
    call = "import json; sys.exit(confine.enter(*json.loads(sys.argv[2])))"
    return _python(str(Path(__file__).parent), call, arguments), []


def _dies_with_us():
    """Whether the kernel may tie the sandbox's life to this thread's, which is all that it can."""
    return threading.current_thread() is threading.main_thread()


def _descriptor_of(text):
    """A descriptor from which a text can be read, in memory."""
    descriptor = os.memfd_create("file", 0)
    os.write(descriptor, text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
