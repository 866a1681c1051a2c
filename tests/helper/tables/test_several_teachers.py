"""Plans of students that several teachers teach: --pairs A+B:STUDENT."""

import itertools

import pytest
import torch

from errors import UserError
from helper.networks import digest_together, read_teacher
from helper.tables import jobs
from helper.tables.plan import Plan, Shelf, Variant, read_pairs, read_variants
from models import build_model
from tests.run_folders import pretend

PAIRS = (("resnet14+resnet20", "resnet8"),)
ROWS = "norm; norm --teacher_weights 3,1; ft"


@pytest.fixture
def digests(monkeypatch) -> list[str]:
    """What stands for the digests of the two teachers' weights."""
    monkeypatch.setattr(Shelf, "digest", lambda self, path, name, flag="", ema=False: f"digest of {name}")
    return ["digest of resnet14", "digest of resnet20"]


def listed(save_dir, rows: str = ROWS, pairs=PAIRS):
    return Plan(str(save_dir)).jobs(pairs, read_variants(rows), 1)


def test_teachers_come_before_their_student(tmp_path, digests):
    first, second, _, equal, weighted, ft = listed(tmp_path)
    assert [job.row for job in (first, second)] == [f"{name} with labels alone" for name in ("resnet14", "resnet20")]
    assert [teacher.key for teacher in equal.teachers] == [first.key, second.key] and ft.teachers == []
    flags = dict(itertools.pairwise(equal.command))
    assert flags["--path_t"] == ",".join(str(job.folder / "last.pth") for job in (first, second))
    assert equal.folder.name == "digits_norm_resnet14+resnet20_resnet8_trial1"
    assert (equal.config.teacher_weights, weighted.config.teacher_weights) == ((0.5, 0.5), (0.75, 0.25))


def test_a_student_is_finished_once_all_its_teachers_are(tmp_path, digests):
    first, second, _, equal, weighted, _ = listed(tmp_path)
    for job in (equal, weighted):
        pretend(job, "result.json", teacher_digest=digest_together(digests, equal.config.teacher_weights))
    for teacher, states in ((first, ["missing", "missing"]), (second, ["finished", "missing"])):
        pretend(teacher, "result.json")
        assert [job.state for job in listed(tmp_path)[3:5]] == states


def test_a_student_waits_for_all_its_teachers_and_fails_with_any(tmp_path, digests, monkeypatch):
    plan = Plan(str(tmp_path))
    started = []

    def start(job, place, log):
        started.append(job.title)
        failed = job.config.model_s == "resnet20"
        if not failed:
            pretend(job, "result.json")
        return type("Process", (), {"wait": lambda _: 2 if failed else 0})()

    monkeypatch.setattr(jobs, "_start", start)
    failures = jobs.run_jobs(plan.jobs(PAIRS, read_variants("norm"), 1), [{}], plan.shelf)
    assert len(started) == 3 and not any("norm" in title for title in started)
    assert "its teacher failed" in failures.values() and len(failures) == 2


def test_several_teachers_are_refused_where_the_run_would_refuse_them(tmp_path):
    plan = Plan(str(tmp_path))
    plan.jobs(PAIRS, read_variants("simkd"), 1)
    assert "several teachers have no classifier in common" in plan.inapplicable[0][1]
    one = (("resnet14", "resnet8"),)
    for pairs, weights, message in ((PAIRS, "1,2,3", "2 networks need 2 weights"), (one, "1,2", "has one teacher")):
        with pytest.raises(UserError, match=f"--teacher_weights: .*{message}"):
            listed(tmp_path, f"norm --teacher_weights {weights}", pairs)


def test_the_digest_of_several_published_teachers_is_the_runs(tmp_path):
    for name in ("resnet14", "resnet20"):
        file = tmp_path / "models" / f"{name}_vanilla" / "ckpt_epoch_240.pth"
        file.parent.mkdir(parents=True)
        torch.save({"model": build_model(name, 100).state_dict()}, file)
    *_, job = Plan(str(tmp_path), "cifar100").jobs(PAIRS, [Variant("norm", ("--teacher_weights", "3,1"))], 1)
    read = read_teacher(job.config.path_t, None, weights=(0.75, 0.25))
    assert job.teachers == [] and job.config.teacher_digest == read.digest


def test_pairs_of_other_libraries_hold_a_colon():
    found = read_pairs("torchvision:resnet34:timm:resnet18,resnet14+timm:resnet10t:resnet8")
    assert found == [("torchvision:resnet34", "timm:resnet18"), ("resnet14+timm:resnet10t", "resnet8")]
