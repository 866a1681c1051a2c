"""The shape of the code: which room may look into which, nothing happens at import, no magic indices."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distiller_zoo import DISTILLERS
from helper.settings import all_settings
from tests.conftest import ROOT

#: Who may import whom, in addition to libraries and modules of the same room.
ROOMS = {
    "errors": set(),
    "setting": set(),
    "models": {"errors"},
    "dataset": {"errors"},
    "crd": {"errors"},
    "distiller_zoo": {"errors", "setting", "models", "crd"},
    "helper": {"errors", "setting", "models", "dataset", "distiller_zoo"},
    "helper.tables": {"errors", "setting", "models", "dataset", "distiller_zoo", "helper"},
    "scripts": {"errors", "setting", "models", "dataset", "distiller_zoo", "crd", "helper", "helper.tables"},
    "train_teacher": {"errors", "helper", "helper.tables"},
    "train_cifar_student": {"errors", "helper", "helper.tables"},
    "train_imagenet_student": {"errors", "helper", "train_cifar_student"},
}
FILES = sorted({path for room in ROOMS for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py"))})


def imported_modules(path: Path) -> list[str]:
    """Full names of the project's modules that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] in ROOMS]


def room_of(module: str) -> str:
    """The room of a module: a folder's own where it is in `ROOMS`, else the first part of the name."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_downward(path):
    room = room_of(module_name(path))
    seen = {room_of(name) for name in imported_modules(path)} - {room}
    assert seen <= ROOMS[room], f"{room} must not know {seen - ROOMS[room]}"


@pytest.mark.slow
def test_imports_have_no_cycle():
    modules = {module_name(path): path for path in FILES}
    graph = {name: {target for target in imported_modules(path) if target in modules} for name, path in modules.items()}

    def visit(name, trail):
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        for target in graph[name]:
            visit(target, [*trail, name])

    for name in graph:
        visit(name, [])


@pytest.mark.slow
def test_nothing_happens_at_import(tmp_path):
    modules = ", ".join(module_name(path) for path in FILES)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {modules}"
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_no_copies_of_students_and_no_feature_by_number():
    assert not list((ROOT / "models").glob("*student*"))
    for path in FILES:
        if path.parent.name in ("helper", "distiller_zoo") or path.parent == ROOT:
            numbered = re.findall(r"\b(?:maps|feats?|features|feat_[st])\[-?\d", path.read_text())
            assert not numbered, f"{path}: {numbered}"


def test_loops_know_no_method_by_name():
    loops = ("run", "loops", "optim", "metrics", "distributed", "log", "fast")
    for name in (*loops, "run_folder", "checkpoint", "networks", "teacher", "export", "judging"):
        text = (ROOT / "helper" / f"{name}.py").read_text()
        assert not re.search(r"""distill\s*(==|in)\s|["'](norm|kd|crd|ft|ce)["']""", text), name


def test_weights_are_only_ever_read_as_weights():
    for path in FILES:
        for call in re.findall(r"torch\.load\(.*", path.read_text()):
            assert "weights_only=True" in call, path


def test_what_an_exception_says_is_cut_in_one_place():
    by_hand = r"str\((error|cause)\)(\.strip\(\))?\.(splitlines|split\(.\\n)"
    found = {path.name for path in FILES if re.search(by_hand, path.read_text())}
    assert found == {"errors.py", "check_environment.py"}, "the other imports nothing of ours"


def test_flags_of_one_name_mean_one_thing():
    flags = {}
    for method in DISTILLERS.values():
        for flag in method.flags:
            known = flags.setdefault(flag.names, flag)
            assert (known.type, known.help) == (flag.type, flag.help)
    spellings = [spelling for names in flags for spelling in names]
    assert len(spellings) == len(set(spellings))


def test_every_public_function_and_class_is_described():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                plain_builder = (
                    path.parent.name == "models" and isinstance(node, ast.FunctionDef) and len(node.body) == 1
                )
                module_part = isinstance(node, ast.ClassDef) and path.parent.name == "models"
                assert ast.get_docstring(node) or plain_builder or module_part, f"{path}: {node.name}"


#: Collections that name settings because they are fields of something else: (module, function) -> what.
RECORDS = {
    ("helper.checkpoint", "data_record"): "entries of a file's record",
    ("helper.export", ""): "entries of a file's record",
    ("models.record", ""): "entries of a file's record",
    ("helper.run", "_with_found"): "what was found out of the data",
    ("helper.networks", "settings_as_teacher"): "a network's fields, as the settings that they decide",
    ("helper.tables.rows", "_usual"): "what a recipe depends on",
    ("helper.networks", "network_in"): "entries of a file's record",
    ("helper.tables.plan", "_job"): "values that a plan gives to a run",
    ("scripts.benchmarks.augmentation", "cases"): "values that a benchmark gives to a run",
}


def parts_with_function(tree: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node, with the name of the innermost function around it."""
    for node in ast.iter_child_nodes(tree):
        yield node, function
        inner = node.name if isinstance(node, ast.FunctionDef) else function
        yield from parts_with_function(node, inner)


def names_in(node: ast.AST) -> list[str]:
    """The texts in a literal collection; of a dictionary its keys."""
    parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return [part.value.lstrip("-") for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_settings_are_listed_in_their_table_alone():
    """What concerns several settings is said in their rows: nowhere else is there a list of them."""
    settings = set(all_settings())
    for path in FILES:
        name = module_name(path)
        if name in ("helper.settings", "helper.recipes") or name.split(".")[0] in ("distiller_zoo", "crd"):
            continue
        for node, function in parts_with_function(ast.parse(path.read_text())):
            names = names_in(node) if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict) else []
            found = settings & set(names)
            is_list = len(found) >= 3 and len(found) >= len(names) / 2
            assert not is_list or (name, function) in RECORDS, f"{path}:{node.lineno} lists {sorted(found)}"


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("name", ["loops", "optim", "metrics", "run"])
def test_the_way_of_a_batch_is_calls_alone(name):
    """No coroutine between a batch and the optimizer; only contexts and streams of batches are generators."""
    for function in functions_of(ROOT / "helper" / f"{name}.py"):
        yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function))
        decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
        returns = "" if function.returns is None else ast.unparse(function.returns)
        assert not yields or "contextmanager" in decorators or returns == "Iterator[Batch]", function.name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_function_is_longer_than_a_screen(path):
    for function in functions_of(path):
        assert function.end_lineno - function.lineno < 45, f"{path}: {function.name}"


def test_no_test_file_is_longer_than_three_hundred_lines():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_the_rooms_are_small():
    def count(pattern: str) -> int:
        return len([path for path in ROOT.glob(pattern) if path.name != "__init__.py"])

    assert count("helper/*.py") <= 18 and count("helper/tables/*.py") <= 8


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_libraries_are_used_by_what_they_promise(path):
    """None of their private parts, and no object is turned into another kind of object."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert node.attr not in ("_actions", "_option_string_actions", "_index_queues", "_workers"), text
            assert not text.startswith("numpy._core"), text
            assert not (node.attr == "__class__" and isinstance(node.ctx, ast.Store)), text


def test_a_test_stands_where_the_tested_is():
    """tests/ mirrors the tree: a folder of tests for every folder of the product that has tests."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert all((ROOT / folder).is_dir() for folder in folders)
