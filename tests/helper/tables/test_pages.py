"""Rows on pages: Markdown lists, comparisons, CSV."""

import csv
import io
import json

from scipy.stats import ttest_ind

from helper.tables import pages
from helper.tables.rows import read_rows
from tests.run_folders import make_run, rows_of

PAIR = {"teacher": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}


def test_the_report_has_a_line_per_row_and_its_settings(runs):
    report = pages.make_report(rows_of(runs))
    line = "| digits | resnet20 | resnet8 | kd | 3 | 62.00 ± 1.00 | 62.00 ± 1.00 | 57.67 ± 0.33 | 3 | best on test |"
    assert line in report
    assert "| norm -s 2 | 3 | 52.00 | 55.00 | 52.33 | 1 |" in report
    assert "| paper |" not in report, "no column without a value"
    assert "    --distill kd --model_t resnet20 --model_s resnet8 -r 0.1 -a 0.9" in report
    settings = [line for line in report.splitlines() if line.startswith("    ")]
    assert settings[0] == "    all rows: --batch_size 64 --learning_rate 0.05"
    assert len(settings) == 6 and not any("--batch_size" in line for line in settings[1:])
    alone = pages.make_report(rows_of(runs[:3]))
    assert "all rows" not in alone and "--batch_size 64" in alone, "of one row everything"


def test_the_comparison_tests_against_the_baseline_and_kd_and_shows_fidelity(tmp_path):
    lasts = {"ce": (60.0, 60.4, 60.2), "kd": (62.0, 62.3, 62.1), "norm": (63.0, 63.3, 63.3)}
    runs = []
    for method, values in lasts.items():
        teacher = {} if method != "ce" else {"teacher": None}
        runs += [make_run(tmp_path, method, seed, [value], **teacher) for seed, value in enumerate(values, 1)]
    (runs[-1] / "fidelity.json").write_text(json.dumps({"agreement": 88.0, "cka": 0.75, "accuracy": {}}))
    table = pages.make_comparison(rows_of(runs))
    p = ttest_ind(lasts["kd"], lasts["norm"], equal_var=False).pvalue
    norm = next(line for line in table.splitlines() if line.startswith("| resnet8 | norm "))
    assert f"| 63.20 ± 0.17 | +3.00 (p = {ttest_ind(lasts['ce'], lasts['norm'], equal_var=False).pvalue:.2g}) |" in norm
    assert norm.endswith(f"| +1.07 (p = {p:.2g}) | 88.00 (1 of 3 seeds) | 0.750 (1 of 3 seeds) |")
    assert "| kd | 3 | 62.13 ± 0.15 |" in table and "| - | - | - |" in table and "| KL |" not in table


def test_a_student_is_compared_with_the_kd_of_its_own_teacher(tmp_path):
    own, other, of_both = ("resnet20", "1" * 64), ("resnet56", "2" * 64), []
    for place, (teacher, digest), accuracy in (("own", own, 61.0), ("other", other, 70.0)):
        of_both += [make_run(tmp_path / place, "kd", s, [accuracy + s], teacher, teacher_digest=digest) for s in (1, 2)]
    norm = [make_run(tmp_path, "norm", s, [63.0 + s], own[0], teacher_digest=own[1]) for s in (1, 2)]
    plain = [make_run(tmp_path, "ce", s, [60.0 + s], None) for s in (1, 2)]

    def lead(*runs, of: str = "norm") -> str:
        lines = pages.make_comparison(rows_of([*plain, *norm, *runs])).splitlines()
        return next(line.split(" | ")[-1] for line in lines if f"| resnet8 | {of} " in line)

    assert lead(*of_both).startswith("+2.00 "), "not the other teacher's, nor none for there being two"
    assert lead(*of_both[2:]) == "- |" and lead(*of_both[2:], of="ce").startswith("-10.00 ")


