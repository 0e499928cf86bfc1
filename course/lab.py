"""JupyterLab on a learner's own copies of the notebooks.

`notebooks/` is generated and changes with the course; a learner who writes there could not pull.
So each notebook is copied once to `work/`, which git ignores. A later version of a week replaces
the copy only while the learner has not touched it; otherwise it is laid beside it.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from course.source import CourseError, repo_root, resolve_week

SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",  # or JupyterLab asks a newcomer about news before anything else
        "checkForUpdates": False,
    }
}


def copy_notebooks(given: Path, work: Path) -> list[str]:
    """Bring the learner's folder up to date without touching their work; return what was done.

    Raises: CourseError, when there is no notebook to copy.
    """
    notebooks = sorted(given.glob("w*.ipynb"))
    if not notebooks:
        raise CourseError(f"{given} holds no notebooks; make them with `python -m course build`.")
    work.mkdir(parents=True, exist_ok=True)
    memory = work / ".given.json"
    try:
        before = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    done = []
    for notebook in notebooks:
        mine, version = work / notebook.name, _digest(notebook)
        known = before.get(notebook.name)
        if not mine.exists():
            shutil.copyfile(notebook, mine)
            done.append(f"{mine.name}: copied")
        elif version in (known, _digest(mine)):
            pass
        elif _digest(mine) == known:
            shutil.copyfile(notebook, mine)
            done.append(f"{mine.name}: new version; you had not changed yours")
        else:
            beside = work / f"{notebook.stem}.new.ipynb"
            shutil.copyfile(notebook, beside)
            done.append(f"{mine.name}: yours is kept; the new version is {beside.name}")
        before[notebook.name] = version
    part = memory.with_suffix(".part")
    part.write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
    os.replace(part, memory)
    return done


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Start:
    """How to start JupyterLab: in the learner's folder, where nbgrader's menus expect to be."""

    arguments: list[str]
    environment: dict[str, str]
    folder: Path
    copied: list[str]


def prepare(week: str | None, extra: list[str]) -> Start:
    """Copy what is new, and say how to start JupyterLab on it.

    Raises: CourseError, for an unknown week.
    """
    root = repo_root()
    work = root / "work"
    opened = work
    if week is not None:
        opened = work / f"{resolve_week(week)}.ipynb"
    copied = copy_notebooks(root / "notebooks", work)
    settings = root / "build" / "lab" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS, indent=1) + "\n", encoding="utf-8")

    def ahead(name: str, first: Path) -> str:
        return os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))

    environment = os.environ | {
        "PATH": ahead("PATH", Path(sys.executable).parent),
        "JUPYTER_CONFIG_PATH": ahead("JUPYTER_CONFIG_PATH", settings.parent.parent),
        "JUPYTER_PATH": ahead("JUPYTER_PATH", Path(sys.prefix) / "share" / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    arguments = [sys.executable, "-m", "jupyterlab", str(opened), *extra]
    return Start(arguments, environment, work, copied)
