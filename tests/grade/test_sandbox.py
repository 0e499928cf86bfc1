"""A child of the sandbox can read nothing, reach nothing, keep nothing and stop nobody.

Each attack runs in every tier that holds here, as the user who runs the tests; as root, all of it
runs a second time as an ordinary user.
"""

import errno
import json
import logging
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from course.grade import sandbox
from course.grade.inside import landlock, seccomp
from course.grade.records import Limits
from course.grade.sandbox import Sandbox, Tier
from course.source import CourseError

ROOT = Path(__file__).resolve().parents[2]
WALLED = ("bubblewrap", "landlock")

# A child that runs what it is sent and answers with the value of `r`, or with the error's name.
PROGRAM = """
import json

def prepare(limits):
    return None

def main(sock, shell):
    lines = sock.makefile("rw")
    for line in lines:
        names = {"fileno": sock.fileno()}
        try:
            exec(json.loads(line), names)
            answer = names.get("r")
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        lines.write(json.dumps(answer, default=repr) + chr(10))
        lines.flush()
"""
LIMITS = Limits(seconds=5.0, memory_mib=128, processes=16, disk_mib=8)
LIBC = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
"""


def opened(name, limits=LIMITS, **options):
    return Sandbox(Tier(0, name, ""), limits, program=PROGRAM, warm=(), **options)


def ask(child, code, seconds=20.0):
    """Run code in the child; return what it makes `r`, or None when the child is gone."""
    child.sock.settimeout(seconds)
    child.sock.sendall(json.dumps(textwrap.dedent(code)).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        try:
            part = child.sock.recv(65_536)
        except ConnectionResetError:
            return None
        if not part:
            return None
        answer += part
    return json.loads(answer)


def tell(child, code):
    """Have the child run code, and don't wait for it."""
    child.sock.sendall(json.dumps(textwrap.dedent(code)).encode() + b"\n")


