"""Which runs share a row of a table, what rows are called, which folders are left out."""

import json
import os
import shutil

import pytest

from distiller_zoo import DISTILLERS, Flag
from errors import UserError
from helper import command_line
from helper.command_line import resolve, student_parser
from helper.tables import published, rows
from helper.tables.published import Published, judge
from helper.tables.records import find_folders
from helper.tables.rows import flags_of, read_rows
from setting import count
from tests.run_folders import make_run

IMAGENET = {"model_s": "resnet18", "dataset": "imagenet"}


def edit(run, **changed) -> None:
    """Change settings of a run folder; None removes one."""
    path = run / "config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def labels(runs) -> list[str]:
    return [row.label for row in read_rows(runs)[0]]


@pytest.fixture
def runs(tmp_path):
    """Three seeds of KD."""
    return [make_run(tmp_path, "kd", seed, [50.0, 61.0, 60.0 + seed]) for seed in (1, 2, 3)]


def test_a_row_is_what_differs_in_seeds_alone(runs):
    [row], left = read_rows(runs)
    assert row.values("accuracy_last") == [61.0, 62.0, 63.0] and not left
    assert rows.spread(row.values("accuracy_last")) == "62.00 ± 1.00" and row.images_per_s == 100.0


def test_rows_of_a_method_are_together_in_the_order_of_their_numbers(tmp_path):
    made = [make_run(tmp_path, "norm", 1, [50.0], co_sponge=n) for n in (16, 8, 4)]
    made += [make_run(tmp_path, "kd", 1, [50.0]), make_run(tmp_path, "norm", 1, [50.0], co_sponge=2)]
    made += [make_run(tmp_path, "ce", 1, [50.0], None)]
    assert labels(made) == ["ce", "norm", "norm -s 2", "norm -s 4", "norm -s 16", "kd"]


def test_a_row_is_named_by_flags_as_they_are_written(tmp_path):
    usual = make_run(tmp_path, "mlkd", 1, [50.0])  # its temperatures are a list in config.json
    other = make_run(tmp_path, "mlkd", 2, [50.0], mlkd_temperatures=(2.0, 5.0), logit_standardization=True)
    assert labels([usual, other]) == ["mlkd", "mlkd --mlkd_temperatures 2,5 --logit_standardization"]


def test_a_row_is_named_by_a_switch_that_is_off_where_it_is_usually_on(tmp_path, monkeypatch):
    own = (
        Flag(("--centre",), bool, True, "a switch that is on"),
        Flag(("--layer",), count, None, "may be absent"),
    )
    monkeypatch.setattr(DISTILLERS["kd"], "flags", (*DISTILLERS["kd"].flags, *own))
    usual, other = make_run(tmp_path, "kd", 1, [50.0]), make_run(tmp_path, "kd", 2, [50.0], centre=False)
    assert labels([usual]) == ["kd"] and labels([other]) == ["kd --no-centre"]
    for run, switch in ((usual, "--centre"), (other, "--no-centre")):
        [row], _ = read_rows([run])
        texts = flags_of(row.records[0])
        assert switch in texts and not any("--layer" in text for text in texts)


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_settings_of_a_row_can_be_given_again(name, tmp_path):
    teacher = "resnet20" if DISTILLERS[name].reads_teacher else None
    [row], _ = read_rows([make_run(tmp_path, name, 1, [50.0], teacher)])
    words = " ".join(flags_of(row.records[0])).split()
    given = vars(student_parser().parse_args(words))
    for flag in DISTILLERS[name].flags:
        if given[flag.argument] is not None:  # else it has no effect
            assert given[flag.argument] == row.config[flag.argument], flag.argument
    resolve(command_line.parse(student_parser(), words).runs[0], of_teacher={"path_t": "t"})
    assert (given["distill"], given["model_t"], given["model_s"]) == (name, row.config["model_t"], "resnet8")


def test_what_is_unusual_is_among_the_settings(tmp_path):
    run = make_run(tmp_path, "kd", 1, [50.0], max_steps=20, momentum=0.5, lr_decay_epochs=(1,), num_workers=9)
    [row], _ = read_rows([run])
    assert "--learning_rate 0.05 --lr_decay_epochs 1 --momentum 0.5 --max_steps 20" in " ".join(
        flags_of(row.records[0])
    )
    assert "workers" not in " ".join(flags_of(row.records[0]))
    changed = {"holdout": 50, "image_size": 64, "decay_norms": False, "mixup": 0.2, "balanced_sampling": True}
    [row] = read_rows([make_run(tmp_path / "x", "kd", 1, [50.0, 60.0], data="/x", **changed)])[0]
    written = " ".join(flags_of(row.records[0]))
    for text in ("--holdout 50", "--image_size 64", "--no-decay_norms", "--mixup 0.2", "--balanced_sampling"):
        assert text in written, text
    assert "--data" not in written


