"""The doctor finds what is wrong and says the way out."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from course import doctor
from course.grade import sandbox


def statuses(rows):
    return {row.name: row.status for row in rows}


def test_an_old_python_is_refused_with_the_way_out():
    row = doctor.python_row((3, 10, 2))
    assert (row.status, row.found) == ("failed", "3.10.2")
    assert "3.11" in row.advice


def test_the_systems_python_is_a_warning(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert doctor.python_row().status == "warning"


def test_versions_that_were_not_tested_together_are_listed(tmp_path):
    constraints = tmp_path / "constraints.txt"
    torch = doctor.installed("torch")
    constraints.write_text(f"# tested\ntorch=={torch}\nnumpy==0.1\nnot-here==1.0\n", "utf-8")
    rows = list(doctor.package_rows(constraints))
    assert statuses(rows) == {"packages": "ok", "versions": "warning"}
    assert "numpy" in rows[1].found
    assert "(tested: 0.1)" in rows[1].found
    assert "torch" not in rows[1].found
    assert "not-here" not in rows[1].found


def test_a_missing_or_too_old_package_fails(tmp_path, monkeypatch):
    versions = {"typer": "0.1", "rich": None}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, real(name)))
    row = next(doctor.package_rows(tmp_path / "none.txt"))
    assert row.status == "failed"
    assert "rich is missing" in row.found
    assert "typer 0.1 is not >=" in row.found
    assert "make setup" in row.advice


def test_the_course_itself_must_be_installed(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    (row,) = doctor.package_rows(tmp_path / "none.txt")
    assert row.status == "failed"
    assert "pip install" in row.advice


def test_a_local_build_label_is_no_other_version(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.11.0+cpu")
    assert doctor.installed("torch") == "2.11.0"


def test_a_mismatched_torch_set_says_which_set_matches(monkeypatch):
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "run_python", lambda *_: (False, error))
    (row,) = doctor.torch_rows()
    assert (row.status, row.found) == ("failed", error)
    assert "matched set" in row.advice


def test_a_kernel_of_another_python_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "run_python", lambda *_: (True, "/elsewhere"))
    row = doctor.kernel_row(tmp_path)
    assert row.status == "failed"
    assert "another Python" in row.advice


def test_too_little_disk_or_memory_is_a_warning(tmp_path):
    assert doctor.disk_row(tmp_path, needed_gib=10**9).status == "warning"
    assert doctor.memory_row(needed_gib=10**9).status == "warning"
    assert doctor.disk_row(tmp_path, needed_gib=0.0).status == "ok"


def test_the_isolation_that_grading_would_have_is_shown_with_the_way_to_a_better_one(monkeypatch):
    better = "Install bubblewrap."
    tiers = {
        "ok": sandbox.Tier(1, "bubblewrap", "no network"),
        "warning": sandbox.Tier(2, "landlock", "no network", better),
    }
    for status, tier in tiers.items():
        monkeypatch.setattr(sandbox, "probe", lambda tier=tier: tier)
        row = doctor.isolation_row()
        assert (row.name, row.status, row.advice) == ("isolation", status, tier.better)
        assert row.found == f"tier {tier.number}, {tier.name}: no network"


def test_without_isolation_the_doctor_says_why_and_what_to_do(monkeypatch):
    why = {"bubblewrap": "bwrap is not installed", "landlock": "no Landlock", "process": ""}
    monkeypatch.setattr(sandbox, "why_not", why.get)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    row = doctor.isolation_row()
    assert row.status == "warning"
    assert "bubblewrap: bwrap is not installed; landlock: no Landlock" in row.found
    assert "apt install bubblewrap" in row.advice
    assert "trust" in row.advice


@pytest.mark.parametrize("command", doctor.HELPERS)
def test_each_helper_says_what_it_is_for(command, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    row = doctor.helper_row(command)
    assert row.status == "absent"
    assert row.advice.startswith("only for ")
    assert "apt install" in row.advice
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.helper_row(command).status == "ok"


def test_the_last_line_of_an_error_is_what_is_shown():
    assert doctor.run_python("raise ValueError('no kernel')") == (False, "ValueError: no kernel")
    assert doctor.run_python("print('yes')") == (True, "yes")


@pytest.mark.slow
def test_on_a_machine_that_runs_the_tests_nothing_that_is_needed_fails():
    done = subprocess.run(
        [sys.executable, "-m", "course", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0, [row for row in rows.values() if row["status"] == "failed"]
    assert {"python", "packages", "torch", "kernel", "gradebook", "isolation", "disk"} <= set(rows)
    assert all(row["advice"] for row in rows.values() if row["status"] != "ok")