def test_of_several_baselines_a_student_is_compared_with_the_one_of_its_settings(tmp_path):
    smooth, rate, start = {"label_smoothing": 0.2}, {"learning_rate": 0.1}, {"init": str(tmp_path / "w.pth")}
    ce = [make_run(tmp_path / f"{n}", "ce", 1, [60.0 - n], None, **flags) for n, flags in enumerate(({}, rate, start))]
    students = {0.5: {}, 1.5: rate, 2.5: smooth, 3.5: rate | smooth, 4.5: start, 5.5: {"learning_rate": 0.2}}
    norm = [make_run(tmp_path / f"{more}", "norm", 1, [60.0 + more], **flags) for more, flags in students.items()]

    def leads(*runs) -> dict[str, str]:
        cells = [line.split(" | ") for line in pages.make_comparison(rows_of([*runs])).splitlines()]
        return {of[3]: of[4].split()[0] for of in cells if of[0] == "| resnet8"}

    expected = {"60.50": "+0.50", "61.50": "+2.50", "62.50": "+2.50", "63.50": "+4.50", "64.50": "+6.50", "65.50": "-"}
    assert leads(*ce, *norm) == expected | dict.fromkeys(("60.00", "59.00", "58.00"), "-")
    said = "Of several rows of ce a row is\ncompared with the one it has the most settings in common with."
    assert said in pages.make_comparison(rows_of(ce)) and said not in pages.make_comparison(rows_of(ce[1:2]))
    assert leads(ce[2], norm[0])["60.50"] == "-", "random weights are not compared with given ones"


def test_a_fidelity_to_another_teacher_is_said_to_be(tmp_path):
    runs = [make_run(tmp_path, name, 1, [60.0], teacher) for name, teacher in (("ce", None), ("kd", "resnet20"))]
    for digests, of in ((("0", "0"), ""), (("1", "0"), "ce"), (("1", "1"), "ce, kd")):
        for run, digest in zip(runs, digests, strict=True):
            (run / "fidelity.json").write_text(json.dumps({"agreement": 88.0, "teacher": {"digest": digest * 64}}))
        said = f"What is compared with the teacher is, of {of}, with another one than theirs."
        assert (said in pages.make_comparison(rows_of(runs))) == bool(of)


def test_a_damaged_fidelity_leaves_its_run_out_by_name(runs):
    (runs[0] / "fidelity.json").write_text('{"agreement": 101}')
    _, left = read_rows(runs)
    assert [(one.folder, "its agreement is 101" in one.reason) for one in left] == [(runs[0], True)]


def test_a_sweep_ends_with_its_table(runs, tmp_path):
    assert "| kd | 3 | 62.00 ± 1.00 |" in pages.summary(runs)
    assert pages.summary([tmp_path / "none"]) == ""
    (runs[0] / "result.json").unlink()
    assert pages.summary(runs[:3]).endswith(f"{runs[0]}: not finished; left out")


def test_test_images_that_could_not_be_read_are_shown(runs):
    assert "unreadable" not in pages.make_table(rows_of(runs)), "all could be read"
    path = runs[0] / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_unreadable": 8, "test_images": 12}))
    assert "| best on test | 8 of 12 |" in pages.make_table(rows_of(runs))
    assert "8 of 12 test images" in pages.as_html(rows_of(runs), {})


def test_the_protocol_makes_a_row_of_its_own(tmp_path):
    runs = [make_run(tmp_path, "kd", 1, [50.0]), make_run(tmp_path, "kd", 2, [52.0], holdout=100)]
    table = pages.make_table(rows_of(runs))
    assert "best on test" in table and "best on 100 held-out" in table


def test_accuracies_on_held_out_images_have_a_column(runs, tmp_path):
    assert "held out" not in pages.make_table(rows_of(runs))
    run = make_run(tmp_path, "kd", 1, [50.0, 52.0], holdout=100)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) | {"holdout_accuracy": 60.0 + n} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    header, _, kd = (line.split(" | ") for line in pages.make_table(rows_of([run])).splitlines())
    assert kd[header.index("held out, last")] == "61.00"
    path.write_text(json.dumps(lines[0] | {"holdout_accuracy": "61"}))
    assert "holdout_accuracy is 61" in pages.summary([*runs, run])
    path.unlink()
    other = make_run(tmp_path, "kd", 2, [50.0, 52.0], holdout=100)
    (other / "metrics.jsonl").write_text(json.dumps({"holdout_accuracy": 61.0}) + "\n")
    assert " | 61.00 (1 of 2 seeds) | " in pages.make_table(rows_of([run, other]))


