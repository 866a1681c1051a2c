"""The pages of the documentation, as tests read them and run their commands."""

import re
from importlib import import_module
from types import ModuleType

#: What the commands of every walk through pages run, each at least once.
SCRIPTS = (
    "train_teacher.py",
    "train_cifar_student.py",
    "scripts/export_student.py",
    "scripts/report.py",
    "scripts/reproduce.py",
    "scripts/compare.py",
)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page that are of these languages."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if name in languages]


def commands(text: str, *languages: str) -> list[str]:
    """The lines of these blocks."""
    return [line for block in blocks(text, *languages) for line in block.splitlines() if line.strip()]


def module_of(script: str) -> ModuleType:
    """The module of a script that a command names, such as scripts/report.py."""
    return import_module(script.removesuffix(".py").replace("/", "."))