def test_how_a_teacher_is_shown_images_is_among_the_settings(tmp_path):
    flags = {"cache_teacher": "/x", "cache_top_k": 5, "teacher_image_size": 64, "teacher_classes": "a,b"}
    run = make_run(tmp_path, "kd", 1, [50.0], **flags)
    edit(run, images_per_pass=16, weights_digest="1" * 32)
    [row], _ = read_rows([run])
    written = flags_of(row.records[0])
    for text in ("--cache_top_k 5", "--teacher_image_size 64", "--teacher_classes a,b", "images_per_pass 16"):
        assert text in written, text
    assert "weights 11111111" in written and not any(text.startswith(("teacher ", "--path_t")) for text in written)


def test_runs_that_stop_early_are_of_the_setting_that_they_had(tmp_path):
    planned = {"patience": 2, "holdout": 10}
    runs = [make_run(tmp_path, "kd", n, [50.0] * n, **planned) for n in (3, 5)]
    runs.append(make_run(tmp_path, "norm", 1, [50.0] * 20, **planned))
    for run in runs[:2]:
        edit(run, epochs=20, lr_decay_epochs=(12, 15, 18))
    kd, norm = read_rows(runs)[0]
    assert kd.setting == norm.setting and (kd.trained, norm.trained) == ("3 to 5 of 20", "20")
    assert rows.note_of_few_epochs([kd]) and not rows.note_of_few_epochs([norm])


def test_a_run_that_was_cut_short_is_a_row_of_its_own_and_says_so(tmp_path, runs):
    short = make_run(tmp_path, "kd", 4, [70.0, 70.0, 70.0], max_steps=20)
    assert labels([*runs, short]) == ["kd", "kd --max_steps 20"]
    assert labels([short]) == ["kd --max_steps 20"], "also alone"


def test_a_row_without_a_papers_settings_has_no_papers_value(tmp_path):
    pair = {"teacher": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}
    made = [make_run(tmp_path, "norm", 1, [70.0], **pair), make_run(tmp_path, "norm", 1, [70.0], max_steps=5, **pair)]
    made += [make_run(tmp_path, "norm", 1, [70.0], co_sponge=2, **pair)]
    assert [row.published is not None for row in read_rows(made)[0]] == [True, False, False]


def test_settings_that_change_no_result_split_no_row(runs):
    edit(runs[0], max_broken=20, num_workers=1, print_freq=7, save_dir="elsewhere", max_bad_steps=3, fast="auto")
    assert len(read_rows(runs)[0]) == 1


def test_runs_from_before_larger_students_were_pooled_are_rows_of_the_same_name(tmp_path):
    for seed, choice in enumerate(("refuse", "pool"), 1):
        make_run(tmp_path, "norm", seed, [1.0], larger_student=choice)
    [row], _ = read_rows(tmp_path.iterdir())
    assert row.method == "norm" and len(row.records) == 2


def test_students_of_two_teachers_are_two_rows(tmp_path, runs):
    edit(runs[1], path_t="moved/last.pth")
    assert len(read_rows(runs)[0]) == 1, "the same weights, moved"
    edit(runs[2], teacher_digest="12345678" * 8)
    assert sorted(row.pair for row in read_rows(runs)[0]) == [
        "resnet20 (00000000) -> resnet8",
        "resnet20 (12345678) -> resnet8",
    ]


def test_data_that_were_moved_are_the_same_row(runs):
    edit(runs[0], data="/here/images", data_digest="1" * 32)
    edit(runs[1], data="/there/images", data_digest="1" * 32)
    assert len(read_rows(runs[:2])[0]) == 1
    edit(runs[1], data="/here/images", data_digest="2" * 32)
    assert [row.dataset for row in read_rows(runs[:2])[0]] == ["digits (11111111)", "digits (22222222)"]


def test_older_run_folders_have_the_defaults_of_their_time(tmp_path, runs):
    edit(runs[0], holdout=None, precision=None, fused_optimizer=None, logit_standardization=None, images_per_pass=None)
    assert len(read_rows(runs)[0]) == 1
    half = make_run(tmp_path / "half", "kd", 4, [50.0, 61.0, 62.0], precision="bfloat16")
    assert len(read_rows([*runs, half])[0]) == 2, "it does not match any value of the newer flag"
    edit(runs[0], images_per_pass=16)
    assert len(read_rows(runs)[0]) == 2, "another part of a batch is another BatchNorm"


