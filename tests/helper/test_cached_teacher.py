"""A cached teacher: the same weights without the teacher's pass, checked by everything that decides its outputs."""

import json

import numpy
import pytest
import torch
from filelock import FileLock

import train_cifar_student
from dataset import RowCache
from dataset.cache import LOCK
from distiller_zoo import DISTILLERS
from helper.settings import AUGMENTATION, DATA, SETTINGS
from helper.teacher import FrozenTeacher, Teacher
from models import build_model
from tests.conftest import keep_images, message_of
from tests.run_folders import same_state, weights

SHORT = ("--batch_size", "8", "--epochs", "2", "--seed", "3", "--data_seed", "5", "--allow_teacher_gap")


@pytest.fixture(autouse=True)
def _hardly_any_images(teacher_run, monkeypatch):
    keep_images(monkeypatch, train=16, test=16)


@pytest.fixture
def passes(monkeypatch):
    """The images of every forward pass of the teacher in training."""
    seen, teach = [], Teacher.teach

    def count(self, part, *rest):
        seen.append(part.images)
        return teach(self, part, *rest)

    monkeypatch.setattr(Teacher, "teach", count)
    return seen


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("kd", ()),
        ("rkd", ("--precision", "bfloat16")),
        ("sskd", ("--init_epochs", "1", "--epochs", "1")),
        ("kd", ("--mixup", "1", "--augment", "randaugment", "--accumulate", "2")),
    ],
    ids=str,
)
def test_a_run_that_writes_and_one_that_reads_end_in_the_weights_of_one_without(
    method, flags, distil, tmp_path, passes
):
    without = weights(distil(*SHORT, *flags, distill=method))
    count = len(passes)
    passes.clear()
    cache = ("--cache_teacher", str(tmp_path / "cache"))
    assert same_state(without, weights(distil(*SHORT, *flags, *cache, distill=method))) and len(passes) == count
    passes.clear()
    reads = distil(*SHORT, *flags, *cache, distill=method)
    assert same_state(without, weights(reads)) and not passes
    assert "epochs stored whole: 2" in (reads / "log.txt").read_text()


def test_without_augmentation_one_epoch_fills_it_for_every_seed(distil, tmp_path, passes):
    cache = ("--augment", "none", "--cache_teacher", str(tmp_path / "cache"))
    distil(*SHORT, *cache, distill="kd")
    assert len(passes) == 2
    distil(*SHORT[4:6], *SHORT[8:], "--batch_size", "4", "--epochs", "1", "--data_seed", "6", *cache, distill="kd")
    assert len(passes) == 2


def test_other_images_or_another_teacher_are_not_read(distil, tmp_path, passes):
    cache = ("--max_steps", "1", "--cache_teacher", str(tmp_path / "cache"))
    distil(*SHORT, *cache, distill="kd")
    other = distil(*SHORT, *cache, "--data_seed", "6", distill="kd")
    assert (
        len(passes) == 2
        and "the nearest there differs in --data_seed (5 there, 6 here)" in (other / "log.txt").read_text()
    )
    distil(*SHORT, *cache, "--colour_jitter", "0.2", distill="kd")
    distil(*SHORT, *cache, "--precision", "bfloat16", distill="kd")
    assert len(passes) == 4
    descriptions = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/cache.json")]
    assert len(descriptions) == 4 and all(one["teacher_digest"] and one["data_digest"] for one in descriptions)


def test_the_same_weights_in_another_network_are_another_teacher(distil, tmp_path, passes):
    """MobileNetV2 with and without two of its ReLUs, which have no weights."""
    torch.save(build_model("MobileNetV2", 10).state_dict(), tmp_path / "weights.pth")
    flags = ("--path_t", str(tmp_path / "weights.pth"), "--max_steps", "1", "--cache_teacher", str(tmp_path / "cache"))
    for name in ("MobileNetV2", "MobileNetV2_norm"):
        last = distil(*SHORT, *flags, "--model_t", name, distill="kd", teacher=False)
    assert len(passes) == 2
    assert "differs in --model_t (MobileNetV2 there, MobileNetV2_norm here)" in (last / "log.txt").read_text()


