"""A week's own code, to be measured on data that the project does not carry."""

import os
from pathlib import Path

from course.source import read_week, repo_root


def week_namespace(name: str) -> dict:
    """Run the given cells and the solutions of a week, without its experiments."""
    week = read_week(name)
    namespace = {"__name__": "__main__"}
    for cell in week.cells:
        if cell.kind == "code" and not cell.is_experiment:
            code = cell.text
        elif cell.kind == "answer":
            code = week.exercises[cell.metadata["answer"]].solution
        else:
            continue
        exec(compile(code, f"{week.path.name}:{cell.line}", "exec"), namespace)
    return namespace


def packs_folder() -> Path:
    """Where the real packs lie: not part of the project, so perhaps nowhere."""
    return Path(os.environ.get("MMLEARN_SHARED_DATA", repo_root().parent / "shared" / "data"))