def gone(pid, seconds=2.0):
    """Whether a process is dead soon; one that only waits to be reaped is."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.01)
    return False


def skip_without(name):
    """Skip where the machine itself has not what a tier needs, and fail where only we fail."""
    problem = sandbox.why_not(name)
    if problem:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        needs = {
            "bubblewrap": ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"],
            "landlock": ["unshare", *user, "--mount", "--pid", "--net", "--fork", "true"],
        }[name]
        there = shutil.which(needs[0]) and not subprocess.run(needs, capture_output=True).returncode
        if there and (name != "landlock" or landlock.version()):
            pytest.fail(f"the tier {name} could stand here, but {problem}")
        pytest.skip(f"THE TIER {name} IS NOT TESTED: {problem}")


@pytest.fixture(scope="module", params=WALLED)
def box(request):
    """One warm parent for all attacks of a tier: each must leave it as it was."""
    skip_without(request.param)
    os.environ["COURSE_SECRET"] = "do not tell"  # what a careless instructor exports
    with opened(request.param) as box:
        alive = box.parent_pid
        yield box
        assert (box.parent_pid, box.restarts) == (alive, 0)
    del os.environ["COURSE_SECRET"]


@pytest.fixture
def child(box):
    child = box.start_child()
    yield child
    began = time.perf_counter()
    child.end()
    assert time.perf_counter() - began < 2.0  # half a second on a quiet machine
    after = box.start_child()
    assert ask(after, "r = 6 * 7") == 42  # the next student is not affected
    after.end()


# What a child can see


def test_nothing_of_the_course_the_grader_or_the_user_can_be_read(child, tmp_path):
    decoy = tmp_path / "gradebook.db"
    decoy.write_text("grades")
    places = [ROOT / name for name in ("course/weeks", "solutions", "tests", "course", ".git")]
    places += [decoy, Path.home(), "/etc/shadow", "/var", "/sys", "/run"]
    places += [f"/proc/{os.getpid()}", f"/proc/{os.getppid()}", "/proc/1/environ", "/proc/1/root"]
    answer = ask(
        child,
        f"""
        import os
        r = []
        for place in {[str(place) for place in places]!r}:
            try:
                r.append((place, os.listdir(place) if os.path.isdir(place) else open(place).read()))
            except OSError:
                pass
        """,
    )
    # Folders on the way to Python are there, and hold nothing else.
    ways = {part for step in sandbox.layout() if step[0] == "bind" for part in Path(step[2]).parts}
    assert [found for found in answer if not set(found[1]) <= ways] == []
    assert ask(child, "import importlib; importlib.import_module('course.grade')").startswith(
        "ModuleNotFoundError"
    )


def test_a_child_has_what_a_notebook_needs(child):
    assert ask(
        child,
        """
        import os, sys, tempfile, mmlearn, json, subprocess, multiprocessing, getpass, pathlib
        pathlib.Path("beside.py").write_text("x = 1")
        import beside
        multiprocessing.Lock()
        with tempfile.TemporaryFile() as file:
            file.write(b"1")
        said = subprocess.run("echo $HOME; cat /etc/passwd", shell=True, capture_output=True)
        r = [getpass.getuser(), os.getcwd(), b"student" in said.stdout, os.getuid(), beside.x]
        """,
    ) == ["student", "/home/student", True, 1000, 1]


def test_the_environment_holds_what_we_put_there_and_no_secret(child):
    environment = ask(child, "import os; r = dict(os.environ)")
    assert environment.pop("PYTHONPATH") == os.pathsep.join(sandbox._site_folders())
    assert environment.items() <= sandbox.ENVIRONMENT.items() | {("PWD", "/"), ("SHLVL", "0")}
    everywhere = """
    import glob
    r = []
    for place in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ"):
        try:
            r.append(b"COURSE_SECRET" in open(place, "rb").read())
        except OSError:
            pass
    """
    assert set(ask(child, everywhere)) == {False}


def test_a_child_inherits_no_descriptor_but_its_socket(child):
    listing = """
    import os
    r = [{}, fileno]
    for number in os.listdir("/proc/self/fd"):
        try:
            r[0][int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            pass  # what the listing itself had open
    """
    found, own = ask(child, listing)
    assert found.pop(str(own)).startswith("socket:")
    assert found == dict.fromkeys("012", "/dev/null")


def test_a_child_sees_no_process_but_its_own(child):
    seen = "import os; r = sorted(int(n) for n in os.listdir('/proc') if n.isdigit()), os.getpid()"
    assert ask(child, seen) == [[1, 2], 2]


def test_a_child_has_every_kind_of_namespace_to_itself(child, box):
    kinds = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
    own = ask(child, f"import os; r = [os.readlink('/proc/self/ns/' + kind) for kind in {kinds}]")
    for pid in ("self", box.parent_pid):
        others = [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds]
        assert [kind for kind, a, b in zip(kinds, own, others) if a == b] == []


# What a child can change


def test_nothing_but_three_small_folders_can_be_written(child):
    places = ["/", "/usr/bin", "/etc", "/dev", "/grader", "/grader/inside", "/grader/mmlearn"]
    places += ["/space", "/home", "/proc", sys.prefix, sys.base_prefix, "/root", "/var/tmp"]
    answer = ask(
        child,
        f"""
        import os
        r = []
        for place in {places!r}:
            try:
                os.close(os.open(place + "/written", os.O_CREAT | os.O_WRONLY))
                r.append(place)
            except OSError:
                pass
        for place in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/etc/passwd",
                      "/proc/sysrq-trigger", "/proc/self/oom_score_adj", "/proc/1/mem",
                      "/proc/self/uid_map", "/grader/inside/seccomp.py"):
            try:
                os.close(os.open(place, os.O_WRONLY))
                r.append(place)
            except OSError:
                pass
        for make in (lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)),
                     lambda: os.mknod("memory", 0o20600, os.makedev(1, 1)),
                     lambda: os.chroot("/tmp"), lambda: os.setuid(0), lambda: os.setgid(0),
                     lambda: os.setgroups([0]), lambda: os.nice(-5),
                     lambda: os.chown("/tmp", 0, 0)):
            try:
                make()
                r.append("made")
            except OSError:
                pass
        """,
    )
    assert answer == []


def test_what_a_child_leaves_behind_its_neighbour_does_not_find(box):
    leave = """
    import pathlib, socket
    for folder in ("/tmp", "/home/student", "/dev/shm"):
        pathlib.Path(folder, "answer").write_text("42")
    kept = socket.socket(socket.AF_UNIX)
    kept.bind("\\0answer")
    r = "left"
    """
    look = """
    import os, socket
    r = [os.listdir(folder) for folder in ("/tmp", "/home/student", "/dev/shm")]
    try:
        socket.socket(socket.AF_UNIX).connect("\\0answer")
    except OSError as error:
        r.append(type(error).__name__)
    """
    child = box.start_child()
    untouched = ask(child, look)  # a checkout under /tmp is mounted there
    assert untouched[1:] == [[], [], "ConnectionRefusedError"]
    assert ask(child, leave) == "left"
    child.end()
    child = box.start_child()
    assert ask(child, look) == untouched
    child.end()


def test_the_disk_is_limited_in_all_folders_together_and_in_files(child):
    fill = """
    import errno
    r, written = [], 0
    for folder in ("/tmp", "/home/student", "/dev/shm"):
        try:
            with open(folder + "/fill", "wb", buffering=0) as file:
                for _ in range(4):
                    written += file.write(bytes(2**20))
            r.append(folder)
        except OSError as error:
            r.append(errno.errorcode[error.errno])
    r.append(written <= 8 * 2**20)
    """
    assert ask(child, fill) == ["/tmp", "ENOSPC", "ENOSPC", True] or ask(child, fill)[-1]
    many = """
    import errno
    try:
        for number in range(100_000):
            open(f"/tmp/{number}", "w").close()
        r = "all"
    except OSError as error:
        r = errno.errorcode[error.errno]
    """
    assert ask(child, many) == "ENOSPC"


# The kernel


def test_no_capability_is_left_and_none_can_be_had(child):
    lines = ask(
        child, "r = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines())"
    )
    held = {
        name: int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    }
    assert set(held.values()) == {0}
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")
    su = "import subprocess; r = subprocess.run(['su', '-c', 'id'], capture_output=True).returncode"
    assert ask(child, su) != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user cannot become another")
def test_what_root_starts_is_nobody_on_the_host(box, child):
    students = [pid for pid in processes_below(box.parent_pid) if "python" in command_of(pid)]
    assert len(students) == 1
    status = Path(f"/proc/{students[0]}/status").read_text()
    assert [line.split()[1:] for line in status.splitlines() if line[:3] in ("Uid", "Gid")] == [
        ["65534"] * 4
    ] * 2
    assert "Groups:\t \n" in status or "Groups:\t\n" in status


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_there_is_no_network(child):
    families = ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG", "AF_CAN")
    answer = ask(
        child,
        f"""
        import socket
        r = []
        for name in {families!r}:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                try:
                    socket.socket(getattr(socket, name), kind)
                    r.append(name)
                except OSError:
                    pass
        a, b = socket.socketpair()
        a.sendall(b"x")
        r.append(b.recv(1).decode())
        r.append([line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]])
        """,
    )
    assert answer == ["x", ["lo"]]


def test_the_hosts_abstract_sockets_cannot_be_reached(child):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0course-grade-test")
        listening.listen()
        connect = "import socket; socket.socket(socket.AF_UNIX).connect('\\0course-grade-test')"
        assert ask(child, connect).startswith("ConnectionRefusedError")


@pytest.mark.skipif(platform.machine() not in seccomp.MACHINES, reason="no table of its calls")
def test_dangerous_system_calls_are_refused(child):
    column = seccomp.MACHINES[platform.machine()][0]
    numbers = {name: both[column] for name, both in seccomp.FORBIDDEN.items() if both[column]}
    answer = ask(child, LIBC + f"r = {{n: call(v, 0, 0, 0, 0, 0) for n, v in {numbers!r}.items()}}")
    assert {name: said for name, said in answer.items() if said != "EPERM"} == {}
    assert ask(child, LIBC + f"r = call({seccomp.CLONE3[column]}, 0, 0)") == "ENOSYS"
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert (
            ask(child, LIBC + f"r = call({seccomp.CLONE[column]}, {flag} | 17, 0, 0, 0)") == "EPERM"
        )
    assert ask(child, LIBC + f"r = call({seccomp.IOCTL[column]}, 0, 0x5412, b'x')") == "EPERM"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its second and third interface")
def test_the_machines_other_interfaces_to_the_kernel_are_closed(child):
    # socket() by its number of the x32 interface, then getpid() as a program of 32 bits does it.
    assert ask(child, LIBC + "r = call(0x40000000 | 41, 2, 1, 0)") == "ENOSYS"
    old = """
    import ctypes, mmap
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20; int 0x80; ret
    place = ctypes.addressof(ctypes.c_char.from_buffer(page))
    r = ctypes.CFUNCTYPE(ctypes.c_int)(place)()
    """
    assert ask(child, old) is None
    ending = child.end()
    assert (ending.how, ending.code) == ("signal", signal.SIGSYS)


def run_filter(program, number, architecture, arguments=(0,) * 6):
    """What the kernel's machine for packet filters would make of a system call."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments)
    code, at, held = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        kind, yes, no, value = code[at]
        at += 1
        if kind == seccomp.RETURN:
            return value
        if kind == seccomp.LOAD:
            held = struct.unpack_from("=I", data, value)[0]
        else:
            holds = {
                seccomp.EQUAL: held == value,
                seccomp.AT_LEAST: held >= value,
                seccomp.ANY_BIT: bool(held & value),
            }
            at += yes if holds[kind] else no


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_says_no_to_what_is_listed_and_yes_to_the_rest(machine):
    program = seccomp.program(machine)
    column, architecture = seccomp.MACHINES[machine]
    denied = seccomp.REFUSE | errno.EPERM
    listed = {both[column] for both in seccomp.FORBIDDEN.values()} - {None}
    special = {getattr(seccomp, name)[column] for name in ("CLONE3", "SOCKET", "SOCKETPAIR")}
    for number in range(480):
        if number not in special:
            wanted = denied if number in listed else seccomp.ALLOW
            assert run_filter(program, number, architecture) == wanted, number
        assert run_filter(program, number, 0x40000003) == seccomp.KILL  # i386
    clone, ask_device = seccomp.CLONE[column], seccomp.IOCTL[column]
    user = (0x10000000 | 17, 0, 0, 0, 0, 0)
    assert run_filter(program, clone, architecture, (17,) + (0,) * 5) == seccomp.ALLOW
    assert run_filter(program, clone, architecture, user) == denied
    for number in (seccomp.SOCKET[column], seccomp.SOCKETPAIR[column]):
        assert run_filter(program, number, architecture, (1, 1, 0, 0, 0, 0)) == seccomp.ALLOW
        no = seccomp.REFUSE | errno.EAFNOSUPPORT
        assert run_filter(program, number, architecture, (2, 1, 0, 0, 0, 0)) == no
    assert run_filter(program, ask_device, architecture, (0, 0x5401, 0, 0, 0, 0)) == seccomp.ALLOW
    assert run_filter(program, ask_device, architecture, (0, 0x5412, 0, 0, 0, 0)) == denied
    # The upper half of an argument is no way around: the kernel reads the lower half alone.
    high = (0x5412 | 1 << 40, 0x5412 | 1 << 40, 0, 0, 0, 0)
    assert run_filter(program, ask_device, architecture, high) == denied


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("older", range(1, 8))
def test_landlock_holds_with_the_rules_of_every_older_kernel(older, tmp_path):
    if older > landlock.version():
        pytest.skip(f"this kernel has version {landlock.version()}")
    for name in ("readable", "writable", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    program = f"""
import ctypes, os, sys
sys.path.insert(0, {str(Path(landlock.__file__).parents[1])!r})
from inside import landlock
landlock.version = lambda: {older}
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
landlock.restrict(["/usr", "readable/file", "missing"], ["writable", "/dev/null"])
def tried(act, *arguments):
    try:
        act(*arguments)
        return "may"
    except PermissionError:
        return "may not"
print(tried(open, "readable/file"), tried(open, "closed/file"), tried(os.listdir, "closed"),
      tried(open, "writable/new", "w"), tried(open, "readable/file", "w"),
      tried(open, "/dev/null", "w"), tried(os.unlink, "closed/file"), sep=", ")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "may, may not, may not, may, may not, may, may not", done.stderr


# Processes, memory, time


def test_killing_everybody_kills_nobody_else(child):
    kill = """
    import os, signal
    r = []
    for pid in (-1, 1, 0, os.getppid() or 1):
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(pid, signal.SIGTERM)
            r.append(pid)
        except OSError:
            pass
    """
    assert ask(child, kill) is not None
    tell(child, "import os; os.fork(); os.kill(-1, 9)")


def test_a_daemon_does_not_outlive_its_child(box, tmp_path):
    child = box.start_child()
    daemon = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.01)
        os._exit(0)
    os.wait()
    r = len([n for n in os.listdir("/proc") if n.isdigit()])
    """
    assert ask(child, daemon) == 3
    before = processes_below(box.parent_pid)
    assert len(before) == 3
    began = time.perf_counter()
    assert child.end().how == "killed"
    assert time.perf_counter() - began < 2.0
    assert processes_below(box.parent_pid) == []


def processes_below(pid):
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(rest[1])
    found, new = [], [pid]
    while new := [child for child, parent in parents.items() if parent in new]:
        found += new
    return found


def test_the_end_of_a_child_is_the_end_of_its_socket_even_with_a_daemon(box):
    child = box.start_child()
    tell(child, "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nos._exit(3)")
    child.sock.settimeout(5)
    assert child.sock.recv(1) == b""
    assert child.end()[:2] == ("exit", 3)
    assert processes_below(box.parent_pid) == []


def test_a_fork_bomb_is_refused_at_the_limit(child):
    bomb = """
    import os, time
    made = 0
    try:
        while True:
            if os.fork() == 0:
                time.sleep(60)
            made += 1
    except OSError as error:
        r = [made, type(error).__name__]
    """
    assert ask(child, bomb) == [15, "BlockingIOError"]


def test_one_process_that_wants_too_much_memory_is_told_no(child):
    assert ask(child, "x = bytearray(2**28)").startswith("MemoryError")
    assert ask(child, "x = bytearray(2**25); r = len(x)") == 2**25


@pytest.mark.parametrize(
    "code",
    [
        # Many processes of which each stays below the limit.
        """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                x = bytearray(os.urandom(2**20)) * 40
                time.sleep(60)
        time.sleep(60)
        """,
        # Memory that is shared is not counted by the limit on data.
        """
        import mmap, time
        x = mmap.mmap(-1, 2**28)
        for at in range(0, 2**28, 4096):
            x[at] = 1
        time.sleep(60)
        """,
        # A program of another language, without what was inherited.
        """
        import subprocess, time
        grow = "import time; x = bytearray(90 * 2**20); time.sleep(60)"
        for _ in range(4):
            subprocess.Popen(["python", "-S", "-c", grow])
        time.sleep(60)
        """,
    ],
    ids=["many", "shared", "programs"],
)
def test_memory_is_watched_over_the_whole_tree(child, code):
    tell(child, code)
    child.sock.settimeout(20)
    assert child.sock.recv(1) == b""  # it is ended, not waited for
    ending = child.end()
    assert ending.how == "memory"
    assert ending.peak_mib > 64


def test_memory_in_use_is_measured(child):
    assert ask(child, "x = bytearray(2**26); r = 1") == 1
    ending = child.end()
    assert 63 < ending.peak_mib < 80
    assert ending.how == "killed"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import os; os._exit(3)", ("exit", 3)),
        ("import os; os.kill(os.getpid(), 9)", ("signal", signal.SIGKILL)),
        ("import ctypes; ctypes.string_at(0)", ("signal", signal.SIGSEGV)),
        ("import os; os.abort()", ("signal", signal.SIGABRT)),
    ],
)
def test_how_a_child_ended_by_itself_is_said(child, code, wanted):
    assert ask(child, code) is None
    assert child.end()[:2] == wanted
    assert child.end()[:2] == wanted  # asking twice does no harm


