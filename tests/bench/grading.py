"""Grading a class: stock `nbgrader autograde` beside `course grade` with its sandbox on.

Both grade the same submissions of one week, made of its solution and its known wrong answers, and
must give them the same points. What counts is the cost of a submission beyond the first: the time
of a whole command for many, less that for one, over how many more there were. nbgrader grades one
after the other and knows no other way; ours uses the machine's cores, and one core beside that.

The overhead is what the grader takes for a submission beyond its own computing, which is timed by
running its cells and checks in this process, everything imported.
"""

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import psutil
from _timing import ROOT, command_line, machine, show, start, verdict, write

from course.check import kernel_environment
from course.classroom import database_url, init, nbgrader_at, release
from course.grade import sandbox
from course.grade.intake import find_submissions
from course.grade.journal import read_results
from course.samples import Sample, samples
from course.source import CourseError, read_week

TIMES_BAR = 40.0
OVERHEAD_BAR = 100.0  # milliseconds
GROWTH_BAR = (
    1.1  # of the cost of a submission, and of memory, from the smallest class to the largest
)
LOOK_EVERY = 0.25  # seconds between two looks at the memory of the processes
# What stock nbgrader gives up on, or is fooled by: it would be compared for not doing the work.
NOT_IN_CLASS = ("damaged", "hostile")


