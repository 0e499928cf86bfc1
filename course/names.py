"""What code binds, uses, and takes from mmlearn: found by reading it, not by running it.

The scoping is Python's own (`symtable`), so comprehensions, nested functions, class bodies,
lambdas and `global` are right without a second implementation.
"""

import ast
import builtins
import symtable
from functools import lru_cache


def names_bound(code):
    """The names that a piece of code binds in the namespace it runs in."""
    table = _module_table(code)
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    for inner in _inner_tables(table):  # `global name` inside a function
        symbols = [s for s in inner.get_symbols() if s.is_declared_global() and s.is_assigned()]
        bound.update(s.get_name() for s in symbols)
    return bound


def names_imported(code):
    """The names that `import` statements outside functions bind."""
    return {s.get_name() for s in _module_table(code).get_symbols() if s.is_imported()}


def names_used(code):
    """The names that a piece of code takes from outside of itself, Python's builtins aside."""
    table = _module_table(code)
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    for inner in _inner_tables(table):
        used.update(
            s.get_name() for s in inner.get_symbols() if s.is_global() and s.is_referenced()
        )
    return used - names_bound(code) - set(dir(builtins)) - {"__name__", "__class__"}


def definitions_only(code):
    """The imports, functions and classes of a piece of code, as code; statements are left out."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    return ast.unparse(tree)


def imported_answer(code, exercise, elsewhere=()):
    """Say how an answer cell takes its answer from mmlearn, or return None if it does not.

    What counts as the answer: whatever in mmlearn has the name of something in the exercise's
    `forbids`, or of something that the answer defines (`ClipLoss` and `clip_loss` are one name),
    except what the course's own solution uses. Found by reading: imports under any alias and at
    any depth, attributes, star imports, `importlib` and `getattr` with a written-out name.
    `elsewhere` is the code of each of the notebook's other cells: the answer sees what they import.
    What it cannot see, a name rebound in another cell, `mmlearn.feedback.own_work` sees.
    Code that cannot be parsed takes nothing.
    """
    own = {_plain(name) for name in exercise.names}
    forbidden = {name.rsplit(".", 1)[1] for name in exercise.forbids}
    importing = tuple(other for other in elsewhere if "mmlearn" in other)
    allowed = _taken(exercise.solution, importing, frozenset(exercise.names))

    def is_the_answer(dotted):
        # mmlearn.module.object: two dots; a module by itself is no answer. By the object's name
        # alone, because a module that imports it lends it, too.
        name = dotted.rsplit(".", 1)[-1]
        return dotted.count(".") > 1 and (
            name in forbidden or (_plain(name) in own and dotted not in allowed)
        )

    found = _taken(code, importing, frozenset(exercise.names))
    found = sorted(filter(is_the_answer, found))
    if not found:
        return None
    return (
        f"The answer to {exercise.name} is taken from {found[0]}, so it earns nothing: "
        "write it yourself, and compare it with mmlearn's afterwards."
    )


def _module_table(code):
    return symtable.symtable(code, "<cell>", "exec")


def _inner_tables(table):
    for child in table.get_children():
        yield child
        yield from _inner_tables(child)


def _plain(name):
    return name.replace("_", "").lower()


def _parse(code):
    try:
        symtable.symtable(code, "<cell>", "exec")
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@lru_cache(maxsize=1024)
def _taken(code, elsewhere, wanted):
    """The dotted names in mmlearn that a piece of code uses, by whatever road."""
    tree = _parse(code)
    if tree is None:
        return frozenset()
    meaning = {}  # name in the notebook -> dotted name in mmlearn
    taken = set()
    free = names_used(code) | (wanted - names_bound(code))
    for part in (*elsewhere, code):
        for local, dotted in _imports(part):
            if local == "*":
                taken.update(f"{dotted}.{name}" for name in free)
            else:
                meaning[local] = dotted
                if part is code:
                    taken.add(dotted)
    # clip = importlib.import_module("mmlearn.clip"); loss = clip.loss: as often as it takes.
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for _ in assignments:
        for node in assignments:
            dotted = _dotted(node.value, meaning)
            for target in node.targets if dotted else ():
                if isinstance(target, ast.Name):
                    meaning.setdefault(target.id, dotted)
    taken.update(meaning[name] for name in free if name in meaning)
    taken.update(_dotted(node, meaning) for node in ast.walk(tree))
    return frozenset(taken - {None})


@lru_cache(maxsize=1024)  # most cells of a class are the released ones
def _imports(code):
    """(local name, dotted name) for each thing that a cell's imports take from mmlearn."""
    tree, found = _parse(code) if "mmlearn" in code else None, []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            for item in node.names:
                if item.name.split(".")[0] == "mmlearn":
                    found.append(
                        (item.asname or "mmlearn", item.name if item.asname else "mmlearn")
                    )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmlearn":
            for item in node.names:
                whole = node.module if item.name == "*" else f"{node.module}.{item.name}"
                found.append(("*" if item.name == "*" else item.asname or item.name, whole))
    return tuple(found)


def _dotted(node, meaning):
    """The dotted name in mmlearn that an expression stands for, or None."""
    if isinstance(node, ast.Name):
        return meaning.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, meaning)
        return f"{base}.{node.attr}" if base else None
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func).rsplit(".", 1)[-1]
        texts = [a.value if isinstance(a, ast.Constant) else None for a in node.args]
        if called in ("import_module", "__import__") and texts:
            module = str(texts[0])
            return module if module.split(".")[0] == "mmlearn" else None
        if called == "getattr" and len(texts) > 1 and isinstance(texts[1], str):
            base = _dotted(node.args[0], meaning)
            return f"{base}.{texts[1]}" if base else None
    return None
