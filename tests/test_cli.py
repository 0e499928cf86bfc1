"""The command line says what it can do, quickly, and refuses in one sentence."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from course import __main__ as command_line
from course import lab, show
from course.source import CourseError

ROOT = Path(__file__).parent.parent
WEEKS = Path(__file__).parent / "weeks"
VERBS = "lab build check verify slides init release grade report samples demo doctor".split()


@pytest.fixture
def run(capsys):
    """Run the command line in this process; return its exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            command_line.app([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


def test_the_help_lists_every_verb_with_a_whole_sentence(run):
    code, out, _ = run("--help")
    assert code == 0
    commands = out.split("Commands:")[1]
    assert [line.split()[0] for line in commands.strip().splitlines()] == VERBS
    assert "..." not in commands, "a sentence is too long for its line"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example_that_starts_with_the_verb(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert f"python -m course {verb}" in out.split("Example:")[1]


def test_the_help_imports_nothing_heavy():
    program = (
        "import contextlib, io, sys; from course.__main__ import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    app(['--help'])\n"
        "heavy = {'torch', 'numpy', 'nbformat', 'nbgrader', 'papermill', 'jupytext', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check", "77"], "'77'"),
        (["check", "--device", "tpu"], "'tpu'"),
        (["verify", "w77_none"], "w77_none"),
        (["release", "1", "--class", "/nowhere"], "/nowhere"),
        (["grade", "/nowhere", "--to", "/nowhere/out"], "/nowhere"),
        (["samples", __file__], "is a file"),
        (["init", __file__], "is a file"),
        (["lab", "w77_none"], "w77_none"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_with_exit_code_2(run, monkeypatch, arguments, named):
    monkeypatch.setattr("course.source.weeks_folder", lambda folder=None: WEEKS)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    sentence = err.strip().splitlines()[-1]
    assert named in sentence
    assert sentence.endswith((".", "?"))
    assert "Traceback" not in err


def test_an_option_that_is_no_number_is_a_usage_error(run):
    code, _, err = run("check", "--jobs", "many")
    assert code == 2
    assert "--jobs" in err


def test_an_error_of_ours_is_not_swallowed(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(show, "run_weeks", broken)
    monkeypatch.setattr("course.source.weeks_folder", lambda folder=None: WEEKS)
    with pytest.raises(ZeroDivisionError):
        command_line.app(["check"])


def test_a_failed_week_is_exit_code_1_and_its_cell_is_printed(run, monkeypatch):
    from course.check import Failure, Run

    failure = Failure(4, "code-12ab", "1 / 0", "ZeroDivisionError: division by zero", "a trace")
    runs = [Run("w99_sample", 95.0, 2100.0, "/kept/w99_sample.ipynb", failure)]
    monkeypatch.setattr(show, "run_weeks", lambda *_, **__: runs)
    monkeypatch.setattr("course.source.weeks_folder", lambda folder=None: WEEKS)
    code, out, _ = run("check", "99")
    assert code == 1
    for said in ("failed", "over 90 s", "over 2 GiB", "cell 4 (code-12ab)", "1 / 0", "a trace"):
        assert said in out
    code, out, _ = run("check", "99", "--json")
    (row,) = json.loads(out)
    assert (code, row["status"], row["failure"]["cell"]) == (1, "failed", 4)


def test_ctrl_c_while_grading_is_exit_code_3_with_the_way_on(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "grade_class", interrupted)
    code, _, err = run("grade", "submitted", "--to", "out")
    assert code == 3
    assert "the same command goes on" in err


def test_ctrl_c_elsewhere_is_exit_code_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("course.doctor.examine", interrupted)
    assert run("doctor")[0] == 130


def test_samples_say_what_they_should_get(run, monkeypatch, tmp_path):
    monkeypatch.setattr("course.source.weeks_folder", lambda folder=None: WEEKS)
    code, out, _ = run("samples", tmp_path, "--week", "99", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"student", "week", "lowest", "highest", "of", "to_mark"} == set(rows[0])
    assert len(list(tmp_path.rglob("*.ipynb"))) == len(rows)


# The learner's copies


@pytest.fixture
def given(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "w01_a.ipynb").write_text("one", "utf-8")
    return folder


def test_notebooks_are_copied_once(given, tmp_path):
    work = tmp_path / "work"
    assert lab.copy_notebooks(given, work) == ["w01_a.ipynb: copied"]
    assert lab.copy_notebooks(given, work) == []


def test_a_learners_work_is_never_overwritten(given, tmp_path):
    work = tmp_path / "work"
    lab.copy_notebooks(given, work)
    (work / "w01_a.ipynb").write_text("my answers", "utf-8")
    assert lab.copy_notebooks(given, work) == []
    (given / "w01_a.ipynb").write_text("two", "utf-8")
    (said,) = lab.copy_notebooks(given, work)
    assert "yours is kept" in said
    assert (work / "w01_a.ipynb").read_text("utf-8") == "my answers"
    assert (work / "w01_a.new.ipynb").read_text("utf-8") == "two"
    assert lab.copy_notebooks(given, work) == [], "the same news is told once"


def test_a_copy_that_nobody_touched_follows_the_course(given, tmp_path):
    work = tmp_path / "work"
    lab.copy_notebooks(given, work)
    (given / "w01_a.ipynb").write_text("two", "utf-8")
    lab.copy_notebooks(given, work)
    assert (work / "w01_a.ipynb").read_text("utf-8") == "two"


def test_work_is_kept_when_the_memory_of_what_was_given_is_lost(given, tmp_path):
    work = tmp_path / "work"
    lab.copy_notebooks(given, work)
    (work / "w01_a.ipynb").write_text("my answers", "utf-8")
    (work / ".given.json").write_text("{broken", "utf-8")
    lab.copy_notebooks(given, work)
    assert (work / "w01_a.ipynb").read_text("utf-8") == "my answers"


def test_without_notebooks_the_way_to_make_them_is_said(tmp_path):
    with pytest.raises(CourseError, match="course build"):
        lab.copy_notebooks(tmp_path, tmp_path / "work")


@pytest.mark.slow
def test_jupyterlab_opens_the_copies_without_asking_about_news(given, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "repo_root", lambda: tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=key"]
    start = lab.prepare(None, options)
    assert start.copied == ["w01_a.ipynb: copied"]
    assert start.arguments[3] == str(start.folder) == str(tmp_path / "work")
    plugin = "@jupyterlab/apputils-extension:notification"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/lab/api/settings/{plugin}", headers={"Authorization": "token key"}
    )
    log = tmp_path / "log.txt"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            start.arguments, cwd=start.folder, env=start.environment, stdout=file, stderr=file
        ) as server,
    ):
        try:
            deadline, schema = time.monotonic() + 60, None
            while schema is None:
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        schema = json.load(answer)["schema"]["properties"]
                except OSError:
                    assert server.poll() is None, log.read_text("utf-8")
                    assert time.monotonic() < deadline, log.read_text("utf-8")
                    time.sleep(0.2)
        finally:
            server.kill()
    assert schema["fetchNews"]["default"] == "false"
    assert schema["checkForUpdates"]["default"] is False