def main(arguments: list[str] | None = None) -> None:
    """Check, time, print and write; `arguments` default to the command line's."""
    parser = command_line(__doc__, "tests/bench/grading.py --week 3 --sizes 40 200 1000")
    parser.set_defaults(threads=1)
    parser.add_argument("--week", default="3")
    parser.add_argument("--sizes", type=int, nargs="+", default=[40, 200, 1000], help="of classes")
    parser.add_argument(
        "--block", type=int, default=10, help="submissions in a round of nbgrader's"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isolation", nargs="+", help="tiers; default: those that work here")
    options = parser.parse_args(arguments)
    if options.device != "cpu" or options.clock == "cpu":
        print("this bench measures whole commands, many processes each: wall time, on the CPU")
        options.device, options.clock = "cpu", "wall"
    if options.quick:
        options.sizes, options.block, options.rounds = [2], 2, 1
    if min(*options.sizes, options.block) < 2 or options.rounds < 1:
        sys.exit("--sizes and --block must be 2 or more, --rounds 1 or more")
    device = start(options)
    try:
        tiers = [sandbox.probe(name).name for name in options.isolation or ()] or working_tiers()
        week = read_week(options.week).name
    except CourseError as error:
        sys.exit(str(error))

    before = machine(device)
    with tempfile.TemporaryDirectory(prefix="bench-grading-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), week, options)
        rows = list(bench.compare(tiers))
        grown = list(bench.grow(tiers[0], rows[1]))
    verdicts = judge(rows, grown, quick=options.quick)
    print_tables(rows, grown, verdicts, week)
    write("grading", options, before, {"rows": rows, "growth": grown, "verdicts": verdicts})


def working_tiers() -> list[str]:
    """Return the sandboxes that this machine has, the best one first."""
    found = []
    for name in ("bubblewrap", "landlock"):
        with suppress(CourseError):
            found.append(sandbox.probe(name).name)
    return found or [sandbox.probe().name]


class Bench:
    """The class, both contestants, and what they took."""

    def __init__(self, folder: Path, week: str, options):
        self.folder, self.week, self.options = folder, week, options
        self.samples = [s for s in samples(week) if s.student not in NOT_IN_CLASS]
        # nbgrader takes seconds to make a classroom, which is not what is measured.
        self.classroom = folder / "classroom"
        init(self.classroom)
        release(self.classroom, week)
        self.runs = 0
        self.own_computing(self.samples[0])  # imports what all of them import

    def compare(self, tiers: list[str]) -> Iterator[dict]:
        """Time the contestants in turns; yield a row for each."""
        size, block = self.options.sizes[0], self.options.block
        contestants = {"nbgrader": (self.stock, block, {})}
        for tier in () if self.options.quick else tiers:
            contestants[tier] = (self.ours, size, {"isolation": tier})
        contestants[f"{tiers[0]}, 1 job"] = (self.ours, size, {"isolation": tiers[0], "jobs": 1})
        each, first, overheads = defaultdict(list), defaultdict(list), defaultdict(list)
        points = {}
        for turn in range(self.options.rounds):
            names = list(contestants)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                run, number, how = contestants[name]
                one = 0.0 if self.options.quick else run(self.class_of(1), **how)[0]
                many, points[name], seconds = run(self.class_of(number), **how)
                first[name].append(one)
                each[name].append((many - one) / (number - 1))
                overheads[name] += self.overheads(seconds)
                print(f"{name}: {one:.1f} s for one, {each[name][-1]:.3f} s for a further one")
        for name, (_, number, _) in contestants.items():
            agree = sum(points["nbgrader"][s] == points[name].get(s) for s in points["nbgrader"])
            yield {
                "contestant": name,
                "submissions": number,
                "seconds_for_one": first[name],
                "seconds_for_a_further_one": each[name],
                "times_the_throughput": [a / b for a, b in zip(each["nbgrader"], each[name])],
                "milliseconds_of_overhead": overheads[name],
                "points_as_nbgrader": [agree, len(points["nbgrader"])],
            }

    def grow(self, tier: str, compared: dict) -> Iterator[dict]:
        """Grade classes of all sizes; yield what they cost beside one submission."""
        one = statistics.median(compared["seconds_for_one"])
        for size in self.options.sizes:
            with Memory() as memory:
                seconds, points, _ = self.ours(self.class_of(size), isolation=tier)
            print(f"class of {size}: {seconds:.1f} s")
            yield {
                "contestant": tier,
                "submissions": size,
                "graded": len(points),
                "seconds": seconds,
                "seconds_for_a_further_one": (seconds - one) / (size - 1),
                "peak_mib": {"command": memory.command, "all processes": memory.all},
            }

    def class_of(self, size: int) -> list[tuple[str, Sample]]:
        return [
            (f"s{number:04}", sample)
            for number, sample in enumerate(islice(cycle(self.samples), size))
        ]

    def stock(self, students) -> tuple[float, dict[str, float], dict]:
        """Grade with nbgrader; return seconds, points by student, and nothing."""
        room = self.new_folder("stock")
        shutil.copytree(self.classroom, room)
        self.hand_in(students, room / "submitted")
        command = [sys.executable, "-m", "nbgrader", "autograde", self.week]
        environment = kernel_environment(room / "scratch", self.options.threads)
        seconds = timed(command, room, os.environ | environment)
        from nbgrader.api import Gradebook

        with nbgrader_at(room) as config:
            course = config.CourseDirectory.course_id
            with Gradebook(database_url(room), course) as gradebook:
                entries = gradebook.assignment_submissions(self.week)
                points = {entry.student.id: entry.score for entry in entries}
        shutil.rmtree(room)
        return seconds, points, {}

    def ours(self, students, isolation: str, jobs: int | None = None):
        """Grade with the course's command; return seconds, points, and the journal's durations."""
        room = self.new_folder("ours")
        self.hand_in(students, room / "submitted")
        command = [sys.executable, "-m", "course", "grade", str(room / "submitted"), "--json"]
        command += ["--to", str(room / "out"), "--isolation", isolation]
        command += ["--jobs", str(jobs)] if jobs else []
        seconds = timed(command, ROOT, dict(os.environ))
        points = defaultdict(float)
        with open(room / "out" / "grades.csv", newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                points[row["student"]] += float(row["points"] or 0)
        results = read_results(room / "out")
        totals = {student: result.seconds["total"] for (student, _), result in results.items()}
        shutil.rmtree(room)
        return seconds, dict(points), totals

    def hand_in(self, students, to: Path) -> None:
        for student, sample in students:
            path = to / student / self.week / f"{self.week}.ipynb"
            path.parent.mkdir(parents=True)
            path.write_bytes(sample.content)
        assert len(find_submissions(to)[0]) == len(students)

    def new_folder(self, name: str) -> Path:
        self.runs += 1
        return self.folder / f"{name}-{self.runs}"

    def overheads(self, seconds: dict[str, float]) -> list[float]:
        """Milliseconds that each submission took beyond its own computing."""
        found = []
        for student, sample in self.class_of(len(seconds)):
            if student in seconds:
                found.append(1000 * (seconds[student] - self.own_computing(sample)))
        return found

    def own_computing(self, sample: Sample) -> float:
        """Seconds that a submission's cells and its checks take by themselves."""
        import nbformat

        notebook = nbformat.reads(sample.content.decode(), as_version=4)
        week = read_week(self.week)
        checks = {c.grade_id: c.cell.text for e in week.exercises.values() for c in e.checks}
        codes = []
        for cell in notebook.cells:
            marks = cell.metadata.get("nbgrader", {})
            if cell.cell_type == "code" and "experiment" not in cell.metadata.get("tags", ()):
                source = checks.get(marks.get("grade_id"), cell.source)
                codes.append(compile(source, "<cell>", "exec"))
        namespace: dict = {"__name__": "__main__"}
        with open(os.devnull, "w") as nowhere:
            shown, sys.stdout = sys.stdout, nowhere
            try:
                began = time.perf_counter()
                for code in codes:
                    with suppress(Exception):
                        exec(code, namespace)
                return time.perf_counter() - began
            finally:
                sys.stdout = shown
                if (plots := sys.modules.get("matplotlib.pyplot")) is not None:
                    plots.close("all")


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a command; return its seconds, or leave with what it said when it failed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds


class Memory:
    """The most MiB that the command, and it with all its processes, held while the block ran.

    Pages that a child of the sandbox shares with its parent are counted for both.
    """

    command = all = 0.0

    def __enter__(self) -> "Memory":
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        this = psutil.Process()
        while not self.done.wait(LOOK_EVERY):
            held = []
            with suppress(psutil.Error):
                for child in this.children():
                    held.append(child.memory_info().rss / 2**20)
                self.command = max([self.command, *held])
                for child in this.children(recursive=True):
                    with suppress(psutil.Error):
                        held.append(child.memory_info().rss / 2**20)
                self.all = max(self.all, sum(held))

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def judge(rows: list[dict], grown: list[dict], quick: bool = False) -> list[dict]:
    """Hold what was measured to the bars; at tiny sizes there is nothing to judge."""
    if quick:
        return []
    ours = rows[1:]
    best, alone = ours[0], ours[-1]
    small, large = grown[0], grown[-1]
    times = statistics.median(best["times_the_throughput"])
    overhead = statistics.median(alone["milliseconds_of_overhead"])
    growth = large["seconds_for_a_further_one"] / small["seconds_for_a_further_one"]
    memory = large["peak_mib"]["all processes"] / small["peak_mib"]["all processes"]
    sizes = f"{large['submissions']:,} beside {small['submissions']}"
    return [
        {
            "what": "times nbgrader's throughput",
            "value": times,
            "verdict": verdict(times, TIMES_BAR),
        },
        {
            "what": "median overhead, ms",
            "value": overhead,
            "verdict": at_most(overhead, OVERHEAD_BAR),
        },
        {
            "what": f"cost of a submission, a class of {sizes}",
            "value": growth,
            "verdict": at_most(growth, GROWTH_BAR),
        },
        {
            "what": f"peak memory, a class of {sizes}",
            "value": memory,
            "verdict": at_most(memory, GROWTH_BAR),
        },
    ]


def at_most(value: float, bar: float) -> str:
    """Say whether the value stays within the bar; if not, by how much it does not."""
    over = round(value, 2) - bar
    return "PASS" if over <= 0 else f"over its bar by {over:.2f}"


def print_tables(rows: list[dict], grown: list[dict], verdicts: list[dict], week: str) -> None:
    """Print the comparison, the growth, and what reaches its bar."""
    lines = []
    for row in rows:
        overhead = row["milliseconds_of_overhead"]
        agree, of = row["points_as_nbgrader"]
        lines.append(
            [
                row["contestant"],
                str(row["submissions"]),
                middle(row["seconds_for_one"], 1),
                middle(row["seconds_for_a_further_one"], 3),
                middle(row["times_the_throughput"], 1),
                f"{statistics.median(overhead):.0f}" if overhead else "",
                f"{agree} of {of}",
            ]
        )
    show(
        f"Grading {week}",
        [
            "<contestant",
            "submissions",
            "s for one",
            "s for a further one",
            "times the throughput",
            "overhead, ms",
            "points as nbgrader's",
        ],
        lines,
        "median (least–most) of the rounds; overhead: median over the submissions of what they "
        "took beyond their own computing.",
    )
    show(
        f"A class that grows, {grown[0]['contestant']}",
        ["submissions", "s", "s for a further one", "peak MiB, command", "all processes"],
        [
            [
                f"{row['submissions']:,}",
                f"{row['seconds']:.1f}",
                f"{row['seconds_for_a_further_one']:.3f}",
                f"{row['peak_mib']['command']:.0f}",
                f"{row['peak_mib']['all processes']:.0f}",
            ]
            for row in grown
        ],
    )
    for entry in verdicts:
        print(f"{entry['what']}: {entry['value']:.2f}: {entry['verdict']}")


def middle(values: list[float], digits: int) -> str:
    """Write the median of some values, with the least and the most."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
