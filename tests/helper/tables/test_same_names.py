"""Data and teachers whose names say less than their digests: other data of a name, the same data renamed, another
teacher of a network."""

import csv
import io

from helper.tables import figures, pages
from helper.tables.rows import Row, read_rows
from tests.run_folders import make_run, rows_of


def of_data(root, distill: str, accuracy: float, data: str, digest: str | None, **flags):
    """Two seeds of a method on a folder of images."""
    own = {"teacher": None} if distill == "ce" else {}
    found = {"dataset": "folder", "data": data, "data_digest": digest and digest * 32} | flags
    return [
        make_run(root / f"{digest}{data}".replace("/", "_"), distill, seed, [accuracy + seed], **own, **found)
        for seed in (1, 2)
    ]


def places(rows: list[Row]) -> list[tuple]:
    """What every output says of where a row belongs, after a check that they agree."""
    listed = [[cell.strip() for cell in line.split(" | ")] for line in pages.make_table(rows).splitlines()[2:]]
    lines = [tuple(line[:4]) for line in csv.reader(io.StringIO(pages.as_csv(rows)))]
    titles = list(figures.groups(rows))
    assert [line[0].removeprefix("| ") for line in listed] == [row.dataset for row in rows]
    assert set(lines[1:]) == {(row.dataset, row.teacher, row.config["model_s"], row.label) for row in rows}
    assert all(any(title.startswith(f"{row.dataset}, ") for title in titles) for row in rows)
    return [(row.dataset, row.teacher, row.label) for row in rows]


def test_folders_of_two_names_are_two_data_sets(tmp_path):
    runs = of_data(tmp_path, "kd", 50.0, "/x/cats", "1") + of_data(tmp_path, "kd", 70.0, "/x/dogs", "2")
    assert places(rows_of(runs)) == [("folder cats", "resnet20", "kd"), ("folder dogs", "resnet20", "kd")]


def test_other_data_of_one_name_are_never_compared(tmp_path):
    runs = of_data(tmp_path, "ce", 50.0, "/x/cats", "1") + of_data(tmp_path, "kd", 70.0, "/y/cats", "2")
    rows = rows_of(runs)
    assert places(rows) == [("folder cats (11111111)", "", "ce"), ("folder cats (22222222)", "resnet20", "kd")]
    assert "p = " not in pages.make_comparison(rows).partition("\n\n")[0]
    assert "| folder cats (22222222) | resnet8 | kd |" in pages.make_comparison(rows)
    assert "student alone" not in pages.make_grid_report(rows)


def test_data_that_were_renamed_are_one_data_set(tmp_path):
    runs = of_data(tmp_path, "ce", 50.0, "/x/cats", "1") + of_data(tmp_path, "kd", 70.0, "/y/tigers", "1")
    rows = rows_of(runs)
    assert places(rows) == [("folder cats", "", "ce"), ("folder cats", "resnet20", "kd")]
    assert "| +20.00 (p = " in pages.make_comparison(rows) and "| student alone |" in pages.make_grid_report(rows)


def test_images_of_another_size_or_of_an_older_run_are_no_other_data(tmp_path):
    runs = of_data(tmp_path, "ce", 50.0, "/x/cats", "1") + of_data(tmp_path, "kd", 70.0, "/x/cats", "2", image_size=64)
    assert [row.dataset for row in rows_of(runs)] == ["folder cats", "folder cats"]
    runs = of_data(tmp_path, "hint", 50.0, "/x/cats", "1") + of_data(tmp_path, "kd", 70.0, "/x/cats", None)
    assert [row.dataset for row in rows_of(runs)] == ["folder cats", "folder cats"]


def test_teachers_of_one_network_are_told_apart_across_methods(tmp_path):
    runs = [make_run(tmp_path, "kd", seed, [50.0 + seed], teacher_digest="1" * 64) for seed in (1, 2)]
    runs += [make_run(tmp_path, "norm", seed, [70.0 + seed], teacher_digest="2" * 64) for seed in (1, 2)]
    rows, _ = read_rows(runs)
    assert places(rows) == [
        ("digits", "resnet20 (11111111)", "kd"),
        ("digits", "resnet20 (22222222)", "norm"),
    ]
    [grid] = pages.make_grids(rows)
    assert grid.pairs == ["resnet20 (11111111) -> resnet8", "resnet20 (22222222) -> resnet8"] and len(grid.cells) == 2
    assert "resnet20 (11111111)" in pages.as_html(rows, {})
    own = [make_run(tmp_path / "own", "kd", seed, [60.0 + seed], teacher_digest="2" * 64) for seed in (1, 2)]
    assert "| resnet20 (22222222) | resnet8 | norm | 2 | 71.50 ± 0.71 | - | +10.00 (p = " in pages.make_comparison(
        rows_of([*runs, *own])
    )
