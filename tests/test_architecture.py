"""The house rules that a reader relies on: who imports whom, and what a tracked file may hold."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# From the leaves up. A module imports from the layers before its own; leaves also one another.
LAYERS = [
    {"weights", "train", "data", "metrics", "feedback", "figures", "contrastive"},
    {"transformer"},
    {"text", "vision", "audio", "convolution", "quantization", "ctc", "streams"},
    {"wordpiece", "pages", "modalities"},
    {"clip", "layoutlm", "wav2vec2", "fusion", "captioning", "metatransformer"},
    {"foundations", "transfer", "interpret"},
    {"lora", "xray"},
]
NEVER_IN_MMLEARN = """
    course IPython ipykernel ipywidgets jupyter_client jupyter_core jupyterlab jupytext
    nbclient nbconvert nbformat nbgrader notebook papermill rich typer
"""
# Seconds to import, or not there on Colab: only inside the functions that need them.
ONLY_INSIDE_FUNCTIONS = """
    accelerate datasets huggingface_hub matplotlib open_clip safetensors sklearn torchaudio
    torchmetrics torchvision transformers
"""
# What a notebook may use besides mmlearn and its dependencies: Colab has these, too.
FOR_NOTEBOOKS = "IPython datasets ipywidgets matplotlib torchaudio torchvision transformers"
# Import name to distribution name, where they differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "open_clip": "open-clip-torch",
    "yaml": "pyyaml",
}


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Yield (absolute name imported, line, whether inside a function) for each import in a file."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                module = child.module
                if child.level:
                    # In the sandbox, and among the cases of a test, there is no package around it.
                    own = path.parent.name in ("inside", "corpus") or "tests" in path.parts
                    assert own, f"{path.name}:{child.lineno} imports relatively"
                    module = ".".join(filter(None, (path.parent.name, child.module)))
                yield module, child.lineno, inside
                for alias in child.names:
                    yield f"{module}.{alias.name}", child.lineno, inside
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside or function)

    yield from walk(ast.parse(path.read_text("utf-8"), str(path)), False)


def offences(paths, wrong):
    """Return "file:line imports name" for each import for which wrong(name, inside a function)."""
    found = []
    for path in paths:
        for name, line, inside in imports(path):
            if wrong(name, inside):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def assert_none(found):
    """Fail with one line for each thing found."""
    assert not found, "\n" + "\n".join(map(str, found))


def layer_of(module):
    """Return the layer of a top-level module of mmlearn, by its number."""
    for number, layer in enumerate(LAYERS):
        if module in layer:
            return number
    raise AssertionError(f"mmlearn.{module} is in no layer: give it one in LAYERS, {__file__}")


MODULES = sorted({module_name(path).split(".")[1] for path in python_files("mmlearn")[1:]} - {""})


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_mmlearn_imports_only_from_the_layers_below_it(module):
    mine = layer_of(module)
    folder = ROOT / "mmlearn" / module
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]

    def wrong(name, inside):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "mmlearn" or other in ("", module):
            return False
        return layer_of(other) > mine or (layer_of(other) == mine and mine > 0)

    assert_none(offences(paths, wrong))


def test_models_never_import_the_training_loop_or_the_data():
    leaves = {"mmlearn.train", "mmlearn.data"}
    models = [f"mmlearn/{module}.py" for layer in LAYERS[1:-2] for module in sorted(layer)]
    paths = [ROOT / model for model in models if (ROOT / model).exists()]
    assert_none(offences(paths, lambda name, _: ".".join(name.split(".")[:2]) in leaves))


def test_mmlearn_never_imports_the_course_or_notebook_tools():
    found = offences(
        python_files("mmlearn"), lambda name, _: name.split(".")[0] in NEVER_IN_MMLEARN.split()
    )
    assert_none(found)


def test_mmlearn_itself_needs_only_what_it_declares_and_declares_only_what_it_needs():
    always = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    used = {
        canonicalize_name(DISTRIBUTION.get(name, name))
        for path in python_files("mmlearn")
        for name in (full.split(".")[0] for full, _, _ in imports(path))
        if name not in sys.stdlib_module_names and name != "mmlearn"
    }
    optional = {canonicalize_name(DISTRIBUTION.get(n, n)) for n in ONLY_INSIDE_FUNCTIONS.split()}
    assert always <= used, f"declared, imported nowhere: {sorted(always - used)}"
    assert used <= always | optional, f"imported, declared nowhere: {sorted(used - always)}"


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("mmlearn", ["course"]), ("course", ["course", "cluster"]), ("tests", ["course", "dev"])],
)
def test_everything_imported_is_declared(folder, extras):
    lines = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    own = {"mmlearn", "course", "conftest", "inside", "corpus", "grade"}
    own |= {path.stem for path in python_files("tests")}

    def wrong(name, inside):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in own:
            return False
        return canonicalize_name(DISTRIBUTION.get(top, top)) not in declared

    assert_none(offences(python_files(folder), wrong))


def test_a_week_imports_only_what_a_learner_on_colab_has():
    always = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}

    def wrong(name, inside):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in ["mmlearn", *FOR_NOTEBOOKS.split()]:
            return False
        return canonicalize_name(DISTRIBUTION.get(top, top)) not in always

    assert_none(offences(python_files("course/weeks"), wrong))


def test_heavy_libraries_are_imported_only_inside_functions():
    def wrong(name, inside):
        return not inside and name.split(".")[0] in ONLY_INSIDE_FUNCTIONS.split()

    paths = [path for path in python_files("mmlearn", "course") if path.parent.name != "weeks"]
    assert_none(offences(paths, wrong))


def test_what_is_in_the_sandbox_imports_nothing_of_the_course():
    folder = ROOT / "course" / "grade" / "inside"
    assert_none(offences(folder.glob("*.py"), lambda name, _: name.split(".")[0] == "course"))


def test_the_map_of_the_grader_names_every_module():
    folder = ROOT / "course" / "grade"
    map_ = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert_none(sorted(name for name in modules if not re.search(rf"\b{name}\.py\b", map_)))


def test_no_name_in_mmlearn_is_undefined():
    # The linter cannot tell a name from a letter in a shape, so what stands in strings is left out.
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    done = subprocess.run(
        [*command, "--output-format", "json", "mmlearn"], cwd=ROOT, capture_output=True, text=True
    )
    found = []
    for row in json.loads(done.stdout):
        line, column = row["location"]["row"], row["location"]["column"]
        path = Path(row["filename"])
        before = path.read_text("utf-8").splitlines()[line - 1][: column - 1]
        if before.count('"') % 2 == 0:
            found.append(f"{path.relative_to(ROOT)}:{line} {row['message']}")
    assert_none(found)


def test_nothing_imports_a_star():
    paths = python_files("mmlearn", "course", "tests")
    assert_none(offences(paths, lambda name, _: name.endswith(".*")))


def test_the_command_line_starts_without_loading_torch_or_jupyter():
    heavy = [
        "torch",
        "nbformat",
        "nbgrader",
        "nbconvert",
        "jupytext",
        "papermill",
        "numpy",
        "rich.table",
    ]
    program = f"import course.__main__, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_map_in_mmlearn_names_every_module():
    map_ = ast.get_docstring(ast.parse((ROOT / "mmlearn" / "__init__.py").read_text("utf-8")))
    named = re.findall(r"^    ([a-z0-9_]+) {2,}\S", map_, re.MULTILINE)
    assert sorted(named) == MODULES


# What is tracked, and what is about to be: git's index and the files that it does not ignore.
def tracked():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: no list of tracked files")
    names = done.stdout.decode().split("\0")
    return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})


def lines_of_text():
    """Yield (file:line, text) for every line of every tracked text file."""
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
                yield f"{path.relative_to(ROOT)}:{number}", line


def test_no_tracked_file_holds_a_path_of_somebodys_machine_or_a_registry_address():
    # Spelt so that this file does not match. A learner's folder work/ is not the root's, and in the
    # sandbox a student's home and /tmp have the same names on every machine.
    shared = r"tmp(?!/ipykernel)|home(?!/student)"
    machine = rf"(?<![\w.~{{}}/])/(?:root|work|Users|opt|mnt|{shared})/\w"
    registry = (
        r"pypi[.]org|pythonhosted[.]|index-url *[=:]|find-[l]inks|registry[.]npm|download[.]pytorch"
    )
    offence = re.compile(f"{machine}|{registry}")
    found = [
        f"{place}: {line.strip()[:90]}" for place, line in lines_of_text() if offence.search(line)
    ]
    assert_none(found)


def test_no_tracked_file_puts_work_off():
    mark = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")
    assert_none([place for place, line in lines_of_text() if mark.search(line)])


def test_no_tracked_file_reaches_a_mebibyte():
    assert_none([path for path in tracked() if path.stat().st_size >= 2**20])


def test_committed_notebooks_hold_no_outputs():
    found = []
    for path in tracked():
        if path.suffix == ".ipynb":
            for cell in json.loads(path.read_text("utf-8"))["cells"]:
                if cell.get("outputs") or cell.get("execution_count") is not None:
                    found.append(f"{path.relative_to(ROOT)}: {cell['id']}")
    assert_none(found)


def test_constraints_hold_names_and_exact_versions_only():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert_none([p for p in pins if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][a-z0-9.]*", p)])
    assert pins == sorted(set(pins), key=lambda pin: pin.split("==")[0])


def test_constraints_lie_within_the_ranges_of_pyproject():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    optional = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + optional["course"] + optional["dev"]:
        requirement = Requirement(line)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} does not admit {version}"


# The tree in README.md: a fenced block with one or more names at the start of each line.
def readme_tree():
    """Return the paths that README's tree names, or an empty list while it has no tree."""
    text = (ROOT / "README.md").read_text("utf-8")
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if re.search(r"^\W*mmlearn/", block, re.MULTILINE):
            return list(paths_of_tree(block))
    return []


