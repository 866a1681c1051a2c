"""What the documents say works as they say it."""

import re
import shlex

import pytest

import train_cifar_student
import train_teacher
from helper.command_line import imagenet_parser, student_parser, teacher_parser
from models import model_dict
from scripts import export_student, list_methods, report, reproduce
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
MAINS = {
    "train_teacher.py": train_teacher.main,
    "train_cifar_student.py": train_cifar_student.main,
    "scripts/export_student.py": export_student.main,
    "scripts/report.py": report.main,
    "scripts/reproduce.py": reproduce.main,
}


def commands(language: str) -> list[str]:
    """Lines of the fenced blocks of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [line for name, block in blocks if name == language for line in block.splitlines() if line.strip()]


def test_the_example_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    """With a few steps added; `save/*` is spelled out, as a shell would."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands("bash"):
        program, *argv = shlex.split(command, comments=True)
        if program != "python":
            assert program in ("bash", "tensorboard")
            continue
        script, *flags = argv
        flags = [str(path) for flag in flags for path in (sorted(tmp_path.glob(flag)) if "*" in flag else [flag])]
        if script.startswith("train_"):
            flags += ["--max_steps", "2"]
        MAINS[script](flags)
        ran.append(script)
    assert set(ran) == set(MAINS)
    printed = capsys.readouterr().out
    assert "| digits | resnet20 | resnet8 | norm |" in printed and "exported resnet8" in printed


@pytest.mark.parametrize("command", [line for line in commands("") if line.startswith("python train_")])
def test_commands_that_need_a_network_or_own_images_parse(command):
    _, script, *argv = shlex.split(command)
    parsers = {
        "train_teacher.py": teacher_parser,
        "train_cifar_student.py": student_parser,
        "train_imagenet_student.py": imagenet_parser,
    }
    parsers[script]().parse_args(argv)


def test_every_file_and_method_that_is_named_exists():
    for path in re.findall(r"\[[^\]]+\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.S)[1]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    for path in re.findall(r"\b(?:scripts|docs|helper|tests)/[\w./]+\.(?:py|sh|md)", README):
        assert (ROOT / path).exists(), path
    for document in (ROOT / "docs").glob("*.md"):
        for path in re.findall(
            r"`((?:scripts|docs|helper|tests|models|dataset|distiller_zoo)/[\w./]+)`", document.read_text()
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_the_method_table_is_complete():
    table = README.split("<!-- methods -->\n")[1].split("<!-- end of methods -->")[0]
    assert table == list_methods.table("cifar100", "resnet32x4", "resnet8x4") + "\n"
    families = README.split("## Networks")[1]
    assert all(name.split("_")[0].rstrip("0123456789x") in families for name in model_dict)


def test_the_results_in_the_documents_are_the_reports():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert sum(report.fill_markers(path.read_text()).count("<!-- end of ") for path in documents) >= 2
    for path in documents:
        assert report.fill_markers(path.read_text()) == path.read_text(), "run python scripts/report.py --update_docs"
