"""Command lines and configurations in quantity: either a step is trained, or it is one line for the person at the
terminal; nothing else.

EXAMPLES=2000 in the environment asks for as many of each; docs/reliability.md has the figures.
"""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_cifar_student
from distiller_zoo import DISTILLERS
from helper.settings import all_settings
from tests.drawn import NUMBERS, WORDS, inventory, nothing_is_compiled, often, place, student_of, teacher_of, trains

__all__ = ["nothing_is_compiled", "place"]  # fixtures
pytestmark = pytest.mark.usefixtures("nothing_is_compiled")

# The command line.

FIXED = ("save_dir", "max_steps", "num_workers")
#: Every flag that changes a run, and what several runs are made of; its setting, None where it is none.
FLAGS = {flag.names[-1]: flag for name, flag in all_settings().items() if flag.is_flag and name not in FIXED}
FLAGS["--sweep"] = None
#: Numbers that stand for memory or time are kept small; everything else is drawn at will.
SIZES = {"co_sponge", "nce_k", "branches", "feat_dim", "image_size", "batch_size"}


def values_of(flag):
    argument = "sweep" if flag is None else flag.argument
    if argument in ("data", "path_t"):
        return st.sampled_from(("{images}", "{teacher}", "{file}", "{none}", "/", ""))
    chosen = [st.sampled_from(WORDS)]
    if argument == "distill":
        chosen = [st.sampled_from(sorted(DISTILLERS))] * 4 + chosen
    elif argument in ("model_s", "model_t"):
        chosen = [st.sampled_from(("resnet8", "resnet14", "vgg8", "wrn_16_1", "ShuffleV1", "MobileNetV2"))] * 4 + chosen
    elif argument == "dataset":
        return st.sampled_from(("folder", "digits", "imagenet", ""))
    elif flag is not None and flag.choices:
        chosen = [st.sampled_from(list(map(str, flag.choices)))] * 3 + chosen
    elif argument not in SIZES:
        chosen += [st.integers().map(str), st.floats().map(str), st.text(max_size=5)]
    return st.one_of(st.integers(1, 8).map(str), st.floats(0, 1).map(str), *chosen)


@st.composite
def flags(draw):
    """Up to five flags with values, most of them of the right kind."""
    argv = []
    for name in draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=5)):
        if FLAGS[name] is not None and FLAGS[name].type is bool:
            argv.append(draw(st.sampled_from((name, name.replace("--", "--no-", 1)))))
        else:
            argv += [name, draw(values_of(FLAGS[name]))]
    return argv


@pytest.mark.slow
@often
@given(argv=flags())
def test_any_command_line_trains_or_is_refused_in_one_line(place, argv):
    save_dir = place / "save" / str(next(NUMBERS))
    names = {"images": place / "images", "teacher": teacher_of(place), "file": place / "file", "none": place / "none"}
    known = {"{" + name + "}": str(value) for name, value in names.items()}
    base = ["--model_s", "resnet8", "--distill", "kd", "--path_t", str(teacher_of(place)), "--allow_teacher_gap"]
    before = inventory(place)
    argv = [*base, *(known.get(part, part) for part in argv), "--max_steps", "1", "--save_dir", str(save_dir)]
    trained = trains(train_cifar_student.main, argv)
    assert inventory(place) == before
    written = [path for path in save_dir.glob("*") if path.is_dir()]
    assert len(written) >= 1 if trained else all((path / "log.txt").exists() for path in written)
    shutil.rmtree(save_dir, ignore_errors=True)


# config.json of a run folder that is resumed.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
#: Settings whose large values only cost memory or time.
COSTLY = ("num_workers", "batch_size", "image_size", "max_steps")


@pytest.mark.slow
@often
@given(data=st.data())
def test_any_stored_configuration_goes_on_or_is_refused_in_one_line(place, data):
    run = place / "save" / str(next(NUMBERS)) / "run"
    shutil.copytree(student_of(place), run)
    stored = json.loads((run / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted({*stored} - {*COSTLY})), min_size=1, max_size=3)):
        how = data.draw(st.sampled_from(("other", "gone", "unknown")))
        if how == "gone":
            stored.pop(name, None)
        else:
            outside = [str(place / "outside"), "../../outside", "/proc/outside"]
            stored[name if how == "other" else name + "_"] = data.draw(JSON | st.sampled_from(outside))
    (run / "config.json").write_text(json.dumps(stored))
    before = inventory(place)
    trains(train_cifar_student.main, ["--resume", str(run), "--max_steps", "2", "--epochs", "3"])
    assert inventory(place) == before and [path.name for path in run.parent.iterdir()] == ["run"]
    shutil.rmtree(run.parent)
