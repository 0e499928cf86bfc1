"""Reading and writing outside: nothing is there to read, writing fails, a right answer scores.

Each case prints what it could do, as "done: [...]", and the executed notebook must show an empty
list: an attack that worked and said nothing would look like one that failed.
"""

import textwrap

from .kit import FULL, ISOLATED, ROOT, collector

CASES, case = collector("reading or writing outside")
EMPTY = r"done: \[\]"

# Tries many things; what did not fail is done.
TRY = """
import ctypes, glob, os, pathlib, signal, socket, sys, time
done = []
def attempt(name, call):
    try:
        value = call()
    except BaseException:
        return
    if value is not None and value is not False:
        done.append((name, str(value)[:80]))
"""


def tries(code: str) -> str:
    return f"{TRY}{textwrap.dedent(code).strip()}\nprint('done:', done)"


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def reads_the_tests(kit):
    """The weeks with their hidden checks, the solutions, the history of the repository."""
    return kit.hand_in(
        first=tries(f"""
        for name in ("course/weeks/w03_clip.py", "solutions/w03_clip.ipynb", ".git/HEAD",
                     "tests/weeks/w99_sample.py", "course/grade/checks.py", "pyproject.toml"):
            for root in ({str(ROOT)!r}, "/proc/1/cwd", "/proc/1/root" + {str(ROOT)!r},
                         "/proc/self/root" + {str(ROOT)!r}, "..", "../.."):
                attempt(name, lambda: open(os.path.join(root, name)).read() and root)
        attempt("course", lambda: __import__("course"))
        attempt("course.source", lambda: __import__("course.source"))
        for root in sys.path + [sys.prefix]:
            attempt("weeks", lambda: os.listdir(os.path.join(root, "course", "weeks")))
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def reads_decoys(kit):
    """Other submissions, a gradebook and a home that everyone on the host may read."""
    return kit.hand_in(
        first=tries(f"""
        decoys = {str(kit.decoys)!r}
        files = ("tests/hidden.py", "gradebook.db", "home/notes.txt", "submitted/ada/w99.ipynb")
        for path in files:
            for root in ("", "/proc/1/root", "/proc/self/root", "/proc/self/cwd/../../../../../.."):
                attempt(path, lambda: open(f"{{root}}{{decoys}}/{{path}}").read())
        attempt("listing", lambda: os.listdir(decoys))
        above = os.path.dirname(decoys)
        attempt("temporary", lambda: glob.glob("mmlearn*", root_dir=above) or None)
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def reads_environments(kit):
    """Secrets in its own environment, in that of every process it can see, and in their memory."""
    return kit.hand_in(
        first=tries("""
        word = ("MMLEARN_CORPUS" + "_DECOY").encode()
        attempt("own", lambda: [name for name in os.environ if name.encode() == word] or None)
        for process in glob.glob("/proc/[0-9]*"):
            for name in ("environ", "cmdline", "maps"):
                attempt(process, lambda: word in open(f"{process}/{name}", "rb").read())
            attempt(process, lambda: [p for p in glob.glob(f"{process}/fd/*")
                                      if "corpus" in os.readlink(p)] or None)
        attempt("others", lambda: [p for p in glob.glob("/proc/[0-9]*")
                                   if b"pytest" in open(f"{p}/cmdline", "rb").read()] or None)
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def writes_decoys(kit):
    """Appends to, replaces, links, renames and deletes what everyone on the host may write."""
    return kit.hand_in(
        first=tries(f"""
        decoys = {str(kit.decoys)!r}
        book = f"{{decoys}}/gradebook.db"
        attempt("append", lambda: open(book, "a").write("99 points"))
        attempt("create", lambda: open(f"{{decoys}}/new.txt", "w").write("new"))
        attempt("rename", lambda: os.rename(book, book + ".old") or True)
        attempt("delete", lambda: os.unlink(book) or True)
        attempt("mode", lambda: os.chmod(book, 0o600) or True)
        attempt("times", lambda: os.utime(book, (0, 0)) or True)
        attempt("link", lambda: os.link(book, "book") or True)
        os.symlink(decoys, "way")
        attempt("symlink", lambda: open("way/gradebook.db", "a").write("99 points"))
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def writes_into_the_installation(kit):
    """A file that every later process of the course would import."""
    return kit.hand_in(
        first=tries(f"""
        import mmlearn, torch, sysconfig
        places = [sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], *mmlearn.__path__,
                  *torch.__path__, "/etc", "/usr/bin", "/lib", "/dev", "/sys", "/proc", "/"]
        places += [p for p in sys.path if os.path.isdir(p) and p not in ("", os.getcwd())]
        for place in places:
            path = f"{{place}}/{kit.token}.pth"
            attempt(place, lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)) or path)
            if os.path.exists(path):
                os.unlink(path)
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def calls_out(kit):
    """TCP, UDP and abstract sockets to the host, and an address that nobody has."""
    return kit.hand_in(
        first=tries(f"""
        def knock(family, kind, address):
            with socket.socket(family, kind) as caller:
                caller.settimeout(0.3)
                caller.connect(address)
                caller.send(b"hello")
                return address

        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        attempt("tcp", lambda: knock(socket.AF_INET, stream, ("127.0.0.1", {kit.port})))
        attempt("tcp6", lambda: knock(socket.AF_INET6, stream, ("::ffff:127.0.0.1", {kit.port})))
        attempt("udp", lambda: knock(socket.AF_INET, datagram, ("192.0.2.1", 9)))
        attempt("far", lambda: knock(socket.AF_INET, stream, ("192.0.2.1", 80)))
        attempt("abstract", lambda: knock(socket.AF_UNIX, stream, "\\0{kit.token}"))
        attempt("name", lambda: socket.getaddrinfo("example.com", 80))
        attempt("raw", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        attempt("netlink", lambda: [n for _, n in socket.if_nameindex() if n != "lo"] or None)
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def opens_the_hosts_settings(kit):
    """Only opened, never written: the kernel's settings, memory and devices."""
    return kit.hand_in(
        first=tries("""
        names = ["/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory",
                 "/proc/sysrq-trigger", "/proc/kcore", "/dev/mem", "/dev/kmsg", "/dev/vda",
                 "/dev/fuse", "/dev/kvm", "/sys/power/state", "/sys/kernel/uevent_helper",
                 "/proc/sys/kernel/hostname", "/proc/1/oom_score_adj"]
        names += glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True)[:20]
        for name in names:
            attempt(name, lambda: os.close(os.open(name, os.O_WRONLY)) or name)
        attempt("kcore", lambda: open("/proc/kcore", "rb").read(1) or None)
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def asks_for_powers(kit):
    """To become root, to mount, to trace, to set the clock: in forms that change nothing."""
    return kit.hand_in(
        first=tries("""
        libc = ctypes.CDLL(None, use_errno=True)

        def call(name, *arguments):
            return (getattr(libc, name)(*arguments) == 0) or None

        def system(number, *arguments):
            return (libc.syscall(number, *arguments) >= 0) or None

        attempt("root", lambda: os.setuid(0) or os.getuid() == 0 or None)
        attempt("groups", lambda: os.setgroups([0]) or True)
        attempt("root now", lambda: True if os.geteuid() == 0 else None)
        attempt("mount", lambda: call("mount", b"none", b"/proc/self/none", b"tmpfs", 0, None))
        attempt("mount namespace", lambda: call("unshare", 0x00020000))
        attempt("user namespace", lambda: call("unshare", 0x10000000))
        attempt("chroot", lambda: os.chroot(".") or True)
        attempt("device", lambda: os.mknod("null", 0o20666, os.makedev(1, 3)) or True)
        attempt("clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()) or True)
        attempt("name", lambda: socket.sethostname(socket.gethostname()) or True)
        if os.getppid():
            attempt("trace", lambda: call("ptrace", 0x4206, os.getppid(), 0, 0))
        if os.uname().machine == "x86_64":
            for name, number, arguments in (
                ("bpf", 321, (0, 0, 0)), ("perf", 298, (0, 0, -1, -1, 0)), ("userfault", 323, (0,)),
                ("keyring", 250, (0, -3, 1)), ("uring", 425, (1, ctypes.create_string_buffer(256))),
                ("open tree", 428, (-100, b"/", 1)), ("new mount", 430, (b"tmpfs", 0)),
                ("secret memory", 447, (0,)), ("handle", 304, (-100, 0, 0)),
            ):
                attempt(name, lambda: system(number, *arguments))
        """)
    )


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def follows_inherited_descriptors(kit):
    """What the fork left open: files, folders to climb out of, other sockets, shared memory."""
    return kit.hand_in(
        first=tries("""
        import stat
        own = ("/dev/null", "/dev/urandom", "/tmp", "/home", "/proc/" )
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else range(3, 64):
            number = int(name)
            def look():
                where = os.readlink(f"/proc/self/fd/{number}")
                kind = os.fstat(number).st_mode
                if stat.S_ISDIR(kind) and not where.startswith("/proc/"):
                    return where
                return where if where.startswith("/") and not where.startswith(own) else None
            attempt(number, look)
            attempt(f"{number}/..", lambda: os.open("../../../tmp", os.O_RDONLY, dir_fd=number)
                    if number > 2 and stat.S_ISDIR(os.fstat(number).st_mode)
                    and not os.readlink(f"/proc/self/fd/{number}").startswith("/proc/") else None)
        strangers = []
        for number in range(3, 1024):
            try:
                with socket.socket(fileno=os.dup(number)) as there:
                    peer = there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
            except OSError:
                continue
            if int.from_bytes(peer, sys.byteorder) != os.getpid():
                strangers.append(number)
        attempt("sockets", lambda: strangers if len(strangers) > 1 else None)
        """)
    )


NOTES = """
import torch, mmlearn.feedback

for place in {"/tmp", "/dev/shm", "/var/tmp", os.path.expanduser("~"), os.getcwd()}:
    path = f"{place}/corpus_note"
    attempt(path, lambda: open(path).read())
    try:
        open(path, "a").write("the answer is in here")
    except OSError:
        pass
libc, listener = ctypes.CDLL(None), socket.socket(socket.AF_UNIX)
attempt("memory", lambda: libc.shmget(0x636F7270, 4096, 0) >= 0 or None)
libc.shmget(0x636F7270, 4096, 0o1666)
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0corpus_note") or True)
try:
    listener.bind("\\0corpus_note")
    listener.listen()
except OSError:
    pass
attempt("torch", lambda: torch.corpus_note)
torch.corpus_note = mmlearn.feedback.corpus_note = "the answer is in here"
"""


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def leaves_notes_for_the_next(kit):
    """Writes where a later submission would look: files, shared memory, sockets, modules."""
    return kit.hand_in(first=tries(NOTES))


@case(FULL, shown=EMPTY, tiers=ISOLATED)
def looks_for_notes_of_an_earlier_one(kit):
    return kit.hand_in(first=tries(NOTES))


@case(FULL, tiers=ISOLATED)
def kills_what_it_sees(kit):
    """SIGKILL to every process in sight, where those can only be its own."""
    return kit.hand_in(
        last="""
        import os
        import signal

        own = os.getpid() < 64 and sum(name.isdigit() for name in os.listdir("/proc")) < 24
        if own:
            os.kill(-1, signal.SIGKILL)
        """
    )
