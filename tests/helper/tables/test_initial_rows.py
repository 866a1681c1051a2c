"""Runs of other initial weights in tables and plans."""

import json

import pytest
import torch

from helper.command_line import parse, resolve, teacher_parser
from helper.networks import Network
from helper.tables.plan import Plan, Shelf, Variant
from helper.tables.rows import read_rows
from models import build_model
from models.checkpoints import weights_digest
from models.ensemble import Ensemble
from tests.run_folders import make_run


def test_runs_of_other_initial_weights_are_other_rows(tmp_path):
    runs = [make_run(tmp_path, "ce", 1, [50.0]), make_run(tmp_path, "ce", 2, [60.0], init="timm:resnet8")]
    rows, _ = read_rows(runs)
    assert sorted(row.label for row in rows) == ["ce", "ce --init timm:resnet8"]


def test_initial_weights_are_stored_absolute_and_named_by_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, stored in (("save/x/best.pth", f"{tmp_path}/save/x/best.pth"), ("timm:resnet8", "timm:resnet8")):
        [given] = parse(teacher_parser(), ["--model", "resnet8", "--init", source]).runs
        assert given["init"] == stored
    [row], _ = read_rows([make_run(tmp_path, "ce", 1, [50.0], init=f"{tmp_path}/save/x/best.pth")])
    assert row.label == "ce --init x/best.pth"


def test_a_student_of_a_teacher_that_was_a_try_out_is_marked(tmp_path):
    runs = [make_run(tmp_path, "kd", 1, [50.0]), make_run(tmp_path / "tried", "kd", 1, [50.0], kd_T=4.0)]
    config = json.loads((runs[1] / "config.json").read_text())
    found = config | {"teacher_digest": "1" * 64, "teacher_steps": 5}
    (runs[1] / "config.json").write_text(json.dumps(found))
    rows, _ = read_rows(runs)
    assert sorted(row.label for row in rows) == ["kd", "kd teacher --max_steps 5"]


@pytest.mark.parametrize(("steps", "told"), [([5], 5), ([None], None), (["5"], None), ([None, 7, 3], 3)])
def test_a_teacher_tells_for_how_many_steps_it_was_tried(steps, told):
    network = build_model("resnet8", 10)
    each = [Network("t.pth", "resnet8", network, 10, record={"max_steps": one}) for one in steps]
    source = each[0] if len(each) == 1 else each[0]._replace(network=Ensemble([network] * len(each)), members=each)
    assert source.settings_as_teacher()["teacher_steps"] == told


def test_initial_weights_are_told_apart_by_their_digest_wherever_the_file_is(tmp_path):
    origins = [("a.pth", "1"), ("moved/a.pth", "1"), ("a.pth", "2"), ("a.pth", None), ("b.pth", None)]
    runs = [
        make_run(tmp_path, "ce", seed, [50.0], init=path, init_digest=digest and digest * 64)
        for seed, (path, digest) in enumerate(origins)
    ]
    rows, left = read_rows(runs)
    assert not left
    found = {tuple(runs.index(record.folder) for record in row.records): row.apart for row in rows}
    assert found == {(0, 1): "init 11111111", (2,): "init 22222222", (3,): "--init a.pth", (4,): ""}


def test_a_plan_finds_a_run_by_the_digest_of_its_initial_weights(tmp_path):
    weights = tmp_path / "weights.pth"

    def found(digest: str) -> str:
        torch.save({"model": {}, "record": {"digest": digest}}, weights)
        jobs = Plan(str(tmp_path / "save")).jobs(
            [("resnet14", "resnet8")], [Variant("ft", ("--init", str(weights)))], 1
        )
        return next(job for job in jobs if job.config.init)

    job = found("1" * 64)
    assert (job.state, job.config.init_digest) == ("missing", "1" * 64)
    job.folder.mkdir(parents=True)
    stored = job.config.as_json() | {"init": "elsewhere.pth"}
    (job.folder / "config.json").write_text(json.dumps(stored))
    (job.folder / "last.pth").touch()
    assert found("1" * 64).state == "begun"
    assert found("2" * 64).state == "missing"


def test_the_average_of_a_checkpoint_has_a_digest_of_its_own(tmp_path):
    path, weights = tmp_path / "a.pth", build_model("resnet8", 10).state_dict()
    averaged = {name: value + 1 for name, value in weights.items()}
    record = {"model_name": "resnet8", "num_classes": 10, "classes": list("0123456789"), "digest": "1" * 64}
    training = {"config": {}, "distiller": {}, "ema": {}}
    torch.save({"model": weights, "model_ema": averaged, "record": record, "training": training}, path)
    shelf = Shelf(str(tmp_path))
    assert shelf.digest(path, "resnet8") == "1" * 64
    assert shelf.digest(path, "resnet8", ema=True) == weights_digest(averaged)


def test_a_plan_takes_no_run_of_other_initial_weights_for_its_own(tmp_path):
    run = make_run(tmp_path, "ce", 1, [50.0], teacher=None)
    flags = {"distill": "ce", "model_s": "resnet8", "trial": "1", "epochs": 1}
    older = json.loads((run / "config.json").read_text())
    older.pop("init")
    (run / "config.json").write_text(json.dumps(older))
    assert Shelf(str(tmp_path)).find(resolve(flags)) == (run, "finished")
    assert Shelf(str(tmp_path)).find(resolve(flags | {"init": "other.pth"}))[1] == "missing"
