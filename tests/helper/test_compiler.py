"""Compiled runs: the same training, each part compiled once, and what happens where the compiler fails."""

import copy
import functools
import platform
import shutil
from argparse import Namespace

import pytest
import torch

import train_cifar_student
from dataset import load_data
from distiller_zoo import Progress, Task, find_distiller
from errors import UserError
from helper import fast, inputs, loops
from helper.command_line import resolve
from models import build_model
from tests.conftest import make_batch
from tests.run_folders import config_of, metrics, weights

FLAGS = ("--batch_size", "8", "--max_steps", "4")


pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize(("mode", "number"), [("default", 2), ("reduce-overhead", 3)])
def test_a_compiled_run_is_the_same_and_compiles_each_part_once(distil, graphs, mode, number):
    flags = ("--batch_size", "12", "--epochs", "3")  # the last batch is shorter, NORM's weight changes with the epoch
    plain = distil(*flags)
    assert not graphs
    compiled = distil(*flags, "--compile", mode, "--trial", "compiled", "--seed", "1")
    assert len(graphs) == number, "the teacher's pass, the student's, and what follows them"
    for expected, line in zip(metrics(plain), metrics(compiled), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    states = [weights(run) for run in (plain, compiled)]
    assert list(states[0]) == list(states[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_runs_side_by_side_and_stages_are_compiled(teacher_run, save_dir, graphs):
    flags = ["--path_t", str(teacher_run / "last.pth"), "--save_dir", str(save_dir), "--compile", "default"]
    flags += ["--batch_size", "16", "--max_steps", "2", "--epochs", "1", "--model_s", "resnet14"]
    train_cifar_student.main([*flags, "--sweep", "distill=norm,fsp,simkd"])
    assert len(graphs) >= 4


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_that_may_gather_rows_of_all_processes_are_not_compiled(monkeypatch, processes):
    compiled, data = [], load_data("digits")
    monkeypatch.setattr(loops, "count_processes", lambda: processes)
    monkeypatch.setattr(fast.Fast, "compiled", lambda self, function: compiled.append(function) or function)
    method = find_distiller("ce")(build_model("resnet8", 10), None, Task(10, 32, 8, data.train.targets))
    config = resolve({"distill": "ce", "model_s": "resnet8", "batch_size": 8, "dataset": "digits"})
    training = loops.Training(method.main_stage(2), method, data, config, torch.device("cpu"))
    assert compiled == [method.forward if processes == 1 else method.respond]
    logits, losses = training._compiled(make_batch(8), None, Progress(0, 2), training.stage)
    assert logits.shape == (8, 10) and set(losses) == {"ce"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_rate_of_a_compiled_run_is_one_tensor(monkeypatch, optimizer):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    data = load_data("digits")
    method = find_distiller("ce")(build_model("resnet8", 10), None, Task(10, 32, 8, data.train.targets))
    given = {
        "distill": "ce",
        "model_s": "resnet8",
        "dataset": "digits",
        "optimizer": optimizer,
        "lr_decay": "one_cycle",
    }
    plain = resolve(given | {"fused_optimizer": True})
    weights_after = []
    for config in (plain, plain.replace("a test", compile="default")):
        twin = copy.deepcopy(method)
        training = loops.Training(twin.main_stage(2), twin, data, config, torch.device("cpu"))
        training.progress, (group,), seen = Progress(0, 2), training.optimizer.param_groups, []
        for number in range(2):
            training.go_to(number)
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
            training.optimizer.step()
            seen.append(group["lr"])
        weights_after.append(group["params"][0])
    assert isinstance(seen[0], torch.Tensor) and seen[0] is seen[1]
    assert seen[0].item() == pytest.approx(training.learning_rate(1, 1))
    assert torch.allclose(*weights_after, atol=1e-6) and not torch.equal(weights_after[0], next(method.parameters()))


@pytest.mark.slow
def test_only_a_long_run_is_compiled_by_auto(distil, graphs, monkeypatch):
    flags = ("--batch_size", "12", "--epochs", "3", "--compile", "auto")
    short = distil(*flags)
    assert not graphs and config_of(short)["compile"] == "off"
    monkeypatch.setattr(inputs, "LONG_RUN", 8)  # 3 epochs of 32 images
    assert config_of(distil(*flags, "--trial", "2", "--max_steps", "2"))["compile"] == "off"
    assert not graphs
    assert config_of(distil(*flags, "--trial", "3"))["compile"] == "auto"
    assert len(graphs) == 2, "the teacher's pass and the student's"


@pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("g++"), reason="needs g++")
def test_what_the_compiler_makes_is_tried_in_the_first_run_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tried, instructions = [], Namespace(_arch_flags="-mavx2")
    check = fast._kept(lambda _, code: tried.append(code) or code != "bad")
    assert [check(instructions, code) for code in ("good", "good", "bad", "bad")] == [True, True, False, False]
    instructions._arch_flags = "-mavx512f"
    assert check(instructions, "good") and tried == ["good", "bad", "bad", "good"]
    from torch._inductor.cpu_vec_isa import VecISA

    fast._set_up_compiler()
    kept = VecISA.check_build
    fast._set_up_compiler()
    assert VecISA.check_build is kept


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(graph, inputs):
        raise OSError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_auto_goes_without_a_compiler_that_fails(distil, no_compiler, monkeypatch, capsys):
    plain = distil(*FLAGS)
    monkeypatch.setattr(inputs, "LONG_RUN", 1)
    run = distil(*FLAGS, "--compile", "auto", "--trial", "2", "--seed", "1")
    assert capsys.readouterr().err.count("--compile auto: OSError no compiler; nothing is compiled\n") == 2
    for expected, line in zip(metrics(plain), metrics(run), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_compiler_that_fails_is_one_line(distil, no_compiler):
    with pytest.raises(UserError, match=r"^--compile default: .*no compiler.* --compile off") as caught:
        distil(*FLAGS, "--compile", "default")
    assert "\n" not in str(caught.value)


def test_replayed_graphs_begin_a_step_and_the_teachers_outputs_outlive_it(monkeypatch, distil):
    begun = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    output = build_model("resnet8", 10).outputs(make_batch().images)
    chosen = fast.Fast(compile="reduce-overhead")
    kept, lent = (chosen.compiled(lambda: output, outlives)() for outlives in (True, False))
    assert len(begun) == 2 and lent is output
    for mine, graphs in zip(kept.tensors(), output.tensors(), strict=True):
        assert torch.equal(mine, graphs) and mine.data_ptr() != graphs.data_ptr()
    with pytest.raises(UserError, match="--accumulate"):
        distil(*FLAGS, "--accumulate", "2", "--compile", "reduce-overhead")
