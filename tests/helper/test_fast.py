"""The fast path: what it chooses, that it is the same training, that it repeats itself."""

import copy
import functools
import os
import platform
import subprocess
import sys

import pytest
import torch

import train_cifar_student
from dataset import load_data
from distiller_zoo import Progress, Task, find_distiller
from errors import UserError
from helper import fast, inputs, loops, settings
from helper.command_line import parse, resolve, teacher_parser
from models import build_model
from scripts import export_student
from tests.conftest import ROOT, killed, make_batch
from tests.run_folders import config_of, load, metrics, same_state, weights

FLAGS = ("--batch_size", "8", "--max_steps", "4")


pytestmark = pytest.mark.usefixtures("few_images")


def configure(*argv):
    return resolve(*parse(teacher_parser(), ["--model", "resnet8", *argv]).runs)


def test_auto_is_what_the_device_supports_and_a_flag_wins(monkeypatch):
    off = configure()
    assert fast.Fast.of(off) == fast.Fast() and off.origins["precision"] == "default"
    monkeypatch.setattr(settings, "computes_bfloat16", lambda device: True)
    for has_units, mode in ((False, "off"), (True, "auto")):
        monkeypatch.setattr(settings, "has_matrix_units", lambda device, has_units=has_units: has_units)
        auto = configure("--fast", "auto")
        assert fast.Fast.of(auto) == fast.Fast("bfloat16", True, True, True, mode)
    assert auto.origins["precision"] == "--fast auto"
    some = configure("--fast", "auto", "--precision", "float32", "--no-channels_last")
    assert fast.Fast.of(some) == fast.Fast("float32", False, True, True, "auto")
    assert configure("--fold_teacher").fold_teacher and not configure("--fold_teacher").channels_last
    monkeypatch.setattr(settings, "computes_bfloat16", lambda device: False)
    assert configure("--fast", "auto").precision == "float32"


@pytest.mark.quick(1)
@pytest.mark.parametrize("parts", [("--channels_last", "--fold_teacher", "--fused_optimizer"), ("--fast", "auto")])
@pytest.mark.parametrize("distill", ["norm", "kd"])
def test_fast_and_plain_learn_the_same(distil, distill, parts):
    plain, quick = (metrics(distil(*FLAGS, *flags, distill=distill))[0] for flags in ((), parts))
    closeness = 0.03 if "auto" in parts else 2e-3  # bfloat16 has eight bits
    for name in plain:
        if name.startswith("loss"):
            assert quick[name] == pytest.approx(plain[name], rel=closeness), name


def test_a_fast_run_repeats_itself_and_its_student_is_float32(distil):
    runs = [distil(*FLAGS, "--fast", "auto") for _ in range(2)]
    states = [weights(run) for run in runs]
    assert same_state(*states)
    for saved in (states[0], load(runs[0] / "last.pth")["model"]):
        assert all(value.dtype != torch.bfloat16 for value in saved.values())
    exported = load(export_student.main([str(runs[0] / "last.pth")]))
    assert all(value.dtype in (torch.float32, torch.int64) for value in exported["model"].values())


def test_a_fast_run_goes_on_as_it_was(distil):
    flags = ("--batch_size", "8", "--epochs", "2", "--fast", "auto")
    whole = distil(*flags)
    with killed():
        distil(*flags, "--trial", "cut", "--seed", "1")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    train_cifar_student.main(["--resume", str(cut)])
    assert same_state(weights(whole), weights(cut))
    assert config_of(cut)["fast"] == "auto"


