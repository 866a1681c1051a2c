"""What the documents say works as they say it."""

import itertools
import re
import shlex
import subprocess
from importlib import import_module

import pytest
import torch

from helper.command_line import imagenet_parser, student_parser, teacher_parser
from models import model_dict
from scripts import draw_norm, list_methods, report
from tests import pages
from tests.conftest import ROOT
from tests.pages import blocks, commands, module_of

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]
#: Pages whose commands in bash blocks are run, in this order and in one folder; own_work.md has a test of its own.
WALK = (
    *("README.md", "docs/training.md", "docs/teachers_and_networks.md"),
    *("docs/judging.md", "docs/deployment.md", "docs/whole_tables.md"),
)
#: What the commands run, each at least once.
SCRIPTS = (*pages.SCRIPTS, "scripts/evaluate.py")
PARSERS = {
    "train_teacher.py": teacher_parser,
    "train_cifar_student.py": student_parser,
    "train_imagenet_student.py": imagenet_parser,
}


def named_commands() -> list[str]:
    """Every command of the documents that starts one of our scripts, in blocks and in sentences."""
    found = []
    for text in PAGES.values():
        sentences = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
        lines = commands(text, "", "bash") + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]
        found += [line for line in lines if re.match(r"(\w+=\S+ )*(python|torchrun|bash) ", line)]
    return sorted(set(found))


@pytest.mark.slow
def test_the_commands_run_in_their_order(few_images, tmp_path, monkeypatch, capsys):
    """On few images; `save/*` is spelled out, as a shell would. Then Python's blocks, which read the runs."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in dict.fromkeys(command for page in WALK for command in commands(PAGES[page], "bash")):
        program, *argv = shlex.split(command, comments=True)
        if program != "python":
            assert program in ("bash", "tensorboard")
            continue
        script, *flags = argv
        flags = [str(path) for flag in flags for path in (sorted(tmp_path.glob(flag)) if "*" in flag else [flag])]
        if script.startswith("train_"):
            flags += ["--epochs", "1"]
        module_of(script).main(flags)
        ran.append(script)
    for code in (code for page in WALK for code in blocks(PAGES[page], "python")):
        exec(compile(code, "a document", "exec"), {"images": torch.zeros(2, 3, 32, 32)})
    assert set(ran) == set(SCRIPTS)
    printed = capsys.readouterr().out
    assert "| digits | resnet20 | resnet8 | norm |" in printed and "exported resnet8" in printed


def help_of(script: str, capsys) -> str:
    with pytest.raises(SystemExit):
        module_of(script).main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", named_commands())
def test_commands_that_are_not_run_are_legal(command, capsys):
    """Training commands are parsed; of other scripts the flags must be in --help. ... stands for a value or flags."""
    command = re.sub("mean_map|regressed_map", "hint", command).replace("--map_power", "--hint_layer")  # of own_work.md
    words = shlex.split(command, comments=True)
    words = [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before[:2] == "--"]
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if script is None:  # python -m pytest and the like
        return
    assert (ROOT / script).is_file()
    ours = words[words.index(script) + 1 :]
    common = ours[ours.index("--") + 1 :] if "--" in ours else []
    if script in PARSERS:
        PARSERS[script]().parse_args(ours)
    elif script.endswith(".py"):
        flags = [word for word in ours[: len(ours) - len(common)] if re.match(r"--\w", word)]
        known = help_of(script, capsys) if flags else ""
        assert all(re.search(rf"{flag}\b", known) for flag in flags)
    teacher_parser().parse_args(common)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for path in re.findall(r"\]\(([\w./]+)\)", text):
        assert (folder / path).exists(), path
    rooms = "scripts|docs|helper|tests|models|dataset|distiller_zoo|crd"
    code = " ".join(re.findall(r"^```.*?^```$|`[^`\n]+`", text, re.S | re.M))
    for path in re.findall(rf"\b((?:{rooms})/[\w./]+\.(?:py|sh|md|svg|json))\b", code):
        assert (ROOT / path).exists() or (folder / path).exists() or path.endswith("mean_map.py"), path


def tree() -> set[str]:
    """The files and folders of the architecture page's tree."""
    found, folder = set(), ""
    for line in re.search(r"## The tree\n\n```\n(.*?)```", ARCHITECTURE, re.S)[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            found.add(name)
        else:
            found.add(folder + name)
    return found


def test_the_tree_is_the_repositorys():
    assert all((ROOT / name).exists() for name in tree()), tree()
    modules = [*ROOT.glob("*.py"), *(ROOT / "helper").rglob("*.py"), *(ROOT / "dataset").glob("*.py")]
    named = {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    assert named <= tree()


def test_the_names_of_the_architecture_page_exist():
    named = set(re.findall(r"`(\w+)\.(\w+)\b", ARCHITECTURE.split("## How to add")[0]))
    modules = {module: name for module, name in named if (ROOT / "helper" / f"{module}.py").exists()}
    assert len(modules) >= 6
    for module, name in named:
        if module in modules and name != "py":
            assert hasattr(import_module(f"helper.{module}"), name), f"{module}.{name}"
    for cls, name in (pair for pair in named if pair[0] in ("Run", "Training")):
        home = import_module("helper.run" if cls == "Run" else "helper.loops")
        assert hasattr(getattr(home, cls), name), f"{cls}.{name}"


def test_the_method_table_is_complete():
    table = README.split("<!-- methods -->\n")[1].split("<!-- end of methods -->")[0]
    assert table == list_methods.table("cifar100", "resnet32x4", "resnet8x4") + "\n"
    families = PAGES["docs/teachers_and_networks.md"]
    assert all(name.split("_")[0].rstrip("0123456789x") in families for name in model_dict)


def test_the_results_in_the_documents_are_the_reports():
    assert sum(report.fill_markers(text).count("<!-- end of ") for text in PAGES.values()) >= 2
    for page, text in PAGES.items():
        assert report.fill_markers(text) == text, f"{page}: run python scripts/report.py --update_docs"


def test_the_readme_is_short_and_its_picture_is_drawn_by_the_script():
    assert len(README.splitlines()) <= 180
    first_screen = README.split("\n## ")[0]
    assert all(part in first_screen for part in ("demo.sh", "test.sh", "docs/figures/norm.svg", "<!-- overview "))
    assert draw_norm.FILE.read_text() == draw_norm.draw(), "run python scripts/draw_norm.py"


def test_every_page_is_listed_in_the_readme():
    assert all(f"({page})" in README for page in PAGES if page != "README.md")


def test_what_the_commands_write_at_the_root_is_ignored_by_git():
    """Pages, tables and networks that a reader makes are not offered to commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    words = [shlex.split(command, comments=True) for page in PAGES.values() for command in commands(page, "bash")]
    writing = ("--html", "--csv", "--json", "--out", "--figures")
    files = {after for command in words for flag, after in itertools.pairwise(command) if flag in writing}
    files = sorted(file for file in files if "/" not in file)
    assert {"report.html", "judged.html", "student.onnx", "figures"} <= set(files)
    done = subprocess.run(["git", "check-ignore", *files, "figures/"], cwd=ROOT, capture_output=True, text=True)
    assert [file for file in files if file not in done.stdout.replace("/", "").split()] == []
