"""The fast path: what it chooses, that it is the same training, that it repeats itself."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch

import train_cifar_student
from distiller_zoo import Task, find_distiller
from helper import fast, settings
from helper.command_line import parse, resolve, teacher_parser
from helper.networks import Network
from helper.teacher import Teacher
from models import build_model
from scripts import export_student
from tests.conftest import ROOT, killed
from tests.run_folders import config_of, load, metrics, same_state, weights
from tests.stages import few_images

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


@pytest.mark.parametrize("folds", [False, True])
def test_a_teacher_in_bfloat16_shows_what_it_shows_in_float32(folds):
    loaded, images = Network("x.pth", "resnet8", build_model("resnet8", 10).eval(), 10), torch.randn(4, 3, 32, 32)
    plain, quick = (
        Teacher(loaded, few_images(10), None, chosen, torch.device("cpu")).predict(images)
        for chosen in (fast.Fast(), fast.Fast(precision="bfloat16", fold_teacher=folds))
    )
    assert (plain.dtype, quick.dtype) == (torch.float32, torch.bfloat16)
    assert (quick.float() - plain).norm() < 0.05 * plain.norm()


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


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_the_gradient_of_the_pooled_map_has_the_layout_of_the_map(name):
    method = find_distiller("ce")(build_model(name, 10), None, Task(10, 32, 2, torch.arange(2))).eval()
    plain, chosen = copy.deepcopy(method), fast.Fast(channels_last=True)
    chosen.prepare_student(method, torch.device("cpu"))
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    output = chosen.passing(method, method.respond)(chosen.lay_out(images), None)
    seen = []
    output.activated.register_hook(seen.append)
    output.logits.square().sum().backward()
    plain.respond(images, None).logits.square().sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(method.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


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
