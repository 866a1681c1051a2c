"""Checkpoints that nobody trusts: no program in a file ends this one, takes its memory or its time, or is run."""

import argparse
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from models import build_model
from models.checkpoints import find_weights, load_weights, read_checkpoint
from models.files import DamagedFile
from tests.conftest import slow_but
from tests.hostile_files import archive, call, name, number, several, storage, stream, tensor, text

GIB = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_but([0, 1], 0))
def test_random_programs_are_read_or_refused_and_end_no_process(tmp_path, seed):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))

    command = [sys.executable, "-m", "tests.hostile_files", str(tmp_path), str(seed), "1000"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert (done.returncode, done.stderr) == (0, "")
    read, refused = map(int, done.stdout.split())
    assert min(read, refused) > 200, "both ends are reached"


def entry(program: bytes) -> bytes:
    """A dictionary with one entry."""
    return b"}" + text("model") + program + b"s"


#: Tuples in tuples: 200,000 levels, and 2**40 leaves that are one.
DEEP = b")" + b"\x85" * 200_000
WIDE = b")" + b"q\x00h\x00\x86" * 40
HUGE = (2**30, 1)

HOSTILE = {
    "objects at an address that the file names": call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"))
    + several(number(1), several(number(1)), call("numpy.dtype", text("O8")), b"\x89", text("AAAAAAAA"))
    + b"b",
    "a deep key": b"}" + DEEP + b"Ns",
    "a wide key": b"}" + WIDE + b"Ns",
    "deep": DEEP,
    "wide": WIDE,
    "a list in itself": b"]q\x00h\x00a",
    "a storage larger than its part": tensor(storage(count=2**30), HUGE, (1, 1)),
    "a storage smaller than its part": tensor(storage(count=8), (2, 4), (4, 1)),
    "a tensor larger than its storage": tensor(storage(), HUGE, (1, 1)),
    "a number repeated a billion times": tensor(storage(), HUGE, (0, 0)),
    "numbers before the storage": tensor(storage(), (4, 4), (4, 1), -1),
    "numbers behind the storage": tensor(storage(), (4, 4), (4, 1), 1),
    "steps backwards": tensor(storage(), (4, 4), (-4, 1), 15),
    "a storage that is not there": tensor(storage(key="1")),
    "a storage by a path": tensor(storage(key="../data.pkl")),
    "a set of anything": call("builtins.set", b"](" + DEEP + b"e"),
    "bytes of bytes": call("_codecs.encode", text("A" * 100), text("hex")),
    "a large array of bytes": call("builtins.bytearray", number(2**31 - 1)),
    "a call": call("posix.system", text("touch harm")),
    "a call of a class": call("subprocess.Popen", text("touch harm")),
    "a name of a name": b"\x8c\x02os" + b"}" + b"\x93" + several(text("touch harm")) + b"R",
    "attributes of a class": name("argparse.Namespace") + several(b"N", b"}" + text("__init__") + b"Ns") + b"b",
    "attributes of a tensor": tensor(storage()) + several(b"N", b"}" + text("data") + b"Ns") + b"b" + b"Nb" + b"b",
    "an operation that torch does not write": b"I1\n",
    "too little on the stack": b"000000b",
}


@pytest.mark.parametrize("container", [archive, stream])
@pytest.mark.parametrize("kind", HOSTILE)
def test_harm_is_refused_or_left_out(tmp_path, monkeypatch, kind, container):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pth"
    path.write_bytes(container(entry(HOSTILE[kind])))
    try:
        read = read_checkpoint(path)
    except DamagedFile as error:
        assert "cannot be read as a checkpoint" in str(error) and len(str(error)) < 400
    else:
        assert kind.startswith(("objects", "attributes")) and set(read) == {"model"}
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pth"]
    assert argparse.Namespace(a=1).a == 1


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path, zeros = tmp_path / "bomb.pth", bytes(1 << 24)
    program = entry(tensor(storage(count=1 << 22), (1 << 22,), (1,)))
    path.write_bytes(archive(program, zeros, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(DamagedFile, match="compressed archive"):
        read_checkpoint(path)
    content = bytearray(archive(entry(tensor(storage()))))
    directory = content.rindex(b"PK\x01\x02")  # the last part's entry: its sizes are 20 bytes behind
    content[directory + 20 : directory + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="larger than the file"):
        read_checkpoint(path)
    path.write_bytes(stream(entry(tensor(storage(count=1 << 30, legacy=True))), count=1 << 30))
    with pytest.raises(DamagedFile, match="larger than the file"):
        read_checkpoint(path)


def content() -> dict:
    """Whatever checkpoints of torch hold, RepDistiller's and the official NORM code's among them."""
    base = torch.arange(24.0)
    return {
        "opt": argparse.Namespace(model_s="resnet8", lr=0.05, lr_decay_epochs=[150, 180], device=None),
        "best_acc": numpy.float64(76.4),
        "numbers": [numpy.float32(0.5), numpy.int64(-3), numpy.bool_(True), numpy.uint8(200), 2**70, -1, 1e300],
        "model": OrderedDict(build_model("resnet8", 10).state_dict()),
        "views": [base[3:9].view(2, 3).T, base[::2], torch.zeros(0, 3), torch.tensor(2.5)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "kinds": [
            torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.half, torch.int8, torch.bool, torch.complex64)
        ],
        "rest": {"set": {1, "a"}, 3: (None, True, b"bytes", b""), ("a", 1): "text \u00e4"},
        "optimizer": torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1, momentum=0.9).state_dict(),
    }


def flatten(value, path=""):
    """Every leaf by its place."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if inner is None:
        return {path: value}
    return {place: leaf for key, part in inner for place, leaf in flatten(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("form", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_what_torch_writes_is_read_as_it_was(tmp_path, form):
    path = tmp_path / "file.pth"
    torch.save(content(), path, **form)
    expected, read = flatten(content()), flatten(read_checkpoint(path, "--path_t"))
    assert read.keys() == expected.keys()
    for place, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert type(read[place]) is torch.Tensor and read[place].dtype == value.dtype
            if "model" not in place:  # those are drawn anew
                assert read[place].stride() == value.stride() and torch.equal(read[place], value.detach())
        else:
            assert read[place] == value and not isinstance(read[place], numpy.generic)


@pytest.mark.parametrize("new", [True, False])
def test_an_old_file_of_repdistiller_is_a_teacher(tmp_path, new):
    network, path = build_model("resnet8x4", 100), tmp_path / "ckpt_epoch_240.pth"
    opt = argparse.Namespace(model="resnet8x4", learning_rate=0.05)
    checkpoint = {"epoch": 240, "model": network.state_dict(), "best_acc": numpy.float64(72.5), "opt": opt}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=new)
    read = read_checkpoint(path)
    assert (read["best_acc"], type(read["best_acc"]), read["opt"]) == (72.5, float, opt)
    again = build_model("resnet8x4", 100)
    load_weights(again, "resnet8x4", find_weights(read, "file"), "file")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