def paths_of_tree(block):
    """Yield the paths of a tree drawn by indentation, or with the lines that `tree` draws."""
    parents = []  # (indentation, folder) from the root down
    for line in block.splitlines():
        line = re.sub("[│├└─]", " ", line)
        indentation = len(line) - len(line.lstrip())
        while parents and parents[-1][0] >= indentation:
            parents.pop()
        above = parents[-1][1] if parents else Path()
        # Names stand first, two or more spaces apart; then comes what they are.
        for word in re.split(" {2,}", line.strip()):
            if not re.fullmatch(r"Makefile|LICENSE(-PROSE)?|[\w.*-]*[./][\w.*/-]*", word):
                break
            yield above / word
            if word.endswith("/"):
                parents.append((indentation, above / word))


def test_a_tree_is_read_by_its_indentation():
    first, second, third = (
        "mmlearn/   read/run this",
        "clip.py  text.py   towers. More.",
        "README.md   a",
    )
    drawn = f"├── {first}\n│   ├── {second}\n└── {third}"
    indented = f"{first}\n  {second}\n{third}"
    wanted = [Path(p) for p in ("mmlearn", "mmlearn/clip.py", "mmlearn/text.py", "README.md")]
    assert list(paths_of_tree(drawn)) == list(paths_of_tree(indented)) == wanted


def test_the_tree_in_the_readme_names_what_is_there_and_every_module():
    named = readme_tree()
    if not named:
        pytest.skip("README.md has no tree yet")
    absent = [str(path) for path in named if not list(ROOT.glob(str(path)))]
    assert_none(absent)
    there = {path for pattern in named for path in ROOT.glob(str(pattern))}
    modules = {
        path for path in (ROOT / "mmlearn").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    tools = {path for path in (ROOT / "course").iterdir() if path.suffix == ".py" or path.is_dir()}
    unnamed = {path for path in modules | tools if path.name not in ("__init__.py", "__pycache__")}
    assert_none(sorted(str(path.relative_to(ROOT)) for path in unnamed - there))
