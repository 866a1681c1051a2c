"""scripts/report.py: what it prints and writes."""

import shutil
import subprocess
import sys

import pytest

from errors import UserError
from scripts import report
from tests.conftest import ROOT, message_of
from tests.run_folders import make_run


@pytest.fixture
def runs(tmp_path):
    made = [make_run(tmp_path / "save", "norm", 1, [50.0, 61.0, 60.0 + n], co_sponge=n) for n in (1, 2)]
    return [*made, make_run(tmp_path / "save", "kd", 1, [50.0, 61.0, 60.0])]


def test_everything_is_written(runs, tmp_path, capsys):
    page, table, folder = tmp_path / "page.html", tmp_path / "runs.csv", tmp_path / "f"
    names = [str(run) for run in runs]
    report.main([*names, "--html", str(page), "--csv", str(table), "--figures", str(folder)])
    assert "| norm -s 1 |" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>") and table.read_text().startswith("dataset,teacher,")
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy_against_n.svg",
        "learning_curves.svg",
    ]
    report.main([*names, "--grid"])
    assert "|  | resnet20 -> resnet8 |" in capsys.readouterr().out
    report.main([*names, "--comparison"])
    assert "| against ce | against kd |" in capsys.readouterr().out
    assert "--comparison: --grid prints another" in message_of(report.main, [*names, "--grid", "--comparison"])


@pytest.mark.slow
def test_pictures_of_networks_are_on_the_page_and_in_the_folder(distil, tmp_path):
    run = distil("--batch_size", "64", "--max_steps", "2", distill="kd")
    page, folder = tmp_path / "page.html", tmp_path / "f"
    report.main([str(run), "--html", str(page), "--figures", str(folder), "--networks"])
    assert {f"tsne_{run.name}.svg", f"correlation_{run.name}.svg"} <= {path.name for path in folder.iterdir()}
    assert page.read_text().count("correlation digits") == 1 and "settings" in page.read_text()


def test_what_is_left_out_is_said(runs, tmp_path, capsys):
    (runs[0] / "result.json").unlink()
    (runs[1] / "config.json").write_text("{}")
    report.main([str(tmp_path / "save")])
    printed = capsys.readouterr()
    assert f"{runs[0]}: not finished; left out" in printed.err and f"{runs[1]}: " in printed.err
    assert "| kd |" in printed.out and "norm" not in printed.out


def test_what_makes_no_report_is_one_line(runs, tmp_path):
    assert "name run folders" in message_of(report.main, [])
    (tmp_path / "empty").mkdir()
    assert "none of the folders" in message_of(report.main, [str(tmp_path / "empty")])
    assert "there is no folder" in message_of(report.main, [str(tmp_path / "typo")])
    none = tmp_path / "none" / "x.csv"
    assert f"--csv: there is no folder {none.parent}" in message_of(report.main, [str(runs[1]), "--csv", str(none)])
    place = runs[1] / "config.json"
    message = message_of(report.main, [str(runs[1]), "--figures", str(place)])
    assert message.startswith(f"argument --figures: {place} is a file; name a folder")


def test_documents_are_filled_between_their_markers(runs, tmp_path):
    (tmp_path / "docs").mkdir()
    make_run(tmp_path / "save", "kd", 2, [50.0, 61.0, 62.0])
    text = "before\n<!-- report save/*kd* -->\nold\n<!-- end of report -->\nafter\n"
    text += "<!-- overview save/*kd*,save/*_ce_*,save/*_norm_* -->\nold\n<!-- end of overview -->\n"
    (tmp_path / "README.md").write_text(text)
    assert report.update_documents(tmp_path) == [tmp_path / "README.md"]
    filled = (tmp_path / "README.md").read_text()
    one, several = filled.split("after\n")
    assert one.startswith("before\n<!-- report save/*kd* -->\n| data set") and one.endswith("<!-- end of report -->\n")
    assert "old" not in filled and "| kd |" in one and "| norm" not in one
    assert "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" in one and " ± " not in filled, "no cell breaks there"
    assert "|  | resnet20 -> resnet8, 3 epochs |" in several and "| kd | 6" in several
    assert report.update_documents(tmp_path) == []
    shutil.rmtree(tmp_path / "save")
    with pytest.raises(UserError, match="matches no run folder"):
        report.update_documents(tmp_path)


def test_the_repositorys_documents_are_up_to_date():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        assert report.fill_markers(text) == text, f"python scripts/report.py --update_docs changes {path.name}"


@pytest.mark.slow
def test_a_plain_terminal_ends_no_report(runs, tmp_path):
    run = make_run(tmp_path / "save", "kd", 2, [50.0, 61.0, 62.0])
    run.rename(str(tmp_path / "save" / "caf\udce9"))
    (runs[0] / "result.json").rename(runs[0] / "nothing.json")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        str(tmp_path / "save"),
        "--csv",
        str(tmp_path / "c"),
    ]
    environment = {"PYTHONIOENCODING": "ascii:strict", "PATH": ""}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"61.00" in done.stdout and b"left out" in done.stderr and b"Traceback" not in done.stderr
    assert "caf\\udce9" in (tmp_path / "c").read_text()
