"""The warm parent: has imported everything, and forks a confined child for each submission.

It runs no line of a student's code and reads nothing that a child says. Over its control socket it
takes one request at a time from the grader, one line of JSON each, and answers each with one:

    {"do": "start"} + a socket          a child that serves it: {"started": true}
    {"do": "interrupt"}                 SIGINT to the child: {}
    {"do": "end"}                       ends all that the child has started: how it ended

At the end of the control socket it exits, and all in its process namespace with it.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

from . import confine

TICK = 0.02  # seconds between two looks at a child's memory
CLOSE_LOOK = 0.1  # seconds between two looks that cost milliseconds
CONFINED_SECONDS = 20.0  # that a child may take until it is shut in, on a machine under load
DEAD_SECONDS = 2.0  # that the kernel may take to end a tree of processes
EXITING = 4  # the flag of a process in /proc/PID/stat, PF_EXITING in linux/sched.h
LARGE_PAGE, COLLAPSE = 2**21, 25  # MADV_COLLAPSE in asm-generic/mman-common.h
PAGE = os.sysconf("SC_PAGE_SIZE")
# So that grading again says the same. Python's own numbers are seeded after the fork, as it makes
# new ones then.
SEED = {
    "numpy": lambda numpy: numpy.random.seed(0),
    "torch": lambda torch: torch.manual_seed(0),
}
ON_LINUX = sys.platform.startswith("linux")


def main(control: int) -> None:
    """Import, say so, then serve requests until the grader lets go of the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child's shell sets its own
    os.set_inheritable(control, False)
    with socket.socket(fileno=control) as sock:
        lines = Lines(sock)
        settings, _ = lines.receive()
        began = time.perf_counter()
        parent = Parent(settings)
        lines.send({"ready": True, "seconds": time.perf_counter() - began})
        parent.serve(lines)
        os._exit(0)  # what it imported takes long to tidy away


class Lines:
    """One JSON object a line, with a descriptor beside it where one is handed over."""

    def __init__(self, sock):
        self.sock = sock

    def receive(self):
        """Return the next request and its descriptor, or None; (None, None) at the end."""
        text, descriptors = b"", []
        while not text.endswith(b"\n"):
            part, more, _, _ = socket.recv_fds(self.sock, 65_536, 1)
            for descriptor in more:
                os.set_inheritable(descriptor, False)
            descriptors += more
            if not part:
                return None, None
            text += part
        return json.loads(text), descriptors[0] if descriptors else None

    def send(self, message):
        self.sock.sendall(json.dumps(message).encode() + b"\n")


