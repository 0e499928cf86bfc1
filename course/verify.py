"""The proof that grading means something.

For every exercise, with all other exercises left as stubs:

- the solution passes every check, quietly (nbgrader takes anything on standard error, or a value
  shown at the end of a check, for a mark), and each hidden region also passes alone;
- the bare stub fails every check and every hidden region;
- every known wrong answer is rejected by the hidden region of at least one check, run alone, so
  that a learner who tunes an answer to the visible numbers gains nothing.

Each of these is tried under two random seeds. Who may use whose names was already settled when the
week was read (`rules.py`). Beside the proof it reports, for each wrong answer, whether the visible
checks notice it and whether they say the sentence written for it.
"""

import time
from dataclasses import asdict, dataclass, field

from course.attempts import SECONDS, job_for, run_jobs
from course.fingerprints import FINGERPRINTS, digest_of, read_fingerprints
from course.source import read_week, repo_root, resolve_week, week_names


@dataclass
class WrongResult:
    """What became of one wrong answer."""

    name: str
    rejected_by: dict[str, str]  # aspect whose hidden region rejects it under every seed -> how
    noticed: bool  # some visible check fails
    recognised: bool  # some visible check says its sentence


@dataclass
class ExerciseResult:
    """What became of one exercise; it holds if there are no problems."""

    week: str
    exercise: str
    points: int
    checks: int
    wrongs: list[WrongResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    outdated: bool = False  # the fingerprints on disk are not those of this text

    @property
    def ok(self):
        return not self.problems


@dataclass
class Verification:
    """The results of a run, and whether all of them hold."""

    exercises: list[ExerciseResult]
    seconds: float

    @property
    def ok(self):
        return all(result.ok for result in self.exercises)

    def as_dict(self):
        """Plain values for JSON."""
        exercises = [asdict(result) | {"ok": result.ok} for result in self.exercises]
        return {"ok": self.ok, "seconds": self.seconds, "exercises": exercises}


def verify(
    weeks=None,
    *,
    jobs=None,
    seconds=SECONDS,
    folder=None,
    fingerprints=None,
    done=lambda result: None,
):
    """Verify the named weeks, or all.

    `done(result)` is called as each exercise is finished. `folder` holds the week sources, if they
    are not the checkout's; `fingerprints` is the file that visible checks look into.
    Raises: CourseError, if a week cannot be read or the answers cannot be run at all.
    """
    start = time.monotonic()
    names = sorted({resolve_week(week, folder) for week in weeks or week_names(folder)})
    path = fingerprints or repo_root() / FINGERPRINTS
    known = read_fingerprints(path)["sources"]
    pairs, work, judged = {}, [], {}
    for name in names:
        week = read_week(name, folder)
        for exercise in week.exercises.values():
            pairs[f"{name}/{exercise.name}"] = week, exercise
            answers = [
                ("solution", exercise.answer.line, exercise.solution),
                ("stub", exercise.answer.line, exercise.stub),
                *((f"wrong {w.name}", w.cell.line, w.code) for w in exercise.wrongs),
            ]
            work.append(job_for(week, exercise, answers, fingerprints=path))

    def judge(ran):
        week, exercise = pairs[ran["key"]]
        result = judged[ran["key"]] = _judge(week, exercise, ran)
        result.outdated = known.get(ran["key"]) != digest_of(week, exercise.name)
        done(result)

    run_jobs(work, processes=jobs, seconds=seconds, done=judge)
    return Verification([judged[key] for key in pairs], round(time.monotonic() - start, 2))


def _judge(week, exercise, ran):
    """Hold what the answers of one exercise did against what they should have done."""
    result = ExerciseResult(week.name, exercise.name, exercise.points, len(exercise.checks))
    result.seconds = ran["seconds"]
    if "died" in ran:
        result.problems.append(f"the cells above the exercise: {ran['died']}")
        return result
    for error in ran["before"]:
        if error["type"] != "NotImplementedError":
            result.problems.append(
                f"a given cell fails while exercises are unanswered ({_short(error)}): tag it "
                '"experiment", or mend it'
            )
    answers = dict(ran["answers"])
    result.problems += _problems_of_solution(exercise, answers["solution"])
    result.problems += _problems_of_stub(exercise, answers["stub"])
    for wrong in exercise.wrongs:
        runs = answers[f"wrong {wrong.name}"]
        judged, problems = _judge_wrong(exercise, wrong, runs)
        result.wrongs.append(judged)
        result.problems += problems
    result.problems = list(dict.fromkeys(result.problems))  # the seeds mostly agree
    return result


def _problems_of_solution(exercise, runs):
    for run in runs:
        if failure := run.get("died") or (run["error"] and _short(run["error"])):
            yield f"the solution itself fails: {failure}"
            continue
        for check in exercise.checks:
            parts = run["checks"][check.grade_id]
            failed = [part for part, outcome in parts.items() if outcome and outcome["error"]]
            if failed:
                where = {"whole": "", "visible": " (visible part)", "hidden": " (hidden, alone)"}
                error = _short(parts[failed[0]]["error"])
                yield f"the solution fails check {check.aspect}{where[failed[0]]}: {error}"
            if parts["whole"]["stderr"]:
                noise = parts["whole"]["stderr"].strip().split("\n")[0]
                yield (
                    f"check {check.aspect} writes to standard error, for which nbgrader gives no "
                    f"points: {noise}"
                )
            if parts["whole"]["shows"]:
                yield (
                    f"check {check.aspect} ends with a value, which nbgrader takes for a partial "
                    "mark: end with an assert"
                )


def _problems_of_stub(exercise, runs):
    for run in runs:
        if "died" in run or run["error"]:
            continue  # an answer cell that does not even run earns nothing
        for check in exercise.checks:
            parts = run["checks"][check.grade_id]
            if not parts["whole"]["error"]:
                yield f"the bare stub passes check {check.aspect}"
            elif parts["hidden"] and not parts["hidden"]["error"]:
                yield f"the bare stub passes the hidden region of check {check.aspect}"


def _judge_wrong(exercise, wrong, runs):
    problems, rejecting, noticed, recognised = [], [], [], []
    for run in runs:
        if failure := run.get("died") or (run["error"] and _short(run["error"])):
            problems.append(f"wrong answer {wrong.name} does not run: {failure}")
            continue
        parts = {check.aspect: run["checks"][check.grade_id] for check in exercise.checks}
        hidden = {a: p["hidden"]["error"] for a, p in parts.items() if p["hidden"]}
        visible = [p["visible"]["error"] for p in parts.values() if p["visible"]]
        rejecting.append({aspect: _short(error) for aspect, error in hidden.items() if error})
        noticed.append(any(visible))
        recognised.append(any(wrong.says in error["text"] for error in visible if error))
        for error in [*hidden.values(), *visible]:
            # A name that is missing is an accident of the cell, not the mistake it stands for.
            if error and error["type"] in ("NameError", "ImportError", "ModuleNotFoundError"):
                problems.append(f"wrong answer {wrong.name} does not run: {_short(error)}")
    always = set.intersection(*map(set, rejecting)) if rejecting else set()
    by = {aspect: rejecting[0][aspect] for aspect in sorted(always)}
    if rejecting and not by:
        problems.append(
            f"wrong answer {wrong.name} passes every hidden region: add a hidden test that "
            "rejects it under every seed"
        )
    seen, named = bool(noticed) and all(noticed), bool(recognised) and all(recognised)
    return WrongResult(wrong.name, by, seen, named), problems


def _short(error):
    text = " ".join(error["text"].split())
    text = f"{text[:160]} ..." if len(text) > 160 else text
    where = f", line {error['line']}" if error["line"] else ""
    return f"{error['type']}: {text}{where}" if text else f"{error['type']}{where}"


def show(verification, console):
    """Print a row per exercise, then what is wrong, then what visible checks do not recognise."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("exercise", overflow="fold")
    for heading in ("points", "checks", "rejected", "noticed", "recognised", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    results, week = verification.exercises, None
    for result in results:
        if result.week != week:
            week = result.week
            table.add_row(f"[bold]{week}[/]")
        every = len(result.wrongs)
        table.add_row(
            f"  {result.exercise}",
            str(result.points),
            str(result.checks),
            f"{sum(bool(wrong.rejected_by) for wrong in result.wrongs)}/{every}",
            f"{sum(wrong.noticed for wrong in result.wrongs)}/{every}",
            f"{sum(wrong.recognised for wrong in result.wrongs)}/{every}",
            f"{result.seconds:.1f}",
            "[green]holds[/]" if result.ok else "[red]fails[/]",
        )
    console.print(table)
    lines = [f"{r.week}/{r.exercise}: {problem}." for r in results for problem in r.problems]
    unknown = [
        f"{result.exercise}/{wrong.name}"
        for result in results
        for wrong in result.wrongs
        if not wrong.recognised
    ]
    if unknown:
        lines.append(f"Rejected, but recognised by no visible check: {', '.join(unknown)}.")
    outdated = [result.exercise for result in results if result.outdated]
    if outdated:
        lines.append(f"Fingerprints are out of date for {', '.join(outdated)}: run course build.")
    wrongs = [wrong for result in results for wrong in result.wrongs]
    lines.append(
        f"{len(results)} exercises, {len(wrongs)} wrong answers: "
        f"{sum(bool(wrong.rejected_by) for wrong in wrongs)} rejected by hidden regions, "
        f"{sum(wrong.recognised for wrong in wrongs)} recognised by visible checks "
        f"({verification.seconds:.0f} s)."
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)
