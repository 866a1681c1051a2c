"""What the tests share: small runs on the embedded digits, and a command line that is called in process."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train_cifar_student
import train_teacher
from dataset import DATASETS, Batch, Images
from errors import UserError
from helper import inputs, run
from helper.recipes import CIFAR_PAIRS
from models import build_model
from tests.forks import Server
from tests.run_folders import new_run

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
#: Networks that train in a blink, on 32x32 images.
TEACHER, STUDENT = "resnet14", "resnet8"
WHOLE_DIGITS = DATASETS["digits"]


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_test_images() -> Iterator[None]:
    """Hold 73 of the digits' 364 test images: most of a short run would be the tests of its teacher and student."""

    def few(*arguments):
        data = WHOLE_DIGITS(*arguments)
        return data._replace(test=Images(*(part[::5] for part in data.test)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", few)
        yield


@pytest.fixture
def whole_digits(monkeypatch):
    """Every test image of the digits, as processes of their own read them."""
    monkeypatch.setitem(DATASETS, "digits", WHOLE_DIGITS)


def keep_images(monkeypatch, train: int | None = None, test: int | None = None) -> None:
    """Let runs read only the first `train` and `test` images; None: all of them."""
    load_data = inputs.load_data

    def load_few(*arguments, **named):
        data = load_data(*arguments, **named)
        return data._replace(
            train=Images(*(part[:train] for part in data.train)), test=Images(*(part[:test] for part in data.test))
        )

    monkeypatch.setattr(inputs, "load_data", load_few)


@pytest.fixture
def few_images(monkeypatch):
    """Train on 32 of the digits, so that an epoch is four steps of 8."""
    keep_images(monkeypatch, train=32)


@pytest.fixture
def save_dir(tmp_path) -> Path:
    return tmp_path / "save"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Of processes of scripts."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory) -> Path:
    """The run folder of a teacher that was trained for one short epoch on the digits."""
    root = tmp_path_factory.mktemp("teacher")
    train_teacher.main(["--model", TEACHER, "--epochs", "1", "--max_steps", "4", "--save_dir", str(root)])
    return next(root.iterdir())


@pytest.fixture
def distil(teacher_run, save_dir):
    """Call `train_cifar_student.py` with the small teacher; returns the run folder, the newest."""

    def call(*flags: str, distill: str = "norm", student: str = STUDENT, teacher: bool = True) -> Path:
        argv = ["--distill", distill, "--model_s", student, *flags]
        argv += ["--path_t", str(teacher_run / "last.pth")] if teacher else []
        return new_run(train_cifar_student.main, save_dir, *argv)

    return call


@contextmanager
def killed_within_an_epoch() -> Iterator[None]:
    """Within this block a run is killed as soon as the second step of its second epoch is saved, if it is to be."""
    save = run.Run.save_within_epoch

    def save_then_stop(self, number, stopping):
        save(self, number, stopping)
        if (self.epoch, number) == (1, 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "save_within_epoch", save_then_stop)
        yield


@contextmanager
def killed(saved_epochs: int = 1) -> Iterator[None]:
    """Within this block a run is killed as soon as `saved_epochs` of its epochs are saved."""
    save, saved = run.Run._save, []

    def save_then_stop(self, record):
        save(self, record)
        saved.append(record)
        if len(saved) == saved_epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "_save", save_then_stop)
        yield


def message_of(main, argv: list[str]) -> str:
    """The one-line message with which a script refuses a command line."""
    with pytest.raises(UserError) as caught:
        main(argv)
    message = str(caught.value)
    assert "\n" not in message, "a message is one line"
    return message


def make_batch(n: int = 4) -> Batch:
    """Random images and classes."""
    return Batch(torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,)), torch.arange(n))


def pair_networks(teacher: str, student: str, num_classes: int = 10):
    """Freshly built teacher (eval mode) and student."""
    return build_model(teacher, num_classes).eval(), build_model(student, num_classes)


def slow_but(cases: Iterable, *quick) -> list:
    """Cases of a test of which --fast runs `quick` alone; the others are marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list) -> None:
    """Of a test's cases --fast runs the number that `quick` says, spread over all of them; the others are slow."""
    cases: dict[tuple, list] = {}
    for item in items:
        if item.get_closest_marker("quick"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    for same in cases.values():
        (number,) = same[0].get_closest_marker("quick").args
        chosen = {len(same) * each // number for each in range(number)}
        for place, item in enumerate(same):
            if place not in chosen:
                item.add_marker(pytest.mark.slow)


#: One family, and two networks whose last maps differ.
QUICK_PAIRS = (("resnet56", "resnet20"), ("wrn_40_2", "ShuffleV1"))


@pytest.fixture(params=slow_but(CIFAR_PAIRS, *QUICK_PAIRS), ids="->".join)
def cifar_pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has made a graph of, one entry per compilation; graphs are run as they are."""
    made = []

    def backend(graph, _, **options):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()
