"""Tables and figures of runs."""

import csv
import io
import json
import shutil

import pytest
from helper.options import student_parser

from distiller_zoo import DISTILLERS
from errors import UserError
from helper import figures, published, tables
from helper.published import Published, judge
from scripts import report
from tests.conftest import message_of
from tests.run_folders import make_run

PAIR = {"teacher": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}


@pytest.fixture
def runs(tmp_path):
    """Three seeds of KD and NORM, one of the baseline and of the teacher, two values of N."""
    root = tmp_path / "save"
    made = [make_run(root, "kd", seed, [50.0, 61.0, 60.0 + seed]) for seed in (1, 2, 3)]
    made += [make_run(root, "norm", seed, [50.0, 70.0, 65.0 + seed]) for seed in (1, 2, 3)]
    made += [make_run(root, "norm", 1, [50.0, 55.0, 52.0], co_sponge=2)]
    made += [make_run(root, "ce", 1, [40.0, 45.0, 44.0], None)]
    made += [make_run(root, "ce", 1, [80.0] * 5, None, model_s="resnet20")]
    return made


def test_a_row_is_what_differs_in_seeds_alone(runs):
    table = report.make_report(runs)
    cells = "| digits | resnet20 | resnet8 | kd | 3 | 62.00 ± 1.00 | 62.00 ± 1.00 | 57.67 ± 0.33 | 3 | best on test |"
    assert cells.replace("| 62.00 ± 1.00 | 57", "| 62.00 ± 1.00 | 57") in table
    assert "| norm -s 2 | 3 | 52.00 | 55.00 | 52.33 | 1 |" in table
    assert "| paper |" not in table, "no column without a value"
    assert "    --distill kd --model_t resnet20 --model_s resnet8 -r 0.1 -a 0.9" in table


def test_rows_of_a_method_stand_together_in_the_order_of_their_numbers(runs, tmp_path):
    more = [make_run(tmp_path / "save", "norm", 1, [50.0], co_sponge=n) for n in (16, 4)]
    rows, _ = tables.read_rows([*more, *runs])
    labels = ["ce", "ce", "norm", "norm -s 2", "norm -s 4", "norm -s 16", "kd"]
    assert [row.label for row in rows] == labels


def test_a_row_is_named_by_flags_as_they_are_written(tmp_path):
    usual = make_run(tmp_path, "mlkd", 1, [50.0])  # its temperatures are a list in config.json
    other = make_run(tmp_path, "mlkd", 2, [50.0], mlkd_temperatures=(2.0, 5.0), logit_standardization=True)
    rows, _ = tables.read_rows([usual, other])
    assert [row.label for row in rows] == ["mlkd", "mlkd --mlkd_temperatures 2,5 --logit_standardization"]


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_settings_of_a_row_can_be_given_again(name, tmp_path):
    teacher = "resnet20" if DISTILLERS[name].needs_teacher else None
    run = make_run(tmp_path, name, 1, [50.0], teacher)
    stored = json.loads((run / "config.json").read_text())
    given = vars(student_parser().parse_args(report.command_of(stored).split()))
    for flag in DISTILLERS[name].flags:
        read = given[flag.argument]
        assert (list(read) if isinstance(read, tuple) else read or False) == (stored[flag.argument] or False)
    assert (given["distill"], given["model_t"], given["model_s"]) == (name, stored["model_t"], "resnet8")


def test_older_run_folders_share_a_row_with_newer_ones(runs):
    path = runs[0] / "config.json"
    config = json.loads(path.read_text())
    for name in ("holdout", "precision", "fused_optimizer", "logit_standardization"):
        del config[name]
    path.write_text(json.dumps(config))
    assert "| 62.00 ± 1.00 |" in report.make_report(runs[:3])


def test_runs_from_before_the_parts_of_a_batch_were_recorded_are_the_same_row(runs):
    path = runs[0] / "config.json"
    config = json.loads(path.read_text())
    del config["images_per_pass"]
    path.write_text(json.dumps(config))
    [row] = tables.read_rows(runs[:3])[0]
    assert len(row.results) == 3
    path.write_text(json.dumps(config | {"images_per_pass": 16}))
    assert len(tables.read_rows(runs[:3])[0]) == 2, "another part is another BatchNorm"


