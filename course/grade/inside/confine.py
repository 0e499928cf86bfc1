"""Shut a process in: its own namespaces, files, limits, and no privilege left.

Two doors. `enter` makes a root folder of named parts only and starts a program in it; it does what
bubblewrap does, where there is none. `confine` is called by a process just forked from the warm
parent, before it sees a line of a student's code. Everything is done through the C library,
because Python 3.11 knows neither unshare nor mount. Linux only.
"""

import ctypes
import json
import os
import resource
import signal
import stat
import sys
import tempfile
from contextlib import suppress

from . import landlock, seccomp

HOME, SPACE = "/home/student", "/space"
WRITABLE = ("/tmp", HOME, "/dev/shm")  # parts of one sized file system, so they share its limit
INSIDE_ID, NOBODY = 1000, 65534  # what a student sees itself as; who runs it when we are root
FILES_OF_SPACE = 65_536  # as many files and folders as the writable folders may hold together
OPEN_FILES = 256  # each may be a socket, whose buffers no limit counts

# From linux/sched.h, sys/mount.h, linux/mount.h, linux/prctl.h and linux/capability.h.
NEW_MOUNTS, NEW_CGROUP, NEW_HOST_NAME, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
BIND, RECURSIVE, PRIVATE, DETACH = 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
HERE, ALL_BELOW = -100, 0x8000
DIE_WITH_PARENT, DUMPABLE, DROP_BOUND, ADOPT, AMBIENT, CLEAR_ALL = 1, 4, 24, 36, 47, 4
# What the warm parent needs as root: to make namespaces, become nobody, read and end children.
KEPT_BY_PARENT = {
    "CAP_CHOWN": 0,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}

_libc = ctypes.CDLL(None, use_errno=True)


def must(name: str, *arguments) -> int:
    """Call a function of the C library. Raises: OSError with its name, when it says -1."""
    result = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


# --------------------------------------------------------------------------- the root folder


