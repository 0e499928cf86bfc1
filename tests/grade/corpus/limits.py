"""Too much of something: the limit named in one sentence, other checks' points kept, nothing left.

Everything is bounded where no limit holds: half a minute, two GiB, a hundred processes.
"""

from .kit import FULL, ISOLATED, ONLY_MEAN, ONLY_SOFTMAX, WRONG, collector

CASES, case = collector("limits")
LATE = r"^it ran longer than \d+ s$"
MEMORY = r"^it needed more than \d+ MiB of memory$|MemoryError|allocate memory|^its process crashed"
PROCESSES = r"^it started more than \d+ processes$|^the answer raised (BlockingIO|OS)Error"
ENDED = r"^it ended its own process|^its process"

LOOP = """
import time
until = time.monotonic() + 30
while time.monotonic() < until:
    pass
"""


def answer(*lines: str) -> str:
    """An answer that does something first, and then answers wrongly."""
    body = "\n".join(f"    {line}" for text in lines for line in text.strip("\n").split("\n"))
    return f"def softmax(scores):\n{body}\n    return scores\n"


@case(ONLY_MEAN, LATE)
def loops_in_an_answer(kit):
    return kit.hand_in(softmax=answer(LOOP))


@case(FULL)
def loops_in_a_cell(kit):
    """The cell costs its time, and no answer its points."""
    return kit.hand_in(first=LOOP)


@case(ONLY_MEAN, LATE)
def loops_in_the_answers_cell(kit):
    return kit.hand_in(softmax=f"{LOOP}\n{kit.solution('softmax')}")


@case(ONLY_SOFTMAX, LATE)
def loops_when_it_is_constructed(kit):
    return kit.hand_in(
        running_mean="""
        import time

        class RunningMean(nn.Module):
            def __init__(self):
                time.sleep(30)
        """
    )


@case(ONLY_MEAN, LATE)
def will_not_be_interrupted(kit):
    """Ignores every signal that can be ignored and catches every exception."""
    return kit.hand_in(
        softmax="""
        import signal
        import time

        def softmax(scores):
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    while time.monotonic() < until:
                        pass
                except BaseException:
                    pass
            return scores
        """
    )


@case(ONLY_MEAN, LATE)
def loops_below_python(kit):
    """In C, where no interrupt is looked at, on every core that it can get."""
    return kit.hand_in(
        softmax="""
        import re

        def softmax(scores):
            torch.set_num_threads(8)
            re.match("(a*)*b", "a" * 30)
            return scores
        """
    )


@case(ONLY_MEAN, LATE)
def turns_back_the_clock(kit):
    """The student's clocks stand still; the grader's do not."""
    return kit.hand_in(
        softmax="""
        import time

        true = time.monotonic

        def softmax(scores):
            until = true() + 30
            while true() < until:
                pass

        for name in ("time", "monotonic", "perf_counter", "process_time"):
            setattr(time, name, lambda: 0.0)
        """
    )


@case(ONLY_MEAN, LATE)
def stops_itself(kit):
    """SIGSTOP: neither dead nor alive."""
    return kit.hand_in(softmax=answer("import os, signal", "os.kill(os.getpid(), signal.SIGSTOP)"))


@case(ONLY_MEAN, MEMORY)
def takes_memory_in_an_answer(kit):
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            hoard = [torch.ones(2**24) for _ in range(32)]  # 64 MiB each
            return scores + hoard[-1][0]
        """
    )


@case(FULL)
def takes_memory_in_a_cell(kit):
    return kit.hand_in(first="hoard = [bytearray(2**26) for _ in range(32)]")


@case(ONLY_MEAN, rf"{MEMORY}|{PROCESSES}")
def takes_memory_in_many_processes(kit):
    """Each is modest; together they are not."""
    return kit.hand_in(
        softmax="""
        import os
        import time

        def softmax(scores):
            for number in range(8):
                if os.fork() == 0:
                    try:
                        hoard = bytearray(b"x") * (200 * 2**20)
                        time.sleep(20)
                    finally:
                        os._exit(len(hoard) % 2)
            time.sleep(20)
            return scores
        """
    )


@case(ONLY_MEAN, rf"{PROCESSES}|{LATE}")
def bombs_with_forks(kit):
    """A hundred processes at the most, each of which sleeps."""
    return kit.hand_in(
        softmax="""
        import os
        import time

        def softmax(scores):
            for number in range(100):
                if os.fork() == 0:
                    time.sleep(20)
                    os._exit(0)
            time.sleep(20)
            return scores
        """
    )


@case(ONLY_MEAN, rf"{PROCESSES}|^the answer raised RuntimeError|{WRONG}")
def bombs_with_threads(kit):
    return kit.hand_in(
        softmax="""
        import threading
        import time

        def softmax(scores):
            for _ in range(300):
                threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
            return scores
        """
    )


@case(FULL)
def leaves_a_daemon(kit):
    """Forked twice, in a session of its own, deaf to signals; the answers are right."""
    return kit.hand_in(
        first="""
        import os
        import signal
        import time

        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(30)
            os._exit(0)
        """
    )


@case(FULL)
def leaves_a_program(kit):
    """A program that the shell started in the background."""
    return kit.hand_in(first="!sleep 30 &\n!nohup setsid sleep 30 >/dev/null 2>&1 &")


@case(ONLY_MEAN, rf"{ENDED}|{LATE}")
def leaves_its_place_to_a_child(kit):
    """The process ends, and a copy of it keeps the line open and says nothing."""
    return kit.hand_in(
        softmax="""
        import os
        import time

        def softmax(scores):
            if os.fork() == 0:
                time.sleep(30)
            os._exit(0)
        """
    )


@case(ONLY_MEAN, rf"{ENDED}|out of turn|{LATE}|{WRONG}")
def answers_twice(kit):
    """A copy of the process returns from the same call: two replies to one request."""
    return kit.hand_in(
        softmax="""
        import os

        def softmax(scores):
            os.fork()
            return scores
        """
    )


@case(FULL)
def floods_its_output(kit):
    """200 MB of text; what is shown is cut, and the cell goes on to its end."""
    return kit.hand_in(
        first="""
        line = "x" * 10_000
        for _ in range(20_000):
            print(line)
        """
    )


@case(FULL)
def floods_without_end(kit):
    """Prints for as long as it may, past Python's own streams."""
    return kit.hand_in(
        first="""
        import os
        import time

        until, block = time.monotonic() + 30, b"x" * 100_000
        while time.monotonic() < until:
            os.write(1, block)
            os.write(2, block)
        """
    )