def test_a_folder_that_is_given_twice_counts_once(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(runs[0])
    same = [runs[0], runs[0].relative_to(tmp_path), tmp_path / "save" / ".." / "save" / runs[0].name, tmp_path / "link"]
    [row], unfinished = tables.read_rows(same)
    assert (row.folders, unfinished) == ([runs[0]], [])
    assert "| 61.00 | 61.00 | 57.33 | 1 |" in report.make_table([row])


def test_rows_that_their_method_does_not_tell_apart_are_told_apart_by_their_settings(runs, tmp_path):
    root = tmp_path / "more"
    fast = [make_run(root, "kd", 1, [50.0, 51.0, 33.0], learning_rate=0.2, lr_decay_epochs=(1, 2), sync_bn=True)]
    fast += [make_run(root, "ce", 1, [50.0, 51.0, 34.0], None, learning_rate=0.2)]
    rows, _ = tables.read_rows([*runs, *fast])
    [grid] = tables.make_grids(rows)
    usual = json.loads((runs[0] / "config.json").read_text())
    decay = ",".join(map(str, usual["lr_decay_epochs"]))
    labels = {
        f"kd --no-sync_bn --learning_rate 0.05 --lr_decay_epochs {decay}": "last 62.00 ± 1.00",
        "kd --sync_bn --learning_rate 0.2 --lr_decay_epochs 1,2": "last 33.00",
        "student alone --learning_rate 0.05": "last 44.00",
        "student alone --learning_rate 0.2": "last 34.00",
        "norm": "last 67.00 ± 1.00",
    }
    text, page = tables.grid_markdown(grid), tables.as_html(rows, [])
    for label, accuracy in labels.items():
        assert f"| {label} | {accuracy}<br>" in text, text
        assert f"<td>{label}</td><td>{accuracy}<small>" in page
    assert "kd --sync_bn --learning_rate 0.2 --lr_decay_epochs 1,2 |" in report.make_report([*runs, *fast])


def test_rows_of_one_method_keep_the_papers_value(tmp_path):
    runs = [make_run(tmp_path, "norm", 1, [70.0, 76.4], learning_rate=rate, **PAIR) for rate in (0.05, 0.2)]
    assert report.make_grid_report(runs).count("paper 76.49") == 2


def test_the_teacher_of_a_grid_is_the_one_that_taught(tmp_path):
    teacher = make_run(tmp_path, "ce", 1, [80.0, 81.0, 82.0], None, model_s="resnet20").rename(tmp_path / "longer")
    baseline = make_run(tmp_path, "ce", 1, [40.0, 41.0], None, model_s="resnet20")
    student = make_run(tmp_path, "kd", 1, [60.0, 61.0])
    text = report.make_grid_report([baseline, teacher, student])
    assert "| teacher --epochs 2 " in text and "| teacher --epochs 3 " in text, "its --path_t names neither"
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"path_t": "/elsewhere/longer/last.pth"}))
    text = report.make_grid_report([baseline, teacher, student])
    assert "| teacher | last 82.00" in text and "last 41.00" not in text


def test_the_protocol_makes_a_row_of_its_own(tmp_path):
    runs = [make_run(tmp_path, "kd", 1, [50.0]), make_run(tmp_path, "kd", 2, [52.0], holdout=100)]
    table = report.make_report(runs)
    assert "best on test" in table and "best on 100 held-out" in table


def test_the_grid_has_methods_as_rows_and_pairs_as_columns(runs, tmp_path):
    other = make_run(tmp_path / "more", "kd", 1, [50.0, 51.0, 52.0], teacher="resnet14")
    [grid] = tables.make_grids(tables.read_rows([*runs, other])[0])
    assert grid.pairs == ["resnet20 -> resnet8", "resnet14 -> resnet8"]
    assert grid.methods[:2] == ["teacher", "student alone"] and {"kd", "norm", "norm -s 2"} == set(grid.methods[2:])
    text = tables.grid_markdown(grid)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line}
    assert lines["teacher"] == ["last 80.00<br>best 80.00<br>mean of last five 80.00<br>1 seed", "not run |"]
    assert all("last 44.00" in cell for cell in lines["student alone"])
    assert lines["norm"][1] == "not run |" and "3 seeds" in lines["norm"][0] and "last 52.00" in lines["kd"][1]


def test_the_papers_value_stands_beside_ours(tmp_path):
    runs = [make_run(tmp_path, "norm", n, [70.0, value], **PAIR) for n, value in ((1, 76.4), (2, 76.6), (3, 76.3))]
    text = report.make_report(runs)
    assert "| 76.49 | within (best) |" in text
    assert "paper 76.49: within (best)" in report.make_grid_report(runs)
    changed = make_run(tmp_path / "n", "norm", 1, [70.0, 75.0], co_sponge=2, **PAIR)
    assert "paper" not in report.make_report([changed]), "another N is another row than the paper's"