def test_deterministic_chooses_the_kernels_of_this_run_and_changes_nothing_on_a_cpu(distil, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    repeated = distil(*FLAGS, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    plain = distil(*FLAGS)
    assert not torch.are_deterministic_algorithms_enabled()
    assert same_state(weights(repeated), weights(plain))


def test_the_teacher_is_folded_in_the_run_only(distil, monkeypatch):
    folded = []
    monkeypatch.setattr(fast, "fold_batch_norms", lambda network, size: folded.append(network) or network)
    distil(*FLAGS)
    assert not folded
    distil(*FLAGS, "--fold_teacher")
    assert len(folded) == 1


def test_depthwise_convolutions_stay_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(fast, "has_matrix_units", lambda device: False)
    student, images = build_model("ShuffleV2", 10), torch.randn(2, 3, 32, 32)
    keys, plain = list(student.state_dict()), student.eval()(images)
    quick = fast.Fast(precision="bfloat16").prepare_student(copy.deepcopy(student), torch.device("cpu"))
    depthwise = [layer for layer in quick.modules() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1]
    assert depthwise and all(isinstance(layer, fast.Float32Convolution) for layer in depthwise)
    x = torch.randn(2, depthwise[0].in_channels, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, out = quick(images), depthwise[0](x)
    exact = depthwise[0](x.float())
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16()) and exact.dtype == torch.float32
    assert torch.allclose(logits.float(), plain, atol=0.1 * plain.abs().max().item())
    assert list(quick.state_dict()) == keys
    monkeypatch.setattr(fast, "has_matrix_units", lambda device: True)
    same = fast.Fast(precision="bfloat16").prepare_student(copy.deepcopy(student), torch.device("cpu"))
    layers = [layer for layer in same.modules() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1]
    assert {layer.stride for layer in layers if isinstance(layer, fast.Float32Convolution)} == {(2, 2)}
    assert {layer.stride for layer in layers if not isinstance(layer, fast.Float32Convolution)} == {(1, 1)}


def gradients(method, respond, chosen):
    method.zero_grad()
    with chosen.autocast(torch.device("cpu")):
        output = respond(torch.ones(2, 3, 32, 32), None)
    output.logits.float().square().sum().backward()
    return {name: value.grad for name, value in method.named_parameters()}, output.logits


def test_weights_converted_at_once_are_those_that_autocast_converts():
    chosen = fast.Fast(precision="bfloat16", fused_optimizer=True)
    method = find_distiller("ce")(build_model("resnet8", 10), None, Task(10, 32, 2, torch.arange(2)))
    twin = copy.deepcopy(method)
    (plain, expected), (quick, found) = (
        gradients(method, method.respond, chosen),
        gradients(twin, chosen.passing(twin, twin.respond), chosen),
    )
    assert torch.equal(expected, found) and found.dtype == torch.bfloat16
    for name, gradient in plain.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, quick[name]), name
    assert same_state(method.state_dict(), twin.state_dict())  # running statistics and numbers of batches too
    assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())


def test_a_pass_that_fails_leaves_the_numbers_of_batches_in_place():
    method = find_distiller("ce")(build_model("resnet8", 10), None, Task(10, 32, 2, torch.arange(2)))
    respond = fast.Fast(fused_optimizer=True).passing(method, method.respond)
    keys = list(method.state_dict())
    with pytest.raises(RuntimeError):
        respond(torch.ones(2, 5, 32, 32), None)
    assert list(method.state_dict()) == keys


def test_the_plain_path_is_the_methods_own_pass():
    method = find_distiller("ce")(build_model("resnet8", 10), None, Task(10, 32, 2, torch.arange(2)))
    assert fast.Fast().passing(method, method.respond) == method.respond


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such choice")
def test_memory_that_is_freed_is_kept_for_the_next_step():
    program = """
import resource, torch
from helper import fast
fast.keep_freed_memory(torch.device("cpu"))
for _ in range(20):  # glibc joins free pieces after some steps
    torch.ones(2**25)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**25)
new_pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert new_pages < 0.1 * 2**27 / resource.getpagesize(), new_pages
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)  # a process whose memory is not in pieces


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
    assert torch._inductor.config.cpp.vec_isa_ok, "programs would be started to try what the compiler makes"


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