class Parent:
    """What is made once, the child that lives at present, and what it has used."""

    def __init__(self, settings):
        self.limits = settings["limits"]
        self.confined = settings["confined"]
        self.as_root = settings["as_root"]
        self.readable, self.covered = settings["readable"], settings["covered"]
        self.scratch = settings["scratch"]
        for name in settings["imports"]:
            try:
                importlib.import_module(name)
            except Exception:
                continue  # what a week imports is the week's affair, in its own cell
        program = {"__name__": "program"}
        exec(compile(settings["program"], "<program>", "exec"), program)
        self.shell = program["prepare"](self.limits)
        self.main = program["main"]
        for name in SEED.keys() & sys.modules.keys():
            SEED[name](sys.modules[name])
        self.child = None
        self.own_pids = None
        if self.confined:
            self.own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        else:
            confine.adopt_orphans()
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it touches
        if ON_LINUX:
            gather_pages()

    def serve(self, lines):
        while True:
            waiting = [lines.sock]
            watching = self.child is not None and self.child.status is None
            if watching and self.child.watched is not None:
                waiting.append(self.child.watched)
            ready, _, _ = select.select(waiting, [], [], TICK if watching else None)
            if self.child is not None:
                self.child.look()
            if lines.sock not in ready:
                continue
            request, descriptor = lines.receive()
            if request is None:
                self._end()
                if self.scratch:
                    shutil.rmtree(self.scratch, ignore_errors=True)
                return
            if request["do"] == "start":
                lines.send(self._start(descriptor))
            elif request["do"] == "interrupt":
                if self.child is not None:
                    self.child.interrupt()
                lines.send({})
            else:
                lines.send(self._end())

    def _start(self, descriptor):
        self._end()
        if (threads := count_threads()) != 1:
            os.close(descriptor)
            return {"error": f"the warm parent has {threads} threads, and a fork takes only one"}
        heard, said = os.pipe()
        first = None
        if self.confined:
            # Processes from here on begin a new namespace. The first of it only holds it: killing
            # it kills all. The student's is the second, so signals mean to it what they mean
            # anywhere, and it is a child of this process, which so learns how it ended.
            confine.must("unshare", confine.NEW_PIDS)
            try:
                first = start_holder()
                pid = os.fork()
                if pid == 0:
                    self._be_child(descriptor, said)
            finally:
                confine.must("setns", self.own_pids, confine.NEW_PIDS)
        else:
            os.makedirs(self._own_folder(), exist_ok=True)
            pid = os.fork()
            if pid == 0:
                self._be_child(descriptor, said)
        os.close(said)
        os.close(descriptor)
        self.child = Running(pid, first, self.limits)
        ready, _, _ = select.select([heard], [], [], CONFINED_SECONDS)
        answer = os.read(heard, 4096).decode() if ready else "it took too long"
        os.close(heard)
        if answer != "confined":
            self._end()
            return {"error": f"a child could not be shut in: {answer or 'it ended'}"}
        self.child.begin()
        return {"started": True}

    def _be_child(self, descriptor, said):
        """In the child: shut in, then serve. Never returns to the parent's loop."""
        code = 70
        try:
            try:
                self._shut_in(descriptor, said)
                os.write(said, b"confined")
            except BaseException as error:
                os.write(said, f"{type(error).__name__}: {error}"[:4000].encode("utf-8", "replace"))
                raise
            os.close(said)
            with socket.socket(fileno=descriptor) as sock:
                self.main(sock, self.shell)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code & 0xFF)

    def _shut_in(self, descriptor, said):
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        close_all_but(descriptor, said)
        data = data_bytes()
        if self.confined:
            confine.confine(
                self.limits,
                as_root=self.as_root,
                readable=self.readable,
                covered=self.covered,
                bytes_of_parent=data,
            )
        else:
            confine.confine_bare(self.limits, self.readable, self._own_folder(), data)
        random.seed(0)
        sys.path.insert(0, "")  # a notebook may import what it wrote beside itself

    def _own_folder(self):
        return os.path.join(self.scratch, "child")

    def _end(self):
        child, self.child = self.child, None
        ending = {} if child is None else child.end()
        if not self.confined:
            shutil.rmtree(self._own_folder(), ignore_errors=True)
        return ending


class Running:
    """The child that lives at present: what it uses, and how it ended."""

    def __init__(self, pid, first, limits):
        self.pid, self.first, self.limits = pid, first, limits
        self.status = self.used = None
        self.verdict = ""
        self.peak = 0
        self.looked_closely = 0.0
        self.born = memory(pid)
        self.watched = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None

    def begin(self):
        """Take what the child has now as inherited; more than that is its own."""
        self.born = memory(self.pid)

    def look(self):
        """Notice that it ended, or took more than it may; then end all of it."""
        if self.status is not None:
            return
        self._reap(os.WNOHANG)
        if self.status is not None:
            self._kill_tree()  # what it left behind may hold its socket open
            return
        tree = self._tree()
        if self._measure(tree) > self.limits["memory_mib"] * 2**20:
            self.verdict = "memory"
        elif len(tree) > self.limits["processes"]:
            self.verdict = "processes"
        if self.verdict:
            self._kill_tree()

    def _measure(self, tree):
        """What the tree uses, of which what was inherited at the fork does not count.

        The quick number counts shared memory for each that has it, so a number that is too large
        is followed by a close look, which costs milliseconds.
        """
        each = [memory(pid) for pid in tree]
        self.peak = max(self.peak, sum(max(one - self.born, 0) for one in each))
        most = sum(each) - self.born  # a program that was started anew has inherited nothing
        if most <= self.limits["memory_mib"] * 2**20:
            return most
        if time.monotonic() < self.looked_closely + CLOSE_LOOK:
            return 0
        self.looked_closely = time.monotonic()
        # Pages as they were at the fork are shared with this process, so half of them are counted.
        close = sum(map(share_of_memory, tree)) - self.born / 2
        self.peak = max(self.peak, close)
        return close

    def interrupt(self):
        if self.status is None:
            os.killpg(self.pid, signal.SIGINT)  # what its shell waits for hears it too

    def end(self):
        """Kill the whole tree, wait until it is dead, and say how the child itself ended."""
        self._reap(os.WNOHANG)
        if self.status is None and is_ending(self.pid):
            select.select([self.watched] if self.watched else [], [], [], DEAD_SECONDS)
            self._reap(os.WNOHANG)
        if self.status is None:
            self._measure(self._tree())
        killed = self.status is None
        self._kill_tree()
        self._reap(0)
        if self.first is not None:
            os.waitpid(self.first, 0)  # the kernel lets it go when all others are gone
        else:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # the orphans that this process adopted
        if self.watched is not None:
            os.close(self.watched)
        code = os.waitstatus_to_exitcode(self.status)
        how = self.verdict or ("killed" if killed else "exit" if code >= 0 else "signal")
        return {
            "how": how,
            "code": abs(code),
            "peak_mib": self.peak / 2**20,
            "cpu_seconds": self.used.ru_utime + self.used.ru_stime,
        }

    def _reap(self, options):
        if self.status is not None:
            return
        pid, status, used = os.wait4(self.pid, options)
        if pid:
            self.status, self.used = status, used

    def _kill_tree(self):
        if self.first is not None:
            os.kill(self.first, signal.SIGKILL)
            return
        until = time.monotonic() + DEAD_SECONDS
        while (tree := self._tree()) and time.monotonic() < until:
            for pid in tree:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._reap(os.WNOHANG)
            time.sleep(0.001)

    def _tree(self):
        """All living processes that the child has started, and itself."""
        if self.first is not None:
            # This process namespace holds nobody but us, the holder and the child's.
            others = {os.getpid(), self.first, 1}
            return [
                pid
                for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                if pid not in others
            ]
        return descendants(os.getpid())


