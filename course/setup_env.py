"""Make `.venv` ready; do nothing when it already is.

    python3 -I course/setup_env.py      what `make setup`, `demo`, `test` begin with

It runs before anything is installed: standard library only, and syntax that Python 3.6 can read, so
that an old Python gets as far as saying that it is too old.

`.venv/setup.json` is the stamp. While an installation runs it says "unfinished"; after the last
check it holds a key over pyproject.toml, constraints.txt and the Python version, and this folder.
The same key again: nothing to do. Another key: install what changed. Unfinished or moved: begin
anew, because half a package looks like a whole one, and scripts name the folder they were made in.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

OLDEST, NEWEST = (3, 11), (3, 14)  # the pinned torch has wheels for these
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "setup.json")
REQUIREMENT = ".[course,dev]"
PIP_THAT_SERVES_ANOTHER_PYTHON = (22, 3)
ROOM_NEEDED_GB = 9  # 5.5 GB unpacked, and 3 GB of downloads beside it
# The interpreter that environments are made of, also when this one is itself in an environment.
BASE_PYTHON = getattr(sys, "_base_executable", None) or sys.executable
# matplotlib lists the machine's fonts at its first import, and says so in a learner's notebook.
CHECK = """
import warnings
warnings.simplefilter("ignore")
import matplotlib.font_manager
import torch
import torchaudio, torchvision, transformers
print("torch " + torch.__version__ + ", transformers " + transformers.__version__)
"""


class SetupError(Exception):
    """What was wrong, and the way out, in one sentence."""


def say(text):
    print("setup: " + text, flush=True)


def dotted(version):
    return ".".join(str(part) for part in version)


def refuse_unsuitable_python(version):
    """Raise SetupError unless the pinned packages can be installed for this Python version."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise SetupError(
            f"this is Python {dotted(version[:3])} ({sys.executable}), but the course needs "
            f"{dotted(OLDEST)} to {dotted(NEWEST)}: install one (Debian 12: apt-get install "
            "python3 python3-venv) and name it, make PYTHON=python3.12 setup."
        )