def test_the_papers_value_is_next_to_ours(tmp_path):
    ours = {1: 76.4, 2: 76.6, 3: 76.3}
    rows = rows_of([make_run(tmp_path, "norm", seed, [70.0] * 239 + [ours[seed]], **PAIR) for seed in ours])
    assert "| 76.49 | within (best) |" in pages.make_report(rows)
    assert "paper 76.49: within (best)" in pages.make_grid_report(rows)
    assert "within (best)" in pages.as_html(rows, {})


def test_what_was_trained_otherwise_is_not_judged_by_a_paper(tmp_path):
    other = {"epochs": 2, "holdout": 500, "learning_rate": 0.1}
    rows = rows_of([make_run(tmp_path, "norm", seed, [70.0, 76.0], **PAIR, **other) for seed in (1, 2)])
    told = "not to be compared: --holdout 500 --epochs 2 --learning_rate 0.1"
    assert f"| 76.49 | {told} |" in pages.make_report(rows)
    assert f"paper 76.49: {told}" in pages.make_grid_report(rows)


def test_csv_has_a_line_per_run(runs):
    lines = list(csv.DictReader(io.StringIO(pages.as_csv(rows_of(runs)))))
    assert len(lines) == len(runs)
    assert [line["accuracy_last"] for line in lines if line["method"] == "kd"] == ["61.0", "62.0", "63.0"]
    assert lines[1]["settings"].startswith("'--distill ") and lines[1]["holdout_accuracy"] == ""


def test_no_cell_is_a_formula_and_none_breaks_its_table(tmp_path):
    run = make_run(tmp_path, "ce", 1, [50.0], None, dataset="folder", data="/x/a|b\n$c_1$", init="@sum|x $y$")
    run = run.rename(tmp_path / "=cmd")
    rows = rows_of([run])
    lines = pages.make_table(rows).splitlines()
    assert len(lines) == 3 and r"ce --init @sum\|x $y$" in lines[2]
    [line] = csv.DictReader(io.StringIO(pages.as_csv(rows)))
    assert line["run"] == "'=cmd"
    assert [pages.in_csv(cell) for cell in ("+1", "-1", "@a", -1.0, "a=b")] == ["'+1", "'-1", "'@a", -1.0, "a=b"]
    assert "<svg" in pages.as_html(rows, {}), "$ begins no formula"
    assert pages.in_markdown("a|b \\| c\\d") == "a\\|b \\\\\\| c\\d", "a backslash before a bar would free it"


def test_a_mean_of_fewer_than_five_epochs_is_said_to_be_one(tmp_path, capsys):
    long = make_run(tmp_path, "kd", 1, [50.0] * 5)
    short = make_run(tmp_path, "norm", 1, [50.0, 60.0])
    note = "Mean of last five: of all epochs where a run has fewer."
    for folders, count in (([long], 0), ([long, short], 1)):
        rows = rows_of(folders)
        pages.show_table(folders)
        for text in (pages.make_report(rows), pages.make_grid_report(rows), pages.as_html(rows, {})):
            assert text.count(note) == count
        assert capsys.readouterr().out.count(note) == count


def test_a_deviation_that_leaves_the_order_of_the_images_out_is_said_to(tmp_path):
    kd = [make_run(tmp_path, "kd", seed, [50.0 + seed] * 5, data_seed=1) for seed in (1, 2)]
    ce = [make_run(tmp_path, "ce", seed, [40.0 + seed] * 5, None) for seed in (1, 2)]
    norm = [make_run(tmp_path, "norm", seed, [50.0 + seed] * 5) for seed in (1, 2)]
    cases = ((ce, None), (kd[:1], None), (kd, "all rows"), (ce + kd, "rows with a teacher"), (norm + kd, "kd"))
    for folders, of in cases:
        rows = rows_of(folders)
        for text in (pages.make_report(rows), pages.make_comparison(rows), pages.summary(folders)):
            assert ("share the\norder" in text) == (of is not None)
            assert of is None or f"The seeds of {of} share the\norder" in text
