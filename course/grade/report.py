"""The page that an instructor reads: how the class did, and how the checks did.

Results are read one after the other and only numbers are kept of each, so the page of a thousand
submissions takes little memory. Per check it says how many earned it (difficulty), whether those
who earn it do well elsewhere (discrimination), which known mistakes were made, and which checks
look wrong themselves: a check that strong students fail is more often a bad check than a hard one.

A submission in which nothing was answered counts among those handed in, and not among those that
tried: a pile of empty notebooks would make every check look as if it told strong from weak.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from heapq import nlargest
from urllib.parse import quote

from course.grade import feedback, pages
from course.grade.journal import Move
from course.grade.records import Limits, Result, Row
from course.source import Week

FEWEST = 10  # submissions, below which a correlation says nothing
STEADY = 30  # submissions, below which it may well come out otherwise next year
TOLD_APART = 3  # students on each side, before a negative correlation is worth a word
MOST_REASONS = 200  # different reasons that are counted for a check; the rest is "other"
LONGEST_LIST = 100  # lines of a list; the rest is in grades.csv
COMMON = 10  # mistakes that are shown at once; the rarer ones are folded
MOST_BARS = 26  # of the distribution: one for each point while there are few points


@dataclass
class _Check:
    """What is counted of one check."""

    grade_id: str
    exercise: str
    title: str
    max_points: float
    left_open: int = 0
    reasons: Counter = field(default_factory=Counter)
    recognised: Counter = field(default_factory=Counter)

    def count(self, row: Row) -> None:
        """Count a check that did not pass."""
        reason = pages.clean(row.reason)[:160] or "no reason given"
        if reason == f"it must hold: {self.title}":
            reason = "an assert without a message"
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            reason = "other reasons"
        self.reasons[reason] += 1
        self.left_open += feedback.is_open(row.reason)


@dataclass
class _Week:
    """What is counted of one week. A row of `shares` is one student: a share for each check."""

    name: str
    week: Week | None
    checks: dict[str, _Check] = field(default_factory=dict)
    shares: list[tuple[float, ...]] = field(default_factory=list)
    points: list[float] = field(default_factory=list)
    empty: int = 0
    odd: Counter = field(default_factory=Counter)
    waiting: int = 0
    marks: list[float] = field(default_factory=list)  # shares given by a person
    mistakes: Counter = field(default_factory=Counter)  # submissions by exercise and names

    @property
    def possible(self) -> float:
        return sum(check.max_points for check in self.checks.values())

    @property
    def handed_in(self) -> int:
        return len(self.points) + self.empty + self.odd.total()

    def add(self, result: Result) -> str:
        """Count one submission; return what it was: tried, empty, or the status of all its rows."""
        kind = _kind(result)
        if kind not in ("tried", "empty"):
            self.odd[kind] += 1
            return kind
        by_hand = [row for row in result.rows if feedback.is_by_hand(row)]
        self.waiting += sum(row.points is None for row in by_hand)
        self.marks += [r.points / r.max_points for r in by_hand if r.points is not None]
        if kind == "empty":
            self.empty += 1
            return kind
        share = {}
        for row in _checked(result):
            check = self.checks.get(row.grade_id) or self._new(row)
            share[row.grade_id] = (row.points or 0.0) / row.max_points if row.max_points else 0.0
            if share[row.grade_id] < 1.0:
                check.count(row)
        # Two mistakes may give the same value; then it is one finding with two names.
        self.mistakes.update({(r.exercise, r.recognised) for r in result.rows if r.recognised})
        self.shares.append(tuple(share.get(grade_id, 0.0) for grade_id in self.checks))
        self.points.append(sum(row.points or 0.0 for row in _checked(result)))
        return kind

    def _new(self, row: Row) -> _Check:
        title = row.check
        if self.week and row.exercise in self.week.exercises:
            checks = self.week.exercises[row.exercise].checks
            title = next((c.title for c in checks if c.grade_id == row.grade_id), title)
        check = _Check(row.grade_id, row.exercise, title, row.max_points)
        self.checks[row.grade_id] = check
        return check


def page(
    results: Iterable[Result],
    weeks: Mapping[str, Week],
    *,
    tier: str = "",
    versions: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    secret: str = "",
    moved: str = "",
    moves: Iterable[Move] = (),
    notices: Iterable[str] = (),
) -> str:
    """The report on a class, a whole HTML page that links to the feedback beside it.

    `results` may be an iterator. `secret` is the fingerprint of the course's secret. `moved` says
    in a sentence what a regrade changed, and `moves` lists it.
    """
    moves = sorted(moves, key=lambda move: move.before - move.after)
    tallies: dict[str, _Week] = {}
    trouble, mended, seconds, memory = [], [], [], []
    same_file, students = defaultdict(list), defaultdict(dict)
    tiers, versions_seen = Counter(), Counter()
    for result in results:
        tally = tallies.setdefault(result.week, _Week(result.week, weeks.get(result.week)))
        kind = tally.add(result)
        students[result.student][result.week] = (kind, result.points)
        if kind == "tried":
            same_file[result.week, result.submission_digest].append(result.student)
        trouble += _trouble(result, kind)
        mended += [(result.student, result.week, note) for note in result.notes.values()]
        if "total" in result.seconds:
            seconds.append((result.seconds["total"], *result.key, result.seconds))
            memory.append((result.peak_mib, *result.key))
        if result.tier:
            tiers[result.tier] += 1
        if result.versions:
            versions_seen[", ".join(f"{k} {v}" for k, v in sorted(result.versions.items()))] += 1
    names = sorted(tallies)
    values = {
        "weeks": [_week_values(tallies[name]) for name in names],
        "names": names,
        "link": _link,
        "students": sorted(students.items()),
        "trouble": trouble,
        "mended": mended,
        "same": sorted((w, sorted(s)) for (w, _), s in same_file.items() if len(s) > 1),
        "times": _times([entry[0] for entry in seconds]),
        "slowest": nlargest(10, seconds, key=lambda entry: entry[0]),
        "largest": nlargest(5, memory, key=lambda entry: entry[0]),
        "tier": tier,
        "tiers": tiers.most_common(),
        "versions": ", ".join(f"{k} {v}" for k, v in sorted((versions or {}).items())),
        "versions_seen": versions_seen.most_common(),
        "limits": asdict(limits) if limits else {},
        "secret": secret,
        "moved": moved,
        "moves": moves,
        "moved_checks": _moved_checks(moves),
        "notices": list(notices),
        "common": COMMON,
        "longest": LONGEST_LIST,
        "fewest": FEWEST,
        "steady": STEADY,
    }
    return pages.render("report", values)


def _kind(result: Result) -> str:
    checked = _checked(result)
    if result.outcome != "graded":
        return result.outcome
    if checked and all(row.status == "stopped" for row in checked):
        return "stopped"
    if all(row.status != "passed" and feedback.is_open(row.reason) for row in checked):
        return "empty"
    return "tried"


def _checked(result: Result) -> list[Row]:
    return [row for row in result.rows if not feedback.is_by_hand(row)]


def _trouble(result: Result, kind: str) -> list[tuple[str, str, str, str]]:
    """What a person may want to look at: student, week, what, and why."""
    if kind not in ("tried", "empty"):
        return [(*result.key, kind, result.rows[0].reason if result.rows else "")]
    found: dict[tuple[str, str], None] = {}
    for row in _checked(result):
        if row.status == "stopped" or feedback.names_a_limit(row.reason):
            found[row.exercise, row.reason] = None
    return [(*result.key, exercise, reason) for exercise, reason in found]


def _moved_checks(moves: list[Move]) -> list[tuple[str, str, int, int]]:
    """Per week and check: how many students have more from it, and how many less."""
    changes = Counter((m.week, check, by > 0) for m in moves for check, by in m.checks if by)
    named = sorted({(week, check) for week, check, _ in changes})
    return [(*name, changes[*name, True], changes[*name, False]) for name in named]


def _times(seconds: list[float]) -> dict:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "late": ordered[int(0.95 * (len(ordered) - 1))],
        "sum": sum(ordered),
    }


# How a week and its checks did


def _week_values(tally: _Week) -> dict:
    checks = list(tally.checks.values())
    columns = list(zip(*tally.shares)) if tally.shares else []
    items = [_item(check, column, checks, tally) for check, column in zip(checks, columns)]
    week = tally.week
    return {
        "name": tally.name,
        "number": week.number if week else None,
        "title": week.title if week else tally.name,
        "tally": tally,
        "tried": len(tally.points),
        "mean": statistics.fmean(tally.points) if tally.points else 0.0,
        "median": statistics.median(tally.points) if tally.points else 0.0,
        "chart": _chart(tally.points, tally.possible) if tally.points else None,
        "exercises": _exercises(tally, checks, columns),
        "items": items,
        "suspects": [item for item in items if item["verdict"]],
        "given": [item["check"] for item in items if item["share"] == 1.0],
        "mistakes": _mistakes(tally),
    }


def _item(check: _Check, column: tuple[float, ...], checks: list[_Check], tally: _Week) -> dict:
    points = [share * check.max_points for share in column]
    rest = [total - own for total, own in zip(tally.points, points)]
    share = statistics.fmean(column)
    correlation = item_rest(column, rest)
    return {
        "check": check,
        "share": share,
        "correlation": correlation,
        "verdict": _verdict(check, column, rest, correlation),
        "reasons": [] if share == 1.0 else check.reasons.most_common(3),
    }


def item_rest(item: Iterable[float], rest: Iterable[float]) -> float | None:
    """The correlation of a check's points with the points of all the others.

    None when there are too few submissions, or all have the same points: then there is none.
    """
    item, rest = list(item), list(rest)
    if len(item) < FEWEST or len(set(item)) < 2 or len(set(rest)) < 2:
        return None
    return statistics.correlation(item, rest)


def _verdict(check: _Check, column, rest: list[float], correlation: float | None) -> str:
    """Why a check may be wrong itself, or nothing."""
    count = len(column)
    failed = sum(share < 1.0 for share in column)
    answered = failed - check.left_open
    if count >= FEWEST // 2 and failed == count and answered > count / 2:
        return "nobody passes it: try the solution with `python -m course verify`"
    if count < FEWEST or len(set(rest)) < 2:
        return ""
    order = sorted(range(count), key=lambda i: -rest[i])
    strong = order[: max(TOLD_APART, count // 3)]
    strong_failed = sum(column[i] < 1.0 for i in strong)
    if answered >= TOLD_APART and 2 * strong_failed > len(strong):
        return f"{strong_failed} of the strongest {len(strong)} fail it: probably a bad check"
    if correlation is not None and correlation < 0 and TOLD_APART <= failed <= count - TOLD_APART:
        return "those who fail it do better elsewhere than those who pass it"
    return ""


def _exercises(tally: _Week, checks: list[_Check], columns: list) -> list[dict]:
    """Per exercise: its title, the share of its points that was earned, how many left it open."""
    found: dict[str, list] = {}
    for check, column in zip(checks, columns):
        found.setdefault(check.exercise, []).append((check, statistics.fmean(column)))
    exercises = tally.week.exercises if tally.week else {}
    return [
        {
            "title": feedback.heading(exercises[name]) if name in exercises else name,
            "points": sum(check.max_points for check, _ in parts),
            "share": sum(check.max_points * share for check, share in parts)
            / (sum(check.max_points for check, _ in parts) or 1.0),
            "left_open": max(check.left_open for check, _ in parts),
        }
        for name, parts in found.items()
    ]


def _mistakes(tally: _Week) -> list[dict]:
    exercises = tally.week.exercises if tally.week else {}
    found = []
    for (exercise, names), count in tally.mistakes.most_common():
        wrongs = exercises[exercise].wrongs if exercise in exercises else ()
        says = [wrong.says for wrong in wrongs if wrong.name in names]
        name = f"{exercise}: {' or '.join(names)}"
        found.append({"name": name, "count": count, "says": says})
    return found


# The distribution


def _chart(points: list[float], possible: float) -> dict:
    """Bars and axes of a histogram in a box of 640 by 240; a table holds the same numbers."""
    bars = min(MOST_BARS, round(possible) + 1)
    width = max(possible, 1.0) / max(bars - 1, 1)
    counts = Counter(min(bars - 1, max(0, round(p / width))) for p in points)
    left, right, top, bottom = 62, 634, 14, 184
    most = max(counts.values())
    step, slot = _step(most), (right - left) / bars
    ceiling = -(-most // step) * step
    scale = (bottom - top) / ceiling
    every = max(1, -(-bars // 11))
    shown = []
    for place in range(bars):
        count = counts.get(place, 0)
        low, high = (place - 0.5) * width, (place + 0.5) * width
        label = pages.number(place * width)
        if width > 1:
            label = f"{pages.number(max(0.0, low))} to {pages.number(min(possible, high))}"
        shown.append(
            {
                "x": round(left + place * slot + 0.1 * slot, 1),
                "y": round(bottom - count * scale, 1),
                "width": round(0.8 * slot, 1),
                "height": round(count * scale, 1),
                "middle": round(left + (place + 0.5) * slot, 1),
                "tick": pages.number(round(place * width)) if place % every == 0 else "",
                "label": label,
                "count": count,
            }
        )
    grid = [(round(bottom - n * scale, 1), n) for n in range(0, ceiling + 1, step)]
    return {"bars": shown, "grid": grid, "left": left, "right": right, "bottom": bottom}


def _step(most: int) -> int:
    """Between two lines of the grid, so that there are at most six."""
    step = 1
    while most / step > 5:
        step = next(s for s in (2 * step, 5 * step, 10 * step) if most / s <= 5 or s == 10 * step)
    return step


def _link(student: str, week: str) -> str:
    return f"feedback/{quote(student, safe='', errors='replace')}/{quote(week, safe='')}.html"