def test_a_child_is_interrupted_like_a_notebook(child):
    ready = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); r = 1"
    assert ask(child, ready) == 1
    # What its shell runs hears it, too, as it does in a terminal.
    script = "trap 'echo yes > heard; exit' INT; touch ready; while true; do sleep 0.02; done"
    tell(child, f"import subprocess; subprocess.run(['sh', '-c', {script!r}])")
    time.sleep(0.5)
    child.interrupt()
    child.sock.settimeout(5)
    assert json.loads(child.sock.makefile().readline()).startswith("KeyboardInterrupt")
    wait = """
    import os, time
    until = time.monotonic() + 5
    while not os.path.exists("heard") and time.monotonic() < until:
        time.sleep(0.02)
    r = os.path.exists("heard")
    """
    assert ask(child, wait) is True


def test_a_child_that_stops_itself_is_ended_all_the_same(child):
    tell(child, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    time.sleep(0.1)
    assert child.end().how == "killed"


def test_a_new_child_ends_the_one_before(box):
    first = box.start_child()
    second = box.start_child()
    assert first.end().how == "killed"
    assert ask(second, "r = 1") == 1
    second.end()


def test_every_child_of_every_parent_draws_the_same_random_numbers(box):
    drawn = []
    with opened(box.tier.name) as other:
        for each in (box, box, other):
            child = each.start_child()
            drawn.append(ask(child, "import random; r = [random.random(), hash('a')]"))
            child.end()
    assert drawn == drawn[:1] * 3


# The warm parent


@pytest.mark.parametrize("name", sandbox.NAMES)
def test_a_warm_parent_that_dies_is_started_anew_once_and_it_is_said(name, caplog):
    if name != "process":
        skip_without(name)
    with opened(name) as box:
        child = box.start_child()
        before = box.parent_pid
        os.kill(before, signal.SIGKILL)
        child.sock.settimeout(5)
        assert child.sock.recv(1) == b""
        with caplog.at_level(logging.WARNING):
            assert child.end().how == "killed"
            child = box.start_child()
        assert ask(child, "r = 1") == 1
        assert box.restarts == 1
        assert box.parent_pid != before
        assert "started anew" in caplog.text
        assert gone(before)
        after = box.parent_pid
    assert gone(after)


def test_a_parent_with_two_threads_does_not_fork(box):
    program = PROGRAM.replace(
        "return None",
        "import threading, time; threading.Thread(target=time.sleep, args=[60]).start()",
    )
    with (
        Sandbox(box.tier, LIMITS, program=program, warm=()) as other,
        pytest.raises(CourseError, match="2 threads") as caught,
    ):
        other.start_child()
    assert "doctor" in str(caught.value)


def test_a_parent_that_cannot_be_made_says_why(box):
    with pytest.raises(CourseError, match=r"does not start: ZeroDivisionError"):
        Sandbox(box.tier, LIMITS, program="1 / 0", warm=())


def test_what_cannot_be_imported_beforehand_is_passed_over(box):
    with opened(box.tier.name, preload=("not_there", "json.tool")) as other:
        child = other.start_child()
        assert ask(child, "import sys; r = 'json.tool' in sys.modules") is True


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "other thread"])
@pytest.mark.parametrize("name", sandbox.NAMES)
def test_nothing_outlives_a_grader_that_is_killed(name, thread):
    if name != "process":
        skip_without(name)
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from course.grade.records import Limits
from course.grade.sandbox import Sandbox, Tier
def start():
    global box, child
    box = Sandbox(Tier(0, {name!r}, ""), Limits(), program={PROGRAM!r}, warm=())
    child = box.start_child()
