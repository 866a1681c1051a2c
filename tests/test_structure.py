"""The shape of the code: which room may look into which, nothing happens at import, no magic indices."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helper import options

ROOT = Path(__file__).resolve().parent.parent
#: Who may import whom, beside libraries and modules of the same room.
ROOMS = {
    "errors": set(),
    "models": {"errors"},
    "dataset": {"errors"},
    "crd": {"errors"},
    "distiller_zoo": {"errors", "models", "crd"},
    "helper": {"errors", "models", "dataset", "distiller_zoo"},
    "scripts": {"errors", "models", "dataset", "distiller_zoo", "crd", "helper"},
    "train_teacher": {"errors", "helper"},
    "train_cifar_student": {"errors", "helper"},
    "train_imagenet_student": {"errors", "helper"},
}
FILES = sorted(path for room in ROOMS for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py")))


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


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_downward(path):
    room = module_name(path).split(".")[0]
    seen = {name.split(".")[0] for name in imported_modules(path)} - {room}
    assert seen <= ROOMS[room], f"{room} must not know {seen - ROOMS[room]}"


def test_imports_have_no_cycle():
    modules = {module_name(path): path for path in FILES}
    graph = {name: {target for target in imported_modules(path) if target in modules} for name, path in modules.items()}

    def visit(name, trail):
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        for target in graph[name]:
            visit(target, [*trail, name])

    for name in graph:
        visit(name, [])


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
    loops = ("engine", "stage_training", "lockstep", "inputs", "guard", "metrics", "distributed")
    for name in (*loops, "run_folder", "run_state", "teacher", "schedule"):
        text = (ROOT / "helper" / f"{name}.py").read_text()
        assert not re.search(r"""distill\s*(==|in)\s|["'](norm|kd|crd|ft|ce)["']""", text), name


def test_weights_are_only_ever_read_as_weights():
    for path in FILES:
        for call in re.findall(r"torch\.load\(.*", path.read_text()):
            assert "weights_only=True" in call, path


def test_flags_of_one_name_mean_one_thing():
    flags = {}
    for method in options.DISTILLERS.values():
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
