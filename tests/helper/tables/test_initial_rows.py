"""Runs of other initial weights in tables and plans."""

import json

from helper.command_line import resolve
from helper.tables.plan import Shelf
from helper.tables.rows import read_rows
from tests.run_folders import make_run


def test_runs_of_other_initial_weights_are_other_rows(tmp_path):
    runs = [make_run(tmp_path, "ce", 1, [50.0]), make_run(tmp_path, "ce", 2, [60.0], init="timm:resnet8")]
    rows, _ = read_rows(runs)
    assert sorted(row.label for row in rows) == ["ce", "ce --init timm:resnet8"]


def test_a_plan_takes_no_run_of_other_initial_weights_for_its_own(tmp_path):
    run = make_run(tmp_path, "ce", 1, [50.0], teacher=None)
    flags = {"distill": "ce", "model_s": "resnet8", "trial": "1", "epochs": 1}
    older = json.loads((run / "config.json").read_text())
    older.pop("init")
    (run / "config.json").write_text(json.dumps(older))
    assert Shelf(str(tmp_path)).find(resolve(flags)) == (run, "finished")
    assert Shelf(str(tmp_path)).find(resolve(flags | {"init": "other.pth"}))[1] == "missing"