@case(FULL)
def floods_from_an_answer(kit):
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            for _ in range(2000):
                print("x" * 10_000)
            return torch.softmax(scores, dim=-1)
        """
    )


@case(FULL)
def shows_a_hundred_pictures(kit):
    """Displayed things count like text."""
    return kit.hand_in(
        first="""
        from IPython.display import Image, display
        picture = b"\\x89PNG\\r\\n\\x1a\\n" + b"x" * 200_000
        for _ in range(100):
            display(Image(data=picture, format="png"))
        """
    )


@case(FULL, shown=r"stopped after \d+ MB", tiers=ISOLATED)
def fills_the_disk(kit):
    """400 MB in files of 8 MB, in each place that it may write to."""
    return kit.hand_in(
        first="""
        import os

        written, block = 0, b"x" * 2**23
        for place in ("/tmp", "/dev/shm", "/var/tmp", os.path.expanduser("~"), "."):
            try:
                for number in range(10):
                    with open(f"{place}/corpus_{number}", "wb") as file:
                        written += file.write(block)
            except OSError:
                pass
        print(f"stopped after {written // 2**20} MB")
        assert written <= 2**28, "more than the disk's limit and its rounding"
        """
    )


@case(ONLY_MEAN, r"^its process crashed \(SIGSEGV\)$")
def crashes(kit):
    return kit.hand_in(softmax=answer("import ctypes", "ctypes.string_at(0)"))


@case(ONLY_MEAN, r"^its process crashed \(SIGABRT\)$")
def aborts(kit):
    return kit.hand_in(softmax=answer("import os", "os.abort()"))


@case(ONLY_MEAN, r"^it ended its own process \(exit code 3\)$")
def exits_in_an_answer(kit):
    return kit.hand_in(softmax=answer("import os", "os._exit(3)"))


@case(FULL)
def exits_in_a_cell(kit):
    return kit.hand_in(between="import os\nos._exit(3)")


@case(FULL)
def exits_in_the_last_cell(kit):
    return kit.hand_in(last="import os\nos._exit(0)")


@case(ONLY_MEAN, r"^it ended its own process \(exit code 4\)$")
def exits_in_the_answers_cell(kit):
    return kit.hand_in(softmax=f"import os\nos._exit(4)\n{kit.solution('softmax')}")


@case(ONLY_MEAN, rf"{ENDED}.*SIGKILL|^its process crashed")
def kills_itself(kit):
    return kit.hand_in(softmax=answer("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"))


@case(ONLY_MEAN, r"^the answer raised RecursionError")
def recurses(kit):
    return kit.hand_in(softmax="def softmax(scores):\n    return softmax(scores)")


@case(ONLY_MEAN, rf"^the answer raised RecursionError|{ENDED}|{MEMORY}|{LATE}")
def recurses_below_python(kit):
    """Deeper than the C stack."""
    return kit.hand_in(
        softmax="""
        import sys

        def softmax(scores):
            sys.setrecursionlimit(10**8)
            nest = []
            for _ in range(10**6):
                nest = [nest]
            return repr(nest)
        """
    )


@case(FULL)
def cannot_end(kit):
    """A thread that never stops, and an exit handler that never returns."""
    return kit.hand_in(
        first="""
        import atexit
        import threading
        import time

        threading.Thread(target=time.sleep, args=(30,)).start()
        atexit.register(time.sleep, 30)

        class Clinging:
            def __del__(self):
                time.sleep(30)

        kept = Clinging()
        """
    )


@case(FULL)
def waits_for_input(kit):
    """Nobody is there to answer."""
    return kit.hand_in(first="name = input('your name? ')", last="import sys\nsys.stdin.read()")


@case(ONLY_MEAN, LATE)
def waits_for_a_lock(kit):
    return kit.hand_in(
        softmax="""
        import threading

        lock = threading.Lock()

        def softmax(scores):
            lock.acquire(timeout=30)
            lock.acquire(timeout=30)
            return scores
        """
    )