def test_a_folder_that_is_given_twice_counts_once(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(runs[0])
    same = [runs[0], runs[0].relative_to(tmp_path), tmp_path / "x" / ".." / runs[0].name, tmp_path / "link"]
    (tmp_path / "x").mkdir()
    [row], left = read_rows(same)
    assert len(row.records) == 1 and not left


def test_of_one_seed_the_newest_run_counts(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    again = make_run(tmp_path / "again", "kd", 2, [50.0, 61.0, 70.0])
    os.utime(copy / "result.json", (1, 1))
    os.utime(runs[1] / "result.json", (2, 2))
    [row], left = read_rows([*runs, copy, again])
    assert sorted(record.folder for record in row.records) == sorted([runs[0], again, runs[2]])
    assert [(one.folder, one.reason) for one in left] == [
        (copy, f"the same settings and seed as {runs[0]}, which is newer"),
        (runs[1], f"the same settings and seed as {again}, which is newer"),
    ]


def test_of_two_orders_of_the_images_the_one_left_out_is_said(tmp_path):
    runs = [make_run(tmp_path, "kd", 1, [50.0], data_seed=order) for order in (1, 2)]
    os.utime(runs[0] / "result.json", (1, 1))
    [left] = read_rows(runs)[1]
    assert left.reason == f"the same settings and seed (but --data_seed 1, not 2) as {runs[1]}, which is newer"


def test_rows_that_their_method_does_not_tell_apart_are_told_apart_by_their_settings(tmp_path, runs):
    more = [make_run(tmp_path / "x", "kd", 1, [50.0, 51.0, 33.0], learning_rate=0.2, lr_decay_epochs=(1, 2))]
    more += [make_run(tmp_path / "y", "kd", 1, [50.0, 51.0, 33.0], sync_bn=True)]
    usual = ",".join(map(str, json.loads((runs[0] / "config.json").read_text())["lr_decay_epochs"]))
    assert labels([*runs, *more]) == [
        "kd --no-sync_bn --learning_rate 0.2 --lr_decay_epochs 1,2",
        f"kd --no-sync_bn --learning_rate 0.05 --lr_decay_epochs {usual}",
        f"kd --sync_bn --learning_rate 0.05 --lr_decay_epochs {usual}",
    ]


def test_folders_are_searched_for_runs(tmp_path, runs):
    inner = make_run(tmp_path / "sweeps" / "first", "kd", 7, [50.0, 61.0, 62.0])
    (runs[0] / "copy").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "README.md").touch()
    assert list(find_folders(sorted(tmp_path.iterdir()))) == [*runs, inner]
    with pytest.raises(UserError, match="there is no folder"):
        list(find_folders([tmp_path / "typo"]))


def test_one_bad_run_ends_no_report(tmp_path, runs):
    gone = {"model_s": "resnet9", "distill": "nonesuch", "kd_T": "hot", "epochs": 0}
    for number, (name, value) in enumerate(gone.items(), 11):
        edit(make_run(tmp_path / name, "kd", number, [50.0, 61.0, 62.0]), **{name: value})
    (make_run(tmp_path / "unfinished", "kd", 20, [1.0]) / "result.json").unlink()
    (make_run(tmp_path / "list", "kd", 21, [1.0]) / "config.json").write_text("[" * 100_000)
    [row], left = read_rows([tmp_path])
    reasons = {one.folder.parent.name: one.reason for one in left}
    assert len(row.records) == 3 and set(reasons) == {*gone, "unfinished", "list"}
    assert (
        "resnet9" in reasons["model_s"] and "nonesuch" in reasons["distill"] and reasons["unfinished"] == "not finished"
    )
    with pytest.raises(UserError, match=r"none of the folders holds a finished run; .*not finished"):
        read_rows([tmp_path / "unfinished"])


def test_the_band_is_that_of_a_t_test():
    paper = Published(76.49, "", runs=3)
    assert judge(paper, [76.0]) == "one seed"
    assert judge(paper, [76.4, 76.5, 76.6]) == "within"
    assert judge(paper, [75.4, 75.5, 75.6]) == "below"
    assert judge(paper, [77.4, 77.5, 77.6]) == "above"
    # t(0.975, 2) = 4.303, and the standard deviation 0.1: the band reaches 4.303 * 0.1 * sqrt(2 / 3) = 0.351.
    assert judge(paper, [76.04, 76.14, 76.24]) == "within"
    assert judge(paper, [76.03, 76.13, 76.23]) == "below"


def test_only_the_papers_test_images_are_compared_with_a_paper(tmp_path):
    folders = [make_run(tmp_path, "crd", n, [70.0 + n] * 100, "resnet34", **IMAGENET) for n in (1, 2)]
    for number, verdict in ((50_000, "within (last)"), (3_925, "not to be compared: 3925 test images")):
        for run in folders:
            result = json.loads((run / "result.json").read_text())
            (run / "result.json").write_text(json.dumps(result | {"test_images": number}))
        assert read_rows(folders)[0][0].verdict == verdict


def test_a_teacher_that_was_shown_images_otherwise_is_no_papers(tmp_path):
    run = make_run(tmp_path, "crd", 1, [70.0] * 100, "resnet34", teacher_image_size=160, **IMAGENET)
    assert read_rows([run])[0][0].verdict == "not to be compared: --teacher_image_size 160"


def test_every_published_value_names_its_source_and_something_that_exists():
    for (_, _, _, method), value in published.PUBLISHED.items():
        assert method in DISTILLERS and value.source and value.compared in rows.ACCURACIES