def test_the_band_is_that_of_a_t_test():
    paper = Published(76.49, "", runs=3)
    assert judge(paper, [76.0]) == "one seed"
    assert judge(paper, [76.4, 76.5, 76.6]) == "within"
    assert judge(paper, [75.4, 75.5, 75.6]) == "below"
    assert judge(paper, [77.4, 77.5, 77.6]) == "above"
    # t(0.975, 2) = 4.303, and the standard deviation 0.1: the band reaches 4.303 * 0.1 * sqrt(2 / 3) = 0.351.
    assert judge(paper, [76.04, 76.14, 76.24]) == "within"
    assert judge(paper, [76.03, 76.13, 76.23]) == "below"


def test_every_published_value_names_its_source_and_something_that_exists():
    for (_, _, _, method), value in published.PUBLISHED.items():
        assert method in tables.DISTILLERS and value.source and value.compared in tables.ACCURACIES


def test_csv_has_a_line_per_run(runs):
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(tables.read_rows(runs)[0]))))
    assert len(lines) == len(runs)
    assert [line["accuracy_last"] for line in lines if line["method"] == "kd"] == ["61.0", "62.0", "63.0"]


def test_the_page_is_whole_and_holds_its_figures(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    names = [str(run) for run in runs]
    report.main([*names, "--html", str(page), "--csv", str(tmp_path / "runs.csv"), "--figures", str(tmp_path / "f")])
    text = page.read_text()
    assert text.count("<svg") == 3 and "http://" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "<h2>digits, 3 epochs; best on test</h2>" in text and "62.00 ± 1.00" in text
    expected = ["accuracy_against_cost.svg", "accuracy_against_n.svg", "learning_curves.svg"]
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == expected
    assert (tmp_path / "runs.csv").exists()


def test_curves_show_the_seeds_and_n_is_an_axis(runs):
    rows, _ = tables.read_rows(runs)
    axes = figures.learning_curves(rows).axes[0]
    [kd] = [line for line in axes.lines if line.get_label().endswith(": kd")]
    assert list(kd.get_ydata()) == [50.0, 61.0, 62.0]
    axes = figures.accuracy_against_n(rows).axes[0]
    [[numbers, means]] = [line.get_data() for line in axes.lines if line.get_label().startswith("_child")][:1] or [
        axes.lines[0].get_data()
    ]
    assert list(numbers) == [2, 8] and list(means) == [52.0, 67.0]
    assert figures.accuracy_against_n([row for row in rows if row.label != "norm -s 2"]) is None


def test_features_and_correlations_are_drawn_from_a_run(distil, tmp_path):
    run = distil("--batch_size", "64", "--max_steps", "2", distill="kd")
    outputs = figures.read_outputs(run)
    assert outputs["pooled"].shape == (364, 64) and outputs["teacher_logits"].shape == outputs["logits"].shape
    report.main([str(run), "--figures", str(tmp_path / "f"), "--networks"])
    assert {f"tsne_{run.name}.png", f"correlation_{run.name}.png"} <= {path.name for path in (tmp_path / "f").iterdir()}
    alone = figures.read_outputs(distil("--batch_size", "64", "--max_steps", "1", distill="one", teacher=False))
    assert alone["pooled"].shape == outputs["pooled"].shape and "teacher_logits" not in alone
    outputs["teacher_logits"] = outputs["logits"]
    title = figures.correlation_difference(outputs, "x").axes[0].get_title()
    assert title == "x: mean 0.000, max 0.000"


def test_documents_are_filled_between_their_markers(runs, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    text = "before\n<!-- table save/*kd* -->\nold\n<!-- end of table -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    assert report.update_documents(tmp_path) == [tmp_path / "README.md"]
    filled = (tmp_path / "README.md").read_text()
    assert filled.startswith("before\n<!-- table save/*kd* -->\n| data set") and filled.endswith("-->\nafter\n")
    assert "old" not in filled and "| kd |" in filled and "| norm |" not in filled
    assert report.update_documents(tmp_path) == []
    shutil.rmtree(tmp_path / "save")
    with pytest.raises(UserError, match="matches no run folder"):
        report.update_documents(tmp_path)


def test_what_is_missing_is_said(runs, tmp_path, capsys):
    (runs[0] / "result.json").unlink()
    report.main([str(run) for run in runs])
    assert f"{runs[0]}: not finished, left out" in capsys.readouterr().err
    assert "name run folders" in message_of(report.main, [])
    assert "none of the folders" in message_of(report.main, [str(tmp_path)])
    for flag, place in (("--csv", tmp_path / "none" / "x.csv"), ("--figures", runs[1] / "config.json")):
        message = message_of(report.main, [str(runs[1]), flag, str(place)])
        assert f"{place} cannot be written" in message and "name another place" in message