thread = threading.Thread(target=start)
thread.start() if {thread} else start()
thread.join() if {thread} else None
print(box.parent_pid, box._scratch or "/none", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    parent, scratch = process.stdout.readline().split()
    parent = int(parent)
    tree = [parent, *processes_below(parent)]
    assert len(tree) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert all(gone(pid) for pid in tree)
    assert not os.path.exists(scratch)


def test_a_course_installed_beside_torch_is_covered(box, tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    weeks = packages / "course" / "weeks"
    weeks.mkdir(parents=True)
    (packages / "course" / "grade").mkdir()
    (weeks / "w01.py").write_text("the answers")
    (packages / "beside.py").write_text("x = 1")
    for folder in (packages, *packages.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    monkeypatch.syspath_prepend(str(packages))
    with opened(box.tier.name) as other:
        child = other.start_child()
        assert ask(child, "import beside; r = beside.__file__") == str(packages / "beside.py")
        assert ask(child, f"import os; r = os.listdir({str(packages / 'course')!r})") == []
        written = ask(child, f"open({str(packages / 'written')!r}, 'w')")
        assert written.startswith(("OSError: [Errno 30]", "PermissionError"))
        write = "pathlib.Path(tempfile.gettempdir(), 'x').write_text('1')"
        assert ask(child, f"import pathlib, tempfile; r = {write}") == 1


def test_a_bare_process_still_has_its_limits_and_its_own_folder():
    secret = ROOT / "tests"
    with opened("process") as box:
        child = box.start_child()
        assert ask(child, "x = bytearray(2**28)").startswith("MemoryError")
        folder = ask(child, "import os; open('left', 'w').close(); r = os.getcwd()")
        if sandbox.landlock.version():
            assert "Permission" in ask(child, f"import os; os.listdir({str(secret)!r})")
            assert "Permission" in ask(child, f"open('/proc/{os.getpid()}/environ')")
            assert "Errno 97" in ask(child, "import socket; socket.socket(socket.AF_INET)")
        daemon = """
        import os, time
        ours, its = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(its, str(os.getpid()).encode())
                time.sleep(60)
            os._exit(0)
        os.wait()
        r = int(os.read(ours, 20))
        """
        orphan = ask(child, daemon)
        assert not gone(orphan, seconds=0.1)
        assert child.end().how == "killed"
        assert gone(orphan)
        assert processes_below(box.parent_pid) == []
        child = box.start_child()
        assert ask(child, "import os; r = os.listdir(os.getcwd()), os.getcwd()") == [[], folder]
    assert not Path(folder).parent.exists()


def test_a_bare_fork_bomb_is_ended_by_the_watch():
    with opened("process") as box:
        child = box.start_child()
        bomb = "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(60)"
        tell(child, bomb + "\n    time.sleep(0.005)")
        child.sock.settimeout(20)
        assert child.sock.recv(1) == b""
        assert child.end().how == "processes"
        assert processes_below(box.parent_pid) == []


# What is possible on this machine


def test_the_best_tier_that_holds_is_found():
    skip_without(next((name for name in WALLED if not sandbox.why_not(name)), "landlock"))
    works = [name for name in WALLED if not sandbox.why_not(name)]
    tier = sandbox.probe()
    assert tier.name == works[0]
    assert tier.better == "" or tier.number > 1
    assert "no network" in tier.detail


def test_the_weakest_tier_is_never_chosen_by_itself(monkeypatch):
    problems = {"bubblewrap": "bwrap is not installed", "landlock": "no namespaces", "process": ""}
    monkeypatch.setattr(sandbox, "why_not", problems.get)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        CourseError, match="bwrap is not installed; landlock: no namespaces"
    ) as caught:
        sandbox.probe()
    assert "--i-trust-these-students" in str(caught.value)
    assert "bubblewrap" in sandbox.probe("process").better
    with pytest.raises(CourseError, match="no namespaces"):
        sandbox.probe("landlock")


def test_an_unknown_tier_is_refused_with_the_list():
    with pytest.raises(CourseError, match="bubblewrap, landlock, process"):
        sandbox.probe("chroot")


def test_a_hole_in_a_wall_is_noticed(box, monkeypatch):
    whole = sandbox.layout
    weeks = str(ROOT / "course" / "weeks")

    def layout():
        steps = whole()
        at = next(i for i, step in enumerate(steps) if step[0] == "bind")
        return [*steps[:at], ["dir", weeks], ["bind", weeks, weeks], *steps[at:]]

    monkeypatch.setattr(sandbox, "layout", layout)
    try:
        sandbox.why_not.cache_clear()
        assert "see the weeks" in sandbox.why_not(box.tier.name)
    finally:
        sandbox.why_not.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1\n",
            "apparmor_restrict_unprivileged_userns=0",
        ),
        ("kernel/unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0\n", "user.max_user_namespaces=10000"),
    ],
)
def test_a_setting_that_forbids_namespaces_is_named(name, value, way_out, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    setting = tmp_path / name
    setting.parent.mkdir()
    setting.write_text(value)
    assert way_out in sandbox.way_to_better(tmp_path)
    setting.write_text({"1\n": "0\n", "0\n": "1\n"}[value])
    assert "sysctl" not in sandbox.way_to_better(tmp_path)


def test_other_systems_are_told_that_isolation_needs_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "needs Linux" in sandbox.way_to_better()


@pytest.mark.slow
def test_the_real_warm_parent_is_ready_to_be_forked():
    skip_without(next((name for name in WALLED if not sandbox.why_not(name)), "landlock"))
    program = PROGRAM.replace(
        "return None", "from inside.shell import Shell; return Shell(limits['output_bytes'])"
    )
    with Sandbox(sandbox.probe(), Limits(), ("transformers",), program=program) as box:
        maps = Path(f"/proc/{box.parent_pid}/maps").read_text().splitlines()
        assert [line for line in maps if line.split()[1] == "rw-s"] == []
        assert len(list(Path(f"/proc/{box.parent_pid}/task").iterdir())) == 1
        child = box.start_child()
        code = "import torch; x = torch.ones(400, 400); r = (x @ x).sum().item()"
        assert ask(child, code) == 400.0**3
        assert ask(child, "import torch; r = torch.get_num_threads()") == 1
        held = ask(child, "r = [l for l in open('/proc/self/maps') if ' rw-s ' in l]")
        assert held == []


# As an ordinary user, too


def closed_folders(path):
    """The folders above a path that other users may not enter."""
    return [p for p in (path, *path.parents) if not p.stat().st_mode & 0o001]


@pytest.mark.slow
def test_all_of_this_holds_for_an_ordinary_user():
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already")
    if missing := [tool for tool in ("unshare", "setpriv", "mount") if not shutil.which(tool)]:
        pytest.skip(f"NOT TESTED AS AN ORDINARY USER: {', '.join(missing)} not installed")
    # Python may lie in root's closed home: in mounts of its own, an open folder takes that place.
    needed = {Path(sys.prefix), Path(sys.base_prefix), ROOT}
    script = ["set -e", "mount --make-rprivate /"]
    closed = {folder: [] for path in needed for folder in closed_folders(path)[-1:]}
    for number, path in enumerate(sorted(needed)):
        for folder in closed_folders(path)[-1:]:
            closed[folder].append((number, path))
    if closed:
        script += ["stage=$(mktemp -d)", 'mount -t tmpfs stage "$stage"']
    for folder, inside in closed.items():
        for number, path in inside:
            script += [f'mkdir "$stage/{number}"', f'mount --bind "{path}" "$stage/{number}"']
        script += [f'mount -t tmpfs -o mode=755 open "{folder}"']
        for number, path in inside:
            script += [f'mkdir -p "{path}"', f'mount --move "$stage/{number}" "{path}"']
    if closed:
        script += ['umount "$stage"', 'rmdir "$stage"']
    script += ['exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"']
    tests = [sys.executable, "-m", "pytest", __file__, "-q", "-n0", "-p", "no:cacheprovider"]
    options = ["-m", "not slow"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh", *tests, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if done.returncode and "unshare" in done.stderr and "Operation not permitted" in done.stderr:
        pytest.skip("NOT TESTED AS AN ORDINARY USER: root may not make namespaces here")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
