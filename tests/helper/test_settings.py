"""The table of settings: one row is enough, and what tells runs apart follows from it."""

import json

import pytest

import train_teacher
from errors import UserError
from helper import settings
from helper.command_line import parse, resolve, student_parser, teacher_parser
from helper.configuration import check_shared, read_stored, row_key, run_key
from helper.settings import SETTINGS, TRAINING, all_settings
from setting import FILLED_IN, Setting, count
from tests.conftest import message_of
from tests.run_folders import config_of, new_run

SHORT = ("--model", "resnet8", "--batch_size", "8", "--max_steps", "1")
ROW = Setting(("--warmth",), count, 3, "how warm the training is", group=TRAINING)
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture
def add(monkeypatch):
    """Add one row to the table of settings."""

    def add_row(row: Setting = ROW) -> None:
        monkeypatch.setattr(settings, "SETTINGS", (*SETTINGS, row))

    return add_row


@pytest.fixture
def train(save_dir):
    """Call `train_teacher.py`; returns the run folder, the newest."""
    return lambda *flags: new_run(train_teacher.main, save_dir, *SHORT, *flags)


@pytest.mark.parametrize("make", [student_parser, teacher_parser])
def test_a_new_row_is_a_flag_with_its_help_and_default(make, add):
    assert "--warmth" not in make().format_help()
    add()
    line = make().format_help().split("--warmth")[1]
    assert "how warm the training is (3)" in " ".join(line.split())


def test_a_new_row_is_in_config_json_with_its_origin(add, train):
    older = train()
    add()
    default, given = train(), train("--warmth", "5")
    assert "warmth" not in config_of(older)
    assert (config_of(default)["warmth"], config_of(default)["origins"]["warmth"]) == (3, "default")
    assert (config_of(given)["warmth"], config_of(given)["origins"]["warmth"]) == (5, "command line")
    assert "  warmth             5                        (command line)" in (given / "log.txt").read_text()


def test_a_new_row_is_checked_when_a_run_is_resumed(add, train):
    older = train()
    add()
    run = train("--warmth", "5")
    message = message_of(train_teacher.main, ["--resume", str(run), "--warmth", "6"])
    assert f"{run} was run with warmth 5, not 6" in message
    train_teacher.main(["--resume", str(run), "--warmth", "5", "--max_steps", "2"])
    # A run from before there was the row had its default.
    train_teacher.main(["--resume", str(older), "--warmth", "3", "--max_steps", "2"])
    message = message_of(train_teacher.main, ["--resume", str(older), "--warmth", "4", "--max_steps", "2"])
    assert f"{older} was run with warmth 3, not 4" in message
    assert config_of(older)["warmth"] == 3
    add(ROW._replace(resume="free"))
    train_teacher.main(["--resume", str(run), "--warmth", "6", "--max_steps", "3"])
    assert config_of(run)["warmth"] == 6


def test_a_new_row_is_validated_where_it_is_stored(add):
    with pytest.raises(UserError, match="unknown setting 'warmth'"):
        read_stored({"warmth": 4}, "config.json")
    add()
    assert read_stored({"warmth": 4}, "config.json") == {"warmth": 4}
    for wrong in ("hot", 0, None, [], True):
        with pytest.raises(UserError, match=r"config\.json: --warmth"):
            read_stored({"warmth": wrong}, "config.json")


@pytest.mark.parametrize("origins", ["../../outside", 3, [], None, {"epochs": 4}])
def test_stored_origins_that_no_run_wrote_are_refused(origins):
    assert read_stored({"epochs": 4, "origins": {"epochs": "default"}}, "config.json") == {"epochs": 4}
    with pytest.raises(UserError, match=r"config\.json: its origins"):
        read_stored({"epochs": 4, "origins": origins}, "config.json")


def test_a_new_row_can_be_swept_unless_the_runs_share_it(add):
    add()
    runs = parse(teacher_parser(), ["--model", "resnet8", "--sweep", "warmth=2,4"]).runs
    assert [run["warmth"] for run in runs] == [2, 4] and runs[0]["trial"] == "1_warmth2"
    for row in (ROW._replace(shared=True), ROW._replace(tells_apart="none")):
        add(row)
        message = message_of(lambda argv: parse(teacher_parser(), argv), ["--model", "resnet8", "--sweep", "warmth=2"])
        assert "warmth is the same for all runs" in message


def test_runs_of_one_process_agree_in_a_row_that_is_shared(add):
    add(ROW._replace(shared=True))
    configs = [resolve({"distill": "ce", "model_s": "resnet8", "warmth": warmth}) for warmth in (1, 2)]
    with pytest.raises(UserError, match="warmth 1, a new run 2; they cannot train in one process"):
        check_shared(configs)
    check_shared(configs[:1] * 2)


@pytest.mark.parametrize("kind", ["row", "run", "none"])
def test_a_new_row_tells_rows_or_runs_apart_as_it_says(kind, add):
    add(ROW._replace(tells_apart=kind))
    one, other, default = (
        resolve({"distill": "ce", "model_s": "resnet8", "warmth": warmth}).as_json() for warmth in (1, 2, 3)
    )
    assert (row_key(one) != row_key(other)) == (kind == "row")
    assert (run_key(one) != run_key(other)) == (kind != "none")
    older = {name: value for name, value in default.items() if name != "warmth"}
    assert row_key(older) == row_key(default), "a run from before there was the row had its default"


# The table itself.


def test_every_row_is_whole():
    arguments = [setting.argument for setting in SETTINGS]
    assert len(arguments) == len(set(arguments)) and not set(arguments) & {"trials", "sweep", "resume", "origins"}
    for setting in SETTINGS:
        assert setting.help and setting.group, setting.names
        assert setting.resume in ("fixed", "free") and setting.tells_apart in ("row", "run", "none"), setting.names
        assert setting.is_flag == (setting.group != settings.FOUND)


@pytest.mark.parametrize("name", [name for name, one in all_settings().items() if one.is_flag])
def test_every_default_can_be_stored_and_read_again(name):
    setting = all_settings()[name]
    if setting.default is not FILLED_IN:
        assert setting.read(json.loads(json.dumps(setting.default))) == setting.default


def student(**values) -> dict:
    of_teacher = {"path_t": "t.pth", "model_t": "resnet20", "teacher_digest": "a" * 64}
    of_teacher |= {name: values.pop(name) for name in list(values) if name in of_teacher}
    return resolve({"distill": "kd", "model_s": "resnet8", **values}, of_teacher=of_teacher).as_json()


def test_students_of_two_teachers_of_one_architecture_are_two_rows():
    assert row_key(student()) != row_key(student(teacher_digest="b" * 64))
    assert row_key(student()) == row_key(student(path_t="moved.pth")), "the weights count, not where they are stored"


def test_runs_from_before_digests_are_told_apart_by_their_teachers_files():
    older = [{k: v for k, v in student(path_t=path).items() if k != "teacher_digest"} for path in ("a.pth", "b.pth")]
    assert row_key(older[0]) != row_key(older[1]) and row_key(older[0]) != row_key(student())


@pytest.mark.parametrize(
    "values",
    [
        {"max_broken": 20},
        {"max_bad_steps": 4},
        {"num_workers": 7},
        {"channels_last": True},
        {"save_every_steps": 3},
        {"device": "cpu"},
        {"trial": "2", "seed": 1},
        {"trial": "2"},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_splits_no_row(values):
    assert row_key(student()) == row_key(student(**values))


def test_seeds_are_runs_of_one_row():
    assert run_key(student()) != run_key(student(seed=2)) and row_key(student()) == row_key(student(seed=2))