def wanted_key(python_version, root=ROOT):
    """Return the key of a finished set-up: it changes when what is to be installed changes."""
    digest = hashlib.sha256(dotted(python_version[:2]).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            content = file.read()
        digest.update(f"\n{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_stamp(stamp=STAMP):
    """Return (a key or "unfinished", the folder it was made in); (None, None) without a stamp."""
    try:
        with open(stamp) as file:
            content = json.load(file)
        return content["state"], content["folder"]
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished", None


def write_stamp(state, stamp=STAMP):
    with open(stamp + ".new", "w") as file:
        json.dump({"state": state, "folder": ROOT}, file)
    os.replace(stamp + ".new", stamp)


def version_of(python):
    """Return the version of a Python executable as a tuple, or None when it does not run."""
    program = "import sys; print(*sys.version_info[:3])"
    try:
        done = subprocess.run([python, "-I", "-c", program], capture_output=True, check=True)
        return tuple(int(part) for part in done.stdout.split())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def version_of_pip(python):
    """Return the version of the pip that a Python executable has, (0,) where it has none."""
    done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True)
    words = done.stdout.split()
    try:
        return tuple(int(part) for part in words[1].split(".")[:2])
    except (IndexError, ValueError):
        return (0,)


def pinned(name):
    """Return `name==version` as constraints.txt has it."""
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        for line in file:
            if line.startswith(name + "=="):
                return line.strip()
    raise SetupError(
        f"constraints.txt names no version of {name}: run git checkout constraints.txt."
    )


def reason_to_begin_anew(stamp, version, python_was_named):
    """Return why the `.venv` that is there cannot be kept, or None when it can."""
    state, folder = stamp
    if version is None:
        return "its Python does not run"
    if not OLDEST <= version[:2] <= NEWEST:
        return f"it holds Python {dotted(version)}"
    if state == "unfinished":
        return "an earlier set-up did not finish"
    if folder not in (None, ROOT):
        return f"it was made in {folder}"
    if python_was_named and version[:2] != tuple(sys.version_info[:2]):
        return f"it holds Python {dotted(version[:2])}, not {dotted(sys.version_info[:2])}"
    return None


def try_to_create_venv(*options):
    """Return None when `.venv` was made, marked unfinished; else what `venv` complained of."""
    if os.path.islink(VENV) or os.path.isfile(VENV):
        os.unlink(VENV)
    elif os.path.isdir(VENV):
        shutil.rmtree(VENV)
    os.mkdir(VENV)
    write_stamp("unfinished")
    done = subprocess.run(
        [BASE_PYTHON, "-m", "venv", *options, VENV],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return None
    return " ".join(done.stdout.split()).split(". ")[0].rstrip(".") or "without a message"


def create_venv():
    """Make an empty environment, also where Debian's Python lacks its ensurepip."""
    complaint = try_to_create_venv()
    if complaint is None:
        return
    package = f"python{dotted(sys.version_info[:2])}-venv"
    is_debian = os.path.realpath(BASE_PYTHON).startswith("/usr/bin/") and shutil.which("apt-get")
    if is_debian and os.geteuid() == 0:
        say(f"Debian keeps ensurepip apart from Python: installing {package} with apt-get.")
        unasked = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
        if subprocess.call(install, env=unasked) != 0:  # the package lists may be absent or old
            subprocess.call(["apt-get", "update", "-q"], env=unasked)
            subprocess.call(install, env=unasked)
        if try_to_create_venv() is None:
            return
    # An environment without pip is enough where an installer stands outside it.
    outside = shutil.which("uv") or version_of_pip(BASE_PYTHON) >= PIP_THAT_SERVES_ANOTHER_PYTHON
    if outside and try_to_create_venv("--without-pip") is None:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    raise SetupError(
        f"{BASE_PYTHON} -m venv failed ({complaint}): install what it lacks (Debian, Ubuntu: sudo "
        f"apt-get install {package}) and run make setup again."
    )


def commands(arguments):
    """Yield commands that install, best first; each is tried only when the one before it failed.

    uv takes seconds where pip takes minutes. It comes from the package index through pip, in the
    tested version; one that is already on PATH will do where there is no pip.
    """
    pip = None
    if version_of_pip(VENV_PYTHON) > (0,):
        pip = [VENV_PYTHON, "-m", "pip"]
    elif version_of_pip(BASE_PYTHON) >= PIP_THAT_SERVES_ANOTHER_PYTHON:
        pip = [BASE_PYTHON, "-m", "pip", "--python", VENV_PYTHON]
    uv = None
    quietly = ["install", "-q", "--disable-pip-version-check"]
    if pip and subprocess.call([*pip, *quietly, pinned("uv")]) == 0:
        uv = [VENV_PYTHON, "-m", "uv"]
    elif shutil.which("uv"):
        uv = [shutil.which("uv")]
    if uv:
        build = ["--build-constraints", "constraints.txt"]
        yield [*uv, "pip", "install", "--python", VENV_PYTHON, *build, *arguments]
    if pip:
        say("uv could not do it; trying pip, which takes some minutes.")
        yield [*pip, "install", "--disable-pip-version-check", *arguments]


def index_of_pip():
    """Return the package index that pip is configured for, which uv does not look up, or None."""
    listing = [VENV_PYTHON, "-m", "pip", "config", "list"]
    done = subprocess.run(listing, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.endswith(".index-url"):
            return value.strip("'\"")
    return None


def install():
    """Install the project in place, with what it needs in the versions of constraints.txt."""
    environment = dict(os.environ, PIP_CONSTRAINT="constraints.txt")  # reaches pip's builds too
    environment.setdefault("UV_HTTP_TIMEOUT", "180")  # seconds of silence; wheels reach 500 MB
    index = index_of_pip()
    if index and not {"UV_INDEX_URL", "UV_DEFAULT_INDEX"} & set(environment):
        environment["UV_DEFAULT_INDEX"] = index
    # pip too: a learner looks for it, and an environment made without it has none.
    for command in commands(["-c", "constraints.txt", "-e", REQUIREMENT, "pip"]):
        if subprocess.call(command, cwd=ROOT, env=environment) == 0:
            return
    raise SetupError(
        "the packages could not be installed (the lines above say why; it takes a package index "
        f"within reach and {ROOM_NEEDED_GB} GB of disk, of which "
        f"{shutil.disk_usage(ROOT).free / 1e9:.0f} are free): mend that and run make setup again."
    )


def check_imports():
    """Return the versions installed, or raise SetupError when the heavy libraries do not load."""
    done = subprocess.run([VENV_PYTHON, "-I", "-c", CHECK], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    raise SetupError(
        "torch, torchvision, torchaudio and transformers do not load together "
        f"({lines[-1].rstrip('.')}): run make clean and make setup, which installs the matched set "
        "of constraints.txt."
    )


def set_up(python_was_named=False):
    """Bring `.venv` to the state that pyproject.toml and constraints.txt describe."""
    began = time.time()
    stamp, version = read_stamp(), version_of(VENV_PYTHON)
    there = os.path.lexists(VENV)
    anew = reason_to_begin_anew(stamp, version, python_was_named) if there else "there is none"
    if anew is None and stamp[0] == wanted_key(version):
        return
    if anew:
        refuse_unsuitable_python(sys.version_info)
        say(
            f"making .venv with Python {dotted(sys.version_info[:3])}, because {anew}; "
            "the first time, about 3 GB are downloaded."
        )
        create_venv()
    else:
        say("bringing .venv up to date.")
        write_stamp("unfinished")
    install()
    versions = check_imports()
    version = version_of(VENV_PYTHON)
    write_stamp(wanted_key(version))
    say(f"ready in {time.time() - began:.0f} s: Python {dotted(version)}, {versions}.")


def main(arguments):
    try:
        refuse_unsuitable_python(sys.version_info)
        try:
            import fcntl
        except ImportError:
            raise SetupError(
                "this system has no POSIX file locks: on Windows, run the course inside WSL 2."
            ) from None
        # Two `make` at once: the second waits here, then finds everything done.
        folder = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        set_up(python_was_named="--python-was-named" in arguments)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsetup: interrupted; make setup will begin anew.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