def test_a_new_cache_names_the_flags_that_would_read_the_nearest(distil, tmp_path):
    """What only one of two has, such as the seed of an augmentation that the other does not draw, is no difference."""
    cache = ("--max_steps", "1", "--cache_teacher", str(tmp_path / "cache"))
    still = (*SHORT, *cache, "--augment", "none")

    def nearest(*flags: str) -> str:
        log = (distil(*flags, distill="kd") / "log.txt").read_text()
        return log.split("the nearest there differs in ")[-1].split("\n")[0] if "nearest" in log else ""

    assert nearest(*SHORT, *cache) == "", "the first"
    assert nearest(*still) == "--augment (standard there, none here)"
    assert (
        nearest(*still, "--teacher_image_size", "16") == "--teacher_image_size (not given there, 16 here), teacher view"
    )
    for path in (tmp_path / "cache").glob("*/cache.json"):  # as if by a version that knew one name less
        known = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in known.items() if name != "split"}))
        path.parent.rename(path.parent.with_suffix(".older"))
    assert nearest(*still) == "--split (not given there, 0 here)"


def test_whatever_changes_images_is_in_the_description():
    """A new setting of the data or the augmentation is marked, or is known to change no pixel of a training image."""
    harmless = {
        "data",
        "data_probe",
        "stream",
        "num_workers",
        "max_broken",
        "label_smoothing",
        "class_weights",
        "balanced_sampling",
    }
    unmarked = {one.argument for one in SETTINGS if one.group in (DATA, AUGMENTATION) and not one.decides_outputs}
    assert unmarked == harmless


def test_students_of_one_process_share_what_one_of_them_reads(teacher_run, save_dir, tmp_path, passes):
    argv = ["--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8", "--save_dir", str(save_dir), *SHORT]
    argv += ["--max_steps", "1", "--sweep", "distill=kd,pkt", "--cache_teacher", str(tmp_path / "cache")]
    train_cifar_student.main(argv)
    train_cifar_student.main(argv)
    assert len(passes) == 1
    assert {path.suffix for path in (tmp_path / "cache").glob("*/pooled-*")} == {".f32", ".whole"}


def test_top_k_keeps_the_probabilities_of_the_largest_and_spreads_the_rest(distil, tmp_path, passes, monkeypatch):
    shown, call = [], FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, *rest: shown.append(call(self, *rest)) or shown[-1])
    taught, teach = [], train_cifar_student.prepare_teacher

    def remember(*arguments):
        teacher = teach(*arguments)
        shown.clear()
        kept = teacher.teach
        monkeypatch.setattr(teacher, "teach", lambda *rest: taught.append(kept(*rest)) or taught[-1])
        return teacher

    monkeypatch.setattr(train_cifar_student, "prepare_teacher", remember)
    flags = (*SHORT, "--max_steps", "1", "--cache_teacher", str(tmp_path / "cache"), "--cache_top_k", "3")
    first, computed = weights(distil(*flags, distill="kd")), shown[0]
    again = weights(distil(*flags, distill="kd"))
    assert same_state(first, again) and len(passes) == 1, "the run that writes sees what a later one reads"
    own, kept = (logits.softmax(1) for logits in (computed.logits, taught[0].logits))
    values, classes = own.topk(3, 1)
    assert torch.allclose(kept.gather(1, classes), values, atol=1e-6)
    assert torch.allclose(
        kept.scatter(1, classes, -1).sort(1).values[:, 3:], ((1 - values.sum(1)) / 7)[:, None], atol=1e-6
    )
    assert torch.equal(taught[0].logits, taught[1].logits)


def refusal(*flags: str, distill: str = "kd", teacher_run) -> str:
    argv = ["--distill", distill, "--model_s", "resnet8", "--path_t", str(teacher_run / "last.pth"), *flags]
    return message_of(train_cifar_student.main, argv)