def gather_pages():
    """Ask the kernel to put what is imported into large pages, where it can.

    A fork copies one entry for each page: 400 MB cost 7 ms in small ones and 2 ms in large ones,
    and ending the child costs less likewise. It does so since Linux 6.1.
    """
    with open("/proc/self/maps", encoding="utf-8") as file:
        maps = [line.split(maxsplit=5) for line in file]
    for extent, rights, _, _, inode, *name in maps:
        if rights != "rw-p" or inode != "0" or "[stack]\n" in name:
            continue
        start, end = (int(number, 16) for number in extent.split("-"))
        for place in range(-(-start // LARGE_PAGE) * LARGE_PAGE, end - LARGE_PAGE + 1, LARGE_PAGE):
            try:
                confine.must("madvise", ctypes.c_void_p(place), LARGE_PAGE, COLLAPSE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # this kernel knows no such thing


def start_holder():
    """Start the first process of a namespace; it waits to be killed."""
    for sleep in ("/usr/bin/sleep", "/bin/sleep"):
        if os.path.exists(sleep):
            return os.posix_spawn(sleep, ["sleep", "infinity"], {})
    program = "import signal\nwhile True: signal.pause()"
    return os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", program], {})


def close_all_but(*kept):
    """Close every descriptor but the standard three and these."""
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(low, most if most != resource.RLIM_INFINITY else 2**20)


def count_threads():
    return len(os.listdir("/proc/self/task")) if ON_LINUX else 1


def data_bytes():
    """What this process has of private writable memory, as RLIMIT_DATA counts it."""
    if not ON_LINUX:
        return 0
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * PAGE


def memory(pid):
    """Bytes of a process's memory that is no file's; what it shares is counted."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = [line.split() for line in file if line.startswith((b"RssAnon", b"RssShmem"))]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines) * 1024


def is_ending(pid):
    """Whether the kernel takes a process down already: its files close before it can be reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rpartition(b")")[2].split()[6]) & EXITING)
    except OSError:
        return False


def share_of_memory(pid):
    """Bytes of a process's memory that is no file's; what n processes share counts 1/n for each."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = [line.split() for line in file.read().splitlines()[1:]]
    except OSError:
        return 0
    wanted = (b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")
    return sum(int(line[1]) for line in lines if line[0] in wanted) * 1024


def descendants(root):
    """Living processes below one, by their parents; on Linux this process inherits orphans."""
    parents = {}
    if not ON_LINUX:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
    for name in filter(str.isdigit, os.listdir("/proc") if ON_LINUX else ()):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                rest = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if rest[0] not in b"ZX":
            parents[int(name)] = int(rest[1])
    found, new = set(), {root}
    while new := {pid for pid, parent in parents.items() if parent in new} - found:
        found |= new
    return sorted(found)
