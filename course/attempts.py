"""Run answers against checks, each in a fresh fork of a warm process.

Importing torch takes seconds, a fork milliseconds. So a worker process imports what the weeks need
and then forks: once per exercise, to run the cells that stand above it with all other exercises
left as stubs, and from there once per answer and seed. No answer sees another's variables, patches
or random numbers, and one that hangs, crashes or exits ends only itself.

A worker is `python -m course.attempts`: it takes a job per line of JSON and gives a result per
line. It needs `os.fork`, so Linux or macOS.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import queue
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path

from course.names import definitions_only
from course.seeds import NAME as SALTED
from course.seeds import Salt, salted
from course.source import CourseError

# A verdict must not hang on a lucky draw. Under all but the first, the seeds that are written in a
# hidden region are others too, as they are in the grader.
SEEDS = (0, 1, 2)
SECONDS = 60  # for one answer with all checks of its exercise


def job_for(week, exercise, answers, *, record=False, fingerprints=None):
    """Describe the work on one exercise as plain JSON: `answers` are (name, line, code)."""
    before = [(cell.line, cell.text) for cell in week.given_before(exercise.name)]
    before += [
        (other.answer.line, other.stub)
        for other in week.exercises.values()
        if other.answer.line < exercise.answer.line
    ]
    checks = []
    for check in exercise.checks:
        shown = check.cell.text.split("### BEGIN HIDDEN TESTS")[0].count("\n")
        checks.append(
            {
                "id": check.grade_id,
                "line": check.cell.line,
                "visible": check.visible,
                "hidden": check.hidden,
                "hidden_line": check.cell.line + shown + 1,
                "whole": check.cell.text,
            }
        )
    return {
        "key": f"{week.name}/{exercise.name}",
        "file": str(week.path),
        "before": sorted(before),
        "answers": [{"name": name, "line": line, "code": code} for name, line, code in answers],
        "checks": checks,
        "record": record,
        "fingerprints": str(fingerprints) if fingerprints is not None else None,
    }


def run_jobs(jobs, *, processes=None, seconds=SECONDS, done=lambda result: None):
    """Run the jobs, several at once, and return their results in the order of the jobs.

    `done(result)` is called as each arrives. A result has the job's `key`, its `seconds`, the
    errors of the cells `before`, and `answers`: for each name a list with what happened under each
    seed (see `_run_answer`). What did not end by itself has a `died` that says how.
    Raises: CourseError, if the workers cannot run at all.
    """
    if not hasattr(os, "fork"):
        raise CourseError("Answers are run in forked processes: use Linux, macOS or WSL.")
    waiting, one_at_a_time = queue.SimpleQueue(), threading.Lock()
    results, failures = {}, []
    for number, job in enumerate(jobs):
        waiting.put((number, job))
    preload = _modules_of(jobs)
    workers = [_Worker(preload, seconds) for _ in range(min(processes or _cores(), len(jobs)))]

    def serve(worker):
        try:
            while True:
                number, job = waiting.get_nowait()
                results[number] = worker.run(job)
                with one_at_a_time:
                    done(results[number])
        except queue.Empty:
            return
        except Exception as error:  # raised again below, in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.end()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(jobs))]


class _Worker:
    """A warm process that runs one job after the other."""

    def __init__(self, preload, seconds):
        package = str(Path(__file__).resolve().parent.parent)
        paths = [package, os.environ.get("PYTHONPATH")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",  # a process that has run parallel code must not fork
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "course.attempts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # one group with its forks, so that all can be ended
        )
        self.send({"preload": preload, "seconds": seconds})

    def end(self):
        """End the process and whatever it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()

    def send(self, message):
        with contextlib.suppress(BrokenPipeError):  # it has ended; run() says so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def run(self, job):
        self.send(job)
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip() or "no message").split("\n")[-1]
            raise CourseError(f"The worker that runs the answers ended ({last}): see `doctor`.")
        return json.loads(line)


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _modules_of(jobs):
    """The modules that the code of the jobs imports, so that they are imported only once."""
    modules = {"torch", "mmlearn.feedback"}
    codes = [code for job in jobs for _, code in job["before"]]
    codes += [part["code"] for job in jobs for part in job["answers"]]
    codes += [part["whole"] for job in jobs for part in job["checks"]]
    for code in codes:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                modules.update(item.name for item in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module)
        if "optim" in code:
            modules.add("torch._dynamo")  # two seconds at the first step of an optimizer
    return sorted(modules)


# In the worker