def test_what_cannot_be_cached_is_refused(teacher_run, tmp_path):
    cache = ("--cache_teacher", str(tmp_path / "cache"), "--save_dir", str(tmp_path / "save"), "--allow_teacher_gap")
    for name, method in DISTILLERS.items():
        if method.reads_teacher and {"maps", "final", "activated"} & set(method.reads):
            assert f"--distill {name} reads the teacher's feature maps" in refusal(
                *cache, distill=name, teacher_run=teacher_run
            )
    assert "twice in an epoch" in refusal(*cache, "--balanced_sampling", teacher_run=teacher_run)
    assert "has 10 classes" in refusal(*cache, "--cache_top_k", "10", teacher_run=teacher_run)
    assert "without --cache_teacher" in refusal("--cache_top_k", "3", teacher_run=teacher_run)
    (tmp_path / "file").write_text("")
    at_file = ("--cache_teacher", str(tmp_path / "file" / "x"), *cache[2:])
    assert "file is a file; name a folder" in refusal(*at_file, teacher_run=teacher_run)
    assert "compares images of a batch" in refusal(*cache, "--batch_size", "1", distill="rkd", teacher_run=teacher_run)
    assert not any((tmp_path / "save").glob("*")) and not (tmp_path / "cache").exists()


def test_a_killed_writer_leaves_no_row_that_counts(tmp_path):
    index, rows = numpy.arange(4), numpy.ones((4, 3), numpy.float32)
    cache = RowCache(tmp_path / "a", {"x": 1}, 8, "--flag")
    cache.write("logits", 1, index, rows)
    assert numpy.array_equal(cache.read("logits", 1, 3, index), rows)
    cache._lock.release()  # killed: neither flushed nor closed
    later = RowCache(tmp_path / "a", {"x": 1}, 8, "--flag")
    assert later.read("logits", 1, 3, index) is None and later.count_epochs("logits", 3) == 0
    for part in (index, index + 4):
        later.write("logits", 1, part, rows)
    later.close()
    assert later.count_epochs("logits", 3) == 1 and later.read("logits", 1, 3, index) is not None


def test_files_that_are_cut_off_are_written_anew(tmp_path):
    index, rows = numpy.arange(8), numpy.ones((8, 3), numpy.float32)
    cache = RowCache(tmp_path / "a", {"x": 1}, 8, "--flag")
    cache.write("logits", 1, index, rows)
    cache.close()
    with open(tmp_path / "a" / "logits-1.f32", "r+b") as file:
        file.truncate(40)
    assert cache.read("logits", 1, 3, index) is None
    cache.write("logits", 1, index[:4], rows[:4])
    assert cache.read("logits", 1, 3, index) is None, "its flags are cleared too"


def test_one_process_writes_and_others_read_what_is_there(tmp_path):
    index, rows = numpy.arange(4), numpy.ones((4, 3), numpy.float32)
    writer, reader = (RowCache(tmp_path / "a", {"x": 1}, 8, "--flag") for _ in range(2))
    reader._lock = FileLock(tmp_path / "a" / LOCK, is_singleton=False)  # as another process has it
    writer.write("logits", 1, index, rows)
    reader.write("logits", 1, index + 4, rows)
    assert reader.refusal == "another process writes to it"
    writer._open["logits"][1].flush()
    assert numpy.array_equal(reader.read("logits", 1, 3, index), rows)
    assert reader.read("logits", 1, 3, index + 4) is None
    writer.write("logits", 1, index + 4, rows)
    writer.close()
    assert reader.read("logits", 1, 3, index + 4) is not None, "what was written meanwhile"


def test_a_cache_on_record_is_read_and_never_made(distil, tmp_path):
    """What a configuration says leads to no new folder: only a flag does."""
    run, cache = distil(*SHORT, "--cache_teacher", str(tmp_path / "cache"), distill="kd"), tmp_path / "none"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"cache_teacher": str(cache)}))
    message = message_of(train_cifar_student.main, ["--resume", str(run), "--epochs", "3"])
    assert message.startswith(f"the cache on record: there is no folder {cache};") and not cache.exists()
    train_cifar_student.main(["--resume", str(run), "--epochs", "3", "--cache_teacher", str(cache)])
    assert cache.is_dir()
