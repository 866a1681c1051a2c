"""Differences of settings and of accuracies."""

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_ind

from scripts import compare
from tests.conftest import message_of
from tests.run_folders import make_run


def output(capsys, runs) -> str:
    compare.main([str(run) for run in runs])
    return capsys.readouterr().out


def test_a_large_difference_is_beyond_seed_noise_and_settings_are_named(tmp_path, capsys):
    first, second = [70.0, 70.2, 70.1], [72.0, 72.3, 72.1]
    runs = [make_run(tmp_path, "kd", seed, [value]) for seed, value in enumerate(first, 1)]
    runs += [make_run(tmp_path, "norm", seed, [value], ceta=0.0) for seed, value in enumerate(second, 1)]
    printed = output(capsys, runs)
    assert "A: digits, resnet20 -> resnet8: kd; best on test; seeds 1, 2, 3" in printed
    assert "norm -c 0;" in printed
    p = ttest_ind(second, first, equal_var=False).pvalue
    assert f"last               +2.03, p = {p:.3g}: beyond seed noise\n" in printed
    assert "distill                A kd, B norm" in printed and "ceta                   A None, B 0.0" in printed
    assert "seed  " not in printed.split("what differs")[1]


def test_teachers_are_a_difference(tmp_path, capsys):
    runs = [make_run(tmp_path, "kd", seed, [70.0]) for seed in (1, 2)]
    config = json.loads((runs[1] / "config.json").read_text())
    other = {"path_t": "save/longer/last.pth", "teacher_digest": "12345678" * 8, "max_broken": 20}
    (runs[1] / "config.json").write_text(json.dumps(config | other))
    printed = output(capsys, runs).partition("what differs:\n")[2]
    assert printed.splitlines()[0] == (
        f"  teacher                A {Path('t.pth').absolute()} (digest 00000000), "
        f"B {Path('save/longer/last.pth').absolute()} (digest 12345678)"
    )
    assert "max_broken" not in printed


def test_a_bad_folder_is_left_out_by_name(tmp_path, capsys):
    runs = [make_run(tmp_path, distill, 1, [70.0]) for distill in ("kd", "norm", "hint")]
    (runs[2] / "result.json").write_text("[]")
    compare.main([str(run) for run in runs])
    assert f"{runs[2]}: {runs[2] / 'result.json'} holds no record; left out" in capsys.readouterr().err


def test_a_small_difference_is_not(tmp_path, capsys):
    runs = [make_run(tmp_path, "kd", seed, [value]) for seed, value in ((1, 70.0), (2, 71.0), (3, 70.4))]
    runs += [make_run(tmp_path, "norm", seed, [value]) for seed, value in ((1, 70.2), (2, 71.1), (3, 70.6))]
    assert output(capsys, runs).count("not beyond seed noise\n") == 3


def test_too_few_seeds_are_said_to_be(tmp_path, capsys):
    runs = [make_run(tmp_path, "kd", 1, [70.0]), make_run(tmp_path, "norm", 1, [75.0])]
    assert "+5.00: one seed on a side, too few" in output(capsys, runs)
    runs = [*runs, make_run(tmp_path, "kd", 2, [70.5]), make_run(tmp_path, "norm", 2, [75.5])]
    assert "(only 2 seeds on a side)" in output(capsys, runs)
    assert "no spread" in compare.judge([1.0, 1.0], [2.0, 2.0])


def test_runs_of_one_setting_are_no_comparison(tmp_path):
    runs = [make_run(tmp_path, "kd", seed, [70.0]) for seed in (1, 2)]
    assert "RUN: 2 runs of one setting (" in message_of(compare.main, [str(run) for run in runs])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match="none of the folders"):
        compare.main([str(tmp_path / "empty")])


def test_many_groups_are_compared_with_the_references_on_a_line_each(tmp_path, capsys):
    methods = {"ce": 60.0, "kd": 70.0, "hint": 70.1, "dkd": 75.0}
    runs = [
        make_run(tmp_path, distill, seed, [mean + spread], "resnet20" if distill != "ce" else None)
        for distill, mean in methods.items()
        for seed, spread in ((1, 0.0), (2, 0.3))
    ]
    runs += [make_run(tmp_path, "norm", seed, [80.0], co_sponge=n) for n in range(1, 8) for seed in (1, 2)]
    runs += [make_run(tmp_path, "kd", 1, [50.0, 60.0], weight_decay=0.001)]
    printed = output(capsys, runs)
    assert max(map(len, printed.splitlines())) <= 180 and len(printed.splitlines()) < 100
    table = printed.partition("\nagainst B kd ")[2].partition("\n\n")[0].splitlines()
    p = ttest_ind([75.0, 75.3], [70.0, 70.3], equal_var=False).pvalue
    assert any(line.startswith("  E dkd") and f"+5.00 (p = {p:.2g}) *" in line for line in table)
    assert any(line.startswith("  D hint") and "*" not in line for line in table)
    assert len(table) == 11 and "against A ce" in printed and "these are 20 comparisons" in printed
    assert (
        "compared with none (another student, teacher, data set, epochs or protocol, or a reference of none): C"
        in printed
    )
    assert "  epochs                 1 (A B D-L), 2 (C)" in printed and "co_sponge              1 (F), 2 (G)" in printed


def test_without_a_baseline_many_groups_are_compared_with_the_first(tmp_path, capsys):
    runs = [make_run(tmp_path, "norm", seed, [80.0 + n + seed], co_sponge=n) for n in range(1, 5) for seed in (1, 2)]
    printed = output(capsys, runs)
    assert "against A norm -s 1 " in printed and printed.count("\nagainst ") == 1
    assert "  D norm -s 4  +3.00 (p = 0.051)" in printed


def test_there_are_names_for_any_number_of_groups():
    names = compare.letters(800)
    assert (len(set(names)), names[25:28], names[701:703]) == (800, ["Z", "AA", "AB"], ["ZZ", "AAA"])


def test_of_two_baselines_a_group_is_compared_with_the_one_of_its_settings(tmp_path, capsys):
    rows = [("ce", 0.05), ("ce", 0.1), ("norm", 0.05), ("norm", 0.1), ("hint", 0.05)]
    runs = [
        make_run(tmp_path, name, 1, [70.0], "resnet20" if name != "ce" else None, learning_rate=rate)
        for name, rate in rows
    ]
    printed = output(capsys, runs)
    tables = printed.split("\nagainst ")[1:]
    assert [(table.count(" norm "), table.count(" hint ")) for table in tables] == [(1, 0), (1, 1)]
    assert "these are 3 comparisons" in printed and "compared with none" not in printed


def test_kd_of_another_teacher_is_no_reference(tmp_path, capsys):
    rows = [("ce", None), ("kd", "resnet20"), ("norm", "resnet20"), ("kd", "resnet32"), ("norm", "resnet32")]
    runs = [make_run(tmp_path, name, seed, [70.0 + seed], teacher) for name, teacher in rows for seed in (1, 2)]
    printed = output(capsys, runs)
    compared = {part.splitlines()[0].split()[0]: part for part in printed.split("\nagainst ")[1:]}
    assert set(compared) == {"A", "B", "D"} and "compared with none" not in printed
    assert {name: part.count(" norm ") for name, part in compared.items()} == {"A": 2, "B": 1, "D": 1}
    assert "these are 8 comparisons" in printed
