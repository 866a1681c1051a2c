"""Rows as tables with methods as rows and pairs as columns."""

import json

from helper.tables import pages
from tests.run_folders import make_run, rows_of


def test_the_grid_has_methods_as_rows_and_pairs_as_columns(runs, tmp_path):
    other = make_run(tmp_path / "more", "kd", 1, [50.0, 51.0, 52.0], teacher="resnet14")
    [grid] = pages.make_grids(rows_of([*runs, other]))
    assert grid.pairs == ["resnet20 -> resnet8", "resnet14 -> resnet8"]
    assert grid.methods[:2] == ["teacher", "student alone"] and {"kd", "norm", "norm -s 2"} == set(grid.methods[2:])
    text = pages.grid_markdown(grid)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line}
    assert lines["teacher"] == ["last 80.00<br>best 80.00<br>mean of last five 80.00<br>1 seed", "not run |"]
    assert all("last 44.00" in cell for cell in lines["student alone"])
    assert lines["norm"][1] == "not run |" and "3 seeds" in lines["norm"][0] and "last 52.00" in lines["kd"][1]


def test_rows_with_one_label_are_cells_of_their_own(runs, tmp_path):
    fast = [make_run(tmp_path / "x", "kd", 1, [50.0, 51.0, 33.0], learning_rate=0.2)]
    fast += [make_run(tmp_path / "y", "ce", 1, [50.0, 51.0, 34.0], None, learning_rate=0.2)]
    [grid] = pages.make_grids(rows_of([*runs, *fast]))
    text = pages.grid_markdown(grid)
    expected = {
        "kd --learning_rate 0.05": "last 62.00 ± 1.00",
        "kd --learning_rate 0.2": "last 33.00",
        "student alone --learning_rate 0.05": "last 44.00",
        "student alone --learning_rate 0.2": "last 34.00",
        "norm": "last 67.00 ± 1.00",
    }
    for label, accuracy in expected.items():
        assert f"| {label} | {accuracy}<br>" in text, text


def test_the_teacher_of_a_grid_is_the_one_that_taught(tmp_path):
    teacher = make_run(tmp_path, "ce", 1, [80.0, 81.0, 82.0], None, model_s="resnet20").rename(tmp_path / "longer")
    baseline = make_run(tmp_path, "ce", 1, [40.0, 41.0], None, model_s="resnet20")
    student = make_run(tmp_path, "kd", 1, [60.0, 61.0])
    text = pages.make_grid_report(rows_of([baseline, teacher, student]))
    assert "| teacher --epochs 2 " in text and "| teacher --epochs 3 " in text, "its --path_t names neither"
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"path_t": "/elsewhere/longer/last.pth"}))
    text = pages.make_grid_report(rows_of([baseline, teacher, student]))
    assert "| teacher | last 82.00" in text and "last 41.00" not in text
    assert text.endswith("to no student of a teacher there: resnet20: ce (digits, 2 epochs; best on test).\n")


def test_the_teacher_of_a_grid_is_the_run_that_taught_not_its_seeds(tmp_path):
    seeds = [make_run(tmp_path, "ce", seed, [80.0 + seed], None, model_s="resnet20") for seed in (1, 2, 3)]
    student = make_run(tmp_path, "kd", 1, [60.0], teacher_digest="2" * 16)
    result = json.loads((seeds[1] / "result.json").read_text())
    (seeds[1] / "result.json").write_text(json.dumps(result | {"digest": "2" * 16}))
    [grid] = pages.make_grids(rows_of([*seeds, student]))
    assert grid.cells["teacher", "resnet20 -> resnet8"].values("accuracy_last") == [82.0]
    assert "In none of these tables" not in pages.make_grid_report(rows_of([*seeds, student]))


def test_rows_of_no_pair_are_in_no_grid_and_named(tmp_path):
    runs = [make_run(tmp_path, "ft", 1, [50.0], None), make_run(tmp_path, "kd", 1, [50.0, 60.0])]
    assert "student of a teacher there: resnet8: ft (digits, 1 epoch; best on test)." in pages.make_grid_report(
        rows_of(runs)
    )


def test_an_overview_has_the_pairs_of_all_settings_as_columns(tmp_path):
    runs = [make_run(tmp_path, "kd", seed, [60.0, 60.0 + seed]) for seed in (1, 2)]
    runs += [make_run(tmp_path, "norm", 1, [70.0], "resnet14"), make_run(tmp_path, "ce", 1, [50.0, 51.0], None)]
    assert pages.make_overview(rows_of(runs)).splitlines() == [
        "|  | resnet20 -> resnet8, 2 epochs | resnet14 -> resnet8, 1 epoch |",
        "| -- | -- | -- |",
        "| student alone | 51.00 | not run |",
        "| kd | 61.50 ± 0.71 | not run |",
        "| norm | not run | 70.00 |",
    ]
    runs = [make_run(tmp_path / name, "kd", 1, [60.0], dataset="folder", data=f"/x/{name}") for name in ("a", "b")]
    runs += [make_run(tmp_path / "c", "kd", 1, [60.0], dataset="folder", data="/x/a", holdout=9)]
    header = pages.make_overview(rows_of(runs)).splitlines()[0]
    assert header == (
        "|  | resnet20 -> resnet8, 1 epoch, folder a, best on test | resnet20 -> resnet8, 1 epoch, folder b, best on "
        "test | resnet20 -> resnet8, 1 epoch, folder a, best on 9 held-out |"
    )