def enter(steps: list, command: list[str], as_root: bool, report: int, bound: bool) -> int:
    """Start a program as the first process of new namespaces and a new root; return its status.

    `steps` say what the root holds, in order: ["dir", path], ["bind", source, path],
    ["device", path], ["file", path, text], ["link", target, path], ["mask", path],
    ["tmpfs", path, MiB]. `report` is a descriptor that gets the program's process id as JSON.
    `bound` says that the program dies with the process that started this one.
    """
    if bound:
        must("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if not as_root:
        _new_user(0)
    others = NEW_MOUNTS | NEW_PIDS | NEW_NETWORK | NEW_IPC | NEW_HOST_NAME | NEW_CGROUP
    must("unshare", others)
    child = os.fork()
    if child:
        os.write(report, json.dumps({"child-pid": child}).encode())
        os.close(report)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        must("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        os.close(report)
        _make_root(steps)
        if as_root:
            _drop_bound(keep=set(KEPT_BY_PARENT.values()))
        os.execv(command[0], command)
    except OSError as error:
        sys.stderr.write(f"the root folder of the sandbox cannot be made: {error}\n")
    os._exit(1)


def _make_root(steps):
    """Build the root in a file system of memory on /tmp, move into it, and let go of the old."""
    must("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    # Held open first: what lies under /tmp is covered in a moment.
    sources = {step[1]: os.open(step[1], os.O_PATH) for step in steps if step[0] == "bind"}
    sources |= {step[1]: os.open(step[1], os.O_PATH) for step in steps if step[0] == "device"}
    must("mount", b"tmpfs", b"/tmp", b"tmpfs", NO_SETUID | NO_DEVICES, b"size=1m,mode=0755")
    new = "/tmp"
    for kind, *what in steps:
        if kind == "dir":
            os.makedirs(new + what[0], 0o755, exist_ok=True)
        elif kind == "file":
            with open(new + what[0], "w", encoding="utf-8") as file:
                file.write(what[1])
        elif kind == "link":
            os.symlink(what[0], new + what[1])
        elif kind == "bind":
            _bind(sources[what[0]], new + what[1], READ_ONLY | NO_SETUID | NO_DEVICES)
        elif kind == "device":
            _bind(sources[what[0]], new + what[0], READ_ONLY | NO_SETUID)
        elif kind == "mask":
            options = b"size=4k,nr_inodes=1,mode=0755"
            must("mount", b"tmpfs", os.fsencode(new + what[0]), b"tmpfs", READ_ONLY, options)
        elif kind == "tmpfs":
            options = f"size={what[1]}m,mode=1777".encode()
            flags = NO_SETUID | NO_DEVICES
            must("mount", b"tmpfs", os.fsencode(new + what[0]), b"tmpfs", flags, options)
    flags = NO_SETUID | NO_DEVICES | NO_EXEC
    must("mount", b"proc", f"{new}/proc".encode(), b"proc", flags, None)
    for source in sources.values():
        os.close(source)
    os.chdir(new)
    must("syscall", PIVOT_ROOT[os.uname().machine], b".", b".")
    must("umount2", b".", DETACH)
    os.chdir("/")
    _set_flags("/", READ_ONLY | NO_SETUID | NO_DEVICES, 0)


def _bind(source, target, flags):
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    # Recursive, because in a user namespace a mount may not be taken without what covers it.
    place = f"/proc/self/fd/{source}".encode()
    must("mount", place, os.fsencode(target), None, BIND | RECURSIVE, None)
    _set_flags(target, flags, ALL_BELOW)


def _set_flags(path, flags, depth):
    """mount_setattr: a plain remount would reach the topmost mount alone."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    must("syscall", MOUNT_SETATTR, HERE, os.fsencode(path), depth, ctypes.byref(attributes), size)


# --------------------------------------------------------------------------- one child


def confine(
    limits: dict,
    *,
    as_root: bool,
    readable: list[str],
    covered: list[str],
    bytes_of_parent: int,
) -> None:
    """Shut this process in for good; expects to be the second of a new process namespace.

    `limits` holds seconds, memory_mib, processes and disk_mib. `readable` names what Landlock
    leaves readable, `covered` what lies in the folders that will be writable and must stay there.
    `bytes_of_parent` of data are inherited and do not count.
    Raises: OSError, when a wall cannot be built; then no student's code may run here.
    """
    os.setsid()
    outside = os.open("/proc", os.O_PATH | os.O_DIRECTORY)  # the next /proc is read-only
    with suppress(OSError):
        _write(outside, "self/oom_score_adj", "1000")  # a machine out of memory ends this first
    must("unshare", NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_HOST_NAME | NEW_CGROUP)
    must("sethostname", b"sandbox", 7)
    _mount_own(limits["disk_mib"], covered, as_root)
    _drop_bound()
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        _new_user(INSIDE_ID, outside)
    except OSError:
        # Where only root may have user namespaces: nobody, without any privilege, needs none.
        if not as_root:
            raise
    os.close(outside)
    set_limits(limits, bytes_of_parent)
    drop_privileges()
    must("prctl", seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if landlock.version():
        landlock.restrict(readable, [*WRITABLE, "/dev/null", "/dev/zero", "/dev/full"])
    seccomp.install()
    os.umask(0o022)
    os.chdir(HOME)


def confine_bare(limits: dict, readable: list[str], folder: str, bytes_of_parent: int) -> None:
    """Do what can be done without namespaces, for students who are trusted: limits, a folder of
    its own, and on Linux no privileges, Landlock where the kernel has it, and the filter.
    """
    os.setsid()
    # The user's other processes count as well, so only a watch can count the child's own.
    limits = {name: value for name, value in limits.items() if name != "processes"}
    set_limits(limits, bytes_of_parent)
    if sys.platform.startswith("linux"):
        drop_privileges()
        must("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        must("prctl", seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if landlock.version():
            # Not all of /proc: the environment of the user's other processes may hold secrets.
            own = [f"/proc/{name}" for name in (os.getpid(), "meminfo", "cpuinfo", "stat")]
            devices = ("/dev/null", "/dev/zero", "/dev/full")
            landlock.restrict([*readable, *own], [folder, "/dev/shm", *devices])
        if seccomp.is_known():
            seccomp.install()
    os.umask(0o022)
    os.environ.update(HOME=folder, TMPDIR=folder)
    tempfile.tempdir = None  # remembered from the warm parent's imports
    os.chdir(folder)


def adopt_orphans() -> None:
    """Make processes whose parents ended this process's children, so that they can be found."""
    if sys.platform.startswith("linux"):
        must("prctl", ADOPT, 1, 0, 0, 0)


def set_limits(limits: dict, bytes_of_parent: int) -> None:
    """Set the kernel's limits on what a process and its descendants may take.

    Data and not address space: importing torch maps 3 GB that it never touches.
    """
    data = bytes_of_parent + limits["memory_mib"] * 2**20
    busy = int(60 + 20 * limits["seconds"])  # the grader's clock comes first; this is the last
    for name, value in {
        "RLIMIT_DATA": data,
        "RLIMIT_NPROC": limits.get("processes"),
        "RLIMIT_FSIZE": limits["disk_mib"] * 2**20,
        "RLIMIT_CPU": busy,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        # Of 0, the kernel still hands the dump of a crash to a program of the host; of 1, not.
        "RLIMIT_CORE": 1,
    }.items():
        if value is not None and (which := getattr(resource, name, None)) is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))


def drop_privileges() -> None:
    """Give up every capability, and every way to get one back by starting a program."""
    with suppress(OSError):  # the set is of no use to a process that may gain no privilege
        _drop_bound()
    must("prctl", AMBIENT, CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this process
    must("capset", header, (ctypes.c_uint32 * 6)())


def _mount_own(disk_mib, covered, as_root):
    """Give this process its own /proc and one sized file system for all that it can write to."""
    must("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    kept = {path: os.open(path, os.O_PATH) for path in covered}
    options = f"size={disk_mib}m,nr_inodes={FILES_OF_SPACE},mode=0755".encode()
    must("mount", b"tmpfs", SPACE.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, options)
    for number, path in enumerate(WRITABLE):
        part = f"{SPACE}/{number}"
        os.mkdir(part)
        os.chmod(part, 0o755 if path == HOME else 0o1777)
        if as_root:
            os.chown(part, NOBODY, NOBODY)
        must("mount", part.encode(), path.encode(), None, BIND, None)
    must("umount2", SPACE.encode(), DETACH)
    for path, source in kept.items():
        _bind(source, path, READ_ONLY | NO_SETUID | NO_DEVICES)
        os.close(source)
    flags = READ_ONLY | NO_SETUID | NO_DEVICES | NO_EXEC
    must("mount", b"proc", b"/proc", b"proc", flags, None)


def _new_user(inside, proc=None):
    """Enter a new user namespace, in which this user is `inside` and nobody else exists."""
    user, group = os.geteuid(), os.getegid()
    must("prctl", DUMPABLE, 1, 0, 0, 0)  # else its own /proc files belong to root
    must("unshare", NEW_USER)
    must("prctl", DUMPABLE, 1, 0, 0, 0)
    place = os.open("/proc", os.O_PATH | os.O_DIRECTORY) if proc is None else proc
    _write(place, "self/setgroups", "deny")
    _write(place, "self/uid_map", f"{inside} {user} 1")
    _write(place, "self/gid_map", f"{inside} {group} 1")
    if proc is None:
        os.close(place)


def _write(folder, path, text):
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _drop_bound(keep=frozenset()):
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if capability not in keep:
            must("prctl", DROP_BOUND, capability, 0, 0, 0)