def main():
    """Serve jobs from standard input until it ends."""
    order = json.loads(sys.stdin.readline())
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the cells print must not mix with the results
    for name in order["preload"]:
        # What cannot be imported fails again, with its own message, where it is used.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        start, limit = time.monotonic(), order["seconds"]
        whole = limit * (1 + len(SEEDS) * len(job["answers"]))
        result = _forked(lambda job=job, limit=limit: _run_job(job, limit), whole)
        result |= {"key": job["key"], "seconds": round(time.monotonic() - start, 3)}
        answer_to.write(json.dumps(result) + "\n")
        answer_to.flush()


def _forked(function, seconds):
    """Call a function in a forked process; return its dictionary, or how the process died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(json.dumps(function()).encode())
            os._exit(0)
        os._exit(1)
    os.close(writer)
    deadline, received = time.monotonic() + seconds, b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"died": f"did not end within {seconds} seconds"}
            chunk = pipe.read(1 << 16)
            if not chunk:
                break
            received += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        return json.loads(received)
    except ValueError:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"died": f"ended the process ({how})"}


def _run_job(job, seconds):
    """Run the cells above an exercise, then each of its answers under each seed."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # as in a notebook
    namespace, errors = vars(module), []
    _set_seed(SEEDS[0])
    for line, code in job["before"]:
        outcome = _run(code, namespace, job["file"], line)
        if outcome["error"]:
            errors.append(outcome["error"] | {"line": outcome["error"]["line"] or line})
    answers = {}
    for answer in job["answers"]:
        answers[answer["name"]] = [
            _forked(lambda a=answer, s=seed: _run_answer(job, a, s, namespace), seconds)
            for seed in SEEDS
        ]
    return {"before": errors, "answers": answers}


def _run_answer(job, answer, seed, namespace):
    """Run one answer and every check of its exercise.

    Returns: `error` of the answer cell itself; `checks`: for each grade id the outcomes of its
    visible part, its hidden region alone and the whole cell (see `_run`), or None for a part that
    is empty; and `records`: the fingerprints at the probes, when the job asks to record.
    """
    from mmlearn import feedback

    if job["fingerprints"] is not None:
        feedback.FINGERPRINTS = Path(job["fingerprints"])
    _set_seed(seed)
    outcome = _run(answer["code"], namespace, job["file"], answer["line"])
    result = {"error": outcome["error"], "checks": {}, "records": {}}
    for check in job["checks"]:
        place = check["line"]
        if job["record"]:
            with feedback.recording() as records:
                _set_seed(seed)
                _run_each_statement(check["visible"], dict(namespace), job["file"], place)
            result["records"].update(dict(records))
            continue
        # The whole cell first: Python shows a warning only the first time.
        _set_seed(seed)
        parts = {"whole": _run(check["whole"], dict(namespace), job["file"], place)}
        parts["visible"] = parts["hidden"] = None
        if check["visible"]:
            _set_seed(seed)
            parts["visible"] = _run(check["visible"], dict(namespace), job["file"], place)
        if check["hidden"]:
            _set_seed(seed)
            alone = dict(namespace)
            parts["hidden"] = _run(definitions_only(check["visible"]), alone, job["file"], place)
            if not parts["hidden"]["error"]:
                salt = Salt(b"verify", check["id"], seed) if seed else None
                place = check["hidden_line"]
                parts["hidden"] = _run(check["hidden"], alone, job["file"], place, salt)
        result["checks"][check["id"]] = parts
    return result


def _run(code, namespace, file, line, salt=None):
    """Run code as a notebook's cell; return its error, its standard error, and its value.

    `shows` is true if the cell ends with an expression whose value a notebook would show. A `salt`
    exchanges the seeds that are written in the code.
    """
    tree = ast.increment_lineno(ast.parse(code), line - 1)
    if salt is not None:
        tree, namespace[SALTED] = salted(tree), salt.seed
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    error, value, noise = None, None, io.StringIO()
    with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(io.StringIO()):
        try:
            exec(compile(tree, file, "exec"), namespace)
            if last is not None:
                expression = ast.Expression(last.value)
                value = eval(compile(expression, file, "eval"), namespace)
        except BaseException as problem:
            error = _describe(problem, file)
    return {"error": error, "stderr": noise.getvalue()[:500], "shows": value is not None}


def _run_each_statement(code, namespace, file, line):
    """Run the statements one by one, past those that fail, so that every probe is reached."""
    tree = ast.increment_lineno(ast.parse(code), line - 1)
    for statement in tree.body:
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(ast.Module([statement], []), file, "exec"), namespace)


def _describe(error, file):
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    text = str(error)[:500]
    return {"type": type(error).__name__, "text": text, "line": lines[-1] if lines else None}


def _set_seed(seed):
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


if __name__ == "__main__":
    main()
