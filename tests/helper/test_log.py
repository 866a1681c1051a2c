"""The lines of the log."""

from types import SimpleNamespace

import pytest

import train_cifar_student
from helper import run as run_module
from helper.log import describe_batch, format_duration, format_result
from tests.conftest import killed


@pytest.mark.parametrize(
    ("epochs", "mean"),
    [(1, ""), (3, ", mean of the last 3 epochs 40.00 %"), (5, ", mean of the last five epochs 40.00 %")],
)
def test_the_mean_is_of_the_epochs_that_there_were(epochs, mean):
    result = {"accuracy_last": 40.0, "accuracy_best": 50.0, "best_epoch": 1, "protocol": "best on test"}
    line = format_result(result | {"epochs": epochs, "accuracy_mean_last_five": 40.0})
    assert line == f"test accuracy: last 40.00 %, best 50.00 % (epoch 1, best on test){mean}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.6, "5 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (3569, "59 min"),
        (3599, "1 h 0 min"),
        (11_520, "3 h 12 min"),
        (172_790, "2 days 0 h"),
        (187_200, "2 days 4 h"),
    ],
)
def test_how_long_something_takes_is_in_units_to_plan_by(seconds, text):
    assert format_duration(seconds) == text


MEANS = {"loss": 1.0, "loss_ce": 1.0, "data_wait_s": 0.0, "compute_s": 1.0, "images_per_s": 32.0}


@pytest.fixture
def left(monkeypatch, few_images, capsys):
    """What the epochs' lines say of the rest of the run, by a clock by which each lasts as long as is given; nothing is
    computed."""

    def call(main, durations: list[float], *argv) -> list[str]:
        clock, times = SimpleNamespace(now=0.0), iter(durations)

        def train_epoch(runs, teacher, finishing, after_step):
            for run in runs:
                run.begin_epoch()
            for run in runs:
                clock.now += next(times)
                run._means = MEANS
            for run in runs:
                run.end_epoch()

        monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        monkeypatch.setattr(run_module, "train_epoch", train_epoch)
        monkeypatch.setattr(run_module, "evaluate", lambda predict, loader, title: {"test_accuracy": 10.0})
        capsys.readouterr()
        main(*argv)
        lines = [line for line in capsys.readouterr().out.splitlines() if " images/s" in line]
        return [line.partition("images/s")[2].removeprefix(", ") for line in lines]

    return call


SHORT = ("--batch_size", "8", "--epochs")


def test_the_first_epoch_of_a_run_counts_until_there_is_another(distil, left, save_dir):
    def run(*flags):
        return distil(*SHORT, *flags, distill="kd")

    assert left(run, [100, 10, 20, 10], "4") == ["5 min left", "20 s left", "15 s left", ""]
    with killed():
        left(run, [100, 10, 10], "3", "--trial", "cut", "--seed", "1")
    [cut] = [path for path in save_dir.iterdir() if path.name.endswith("cut")]
    assert left(train_cifar_student.main, [70, 10], ["--resume", str(cut)]) == ["70 s left", ""]
    early = ("9", "--holdout", "16", "--patience", "1")
    assert left(run, [10, 10], *early) == ["at most 80 s left", ""]


def test_of_what_max_steps_leaves(distil, left):
    assert left(lambda: distil(*SHORT, "9", "--max_steps", "10"), [10, 20, 10]) == ["15 s left", "10 s left", ""]


def test_every_stage_is_estimated_by_its_own_epochs(distil, left):
    def run(*flags):
        return distil(*SHORT, "2", "--init_epochs", "2", *flags, distill="abound")

    assert left(run, [10, 10, 50, 50]) == ["30 s left", "20 s left", "50 s left", ""]
    assert left(run, [10, 10, 50, 50], "--max_steps", "6") == ["20 s left", "15 s left", "25 s left", ""]


def test_students_of_one_pass_wait_for_each_other(distil, left):
    assert left(lambda: distil(*SHORT, "3", "--trials", "2", distill="kd"), [5.0] * 6) == [
        *("20 s left",) * 2,
        *("10 s left",) * 2,
        *("",) * 2,
    ]


def test_students_that_take_turns_wait_for_each_other(distil, left):
    def run():
        return distil("--epochs", "3", "--sweep", "batch_size=8,16", distill="kd")

    # The first epoch is known alone; then the turn of the other one counts.
    assert left(run, [5.0] * 6) == ["10 s left", "10 s left", "10 s left", "10 s left", "", ""]


@pytest.mark.slow
def test_what_a_last_batch_leaves_out_is_said(distil, few_images):
    """SemCKD needs whole batches: of 32 images 2 make no step, of others one image. DistPro's search has 26."""

    def said(distill, batch_size, *flags):
        run = distil("--epochs", "1", "--max_steps", "1", "--batch_size", batch_size, *flags, distill=distill)
        return [line for line in (run / "log.txt").read_text().splitlines() if "leaves out" in line]

    left_out = (
        "each {}epoch leaves out {} of {} training images, others each time: a last batch needs at least {} images"
    )
    assert said("semckd", "15", "-b", "1") == [left_out.format("", 2, 32, 15)]
    assert said("rkd", "31") == [left_out.format("", 1, 32, 2)]
    assert said("kd", "31") == []
    one_pixel = ("--image_size", "8", "--model_s", "vgg8", "--init_epochs", "1")
    assert said("distpro", "25", *one_pixel) == [left_out.format("search ", 1, 26, 2)]
    assert said("distpro", "31", *one_pixel) == [left_out.format("", 1, 32, 2)]


def test_sync_bn_without_other_processes_is_said_to_change_nothing():
    def said(accumulate, sync_bn):
        return describe_batch(SimpleNamespace(accumulate=accumulate, sync_bn=sync_bn, batch_size=8, learning_rate=0.1))

    assert said(1, False) == "" and said(1, True) == "--sync_bn changes nothing: there is one process"
    assert said(2, False).endswith("BatchNorm over each process's own micro-batch")
    assert said(2, True) == f"{said(2, False)}; {said(1, True)}"
