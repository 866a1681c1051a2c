"""What a script says when it ends: one line, and an exit code."""

import subprocess
import sys

import pytest

from errors import UserError, count_of, first_line, run_script, starting
from tests.conftest import ROOT


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch_size" in message and message.count("\n") == 1


def test_one_thing_has_no_plural():
    said = [count_of(n, thing) for n, thing in ((1, "file"), (0, "file"), (2, "class"), (1000, "entry"))]
    assert said == ["1 file", "0 files", "2 classes", "1000 entries"]


@pytest.mark.parametrize("said, line", [("", "RuntimeError"), ("\n one\ntwo", "one"), ("a" * 300, "a" * 200)])
def test_what_a_library_says_is_cut_to_one_line(said, line):
    assert first_line(RuntimeError(said)) == line


def test_what_is_wrong_with_a_method_of_ones_own_is_one_line_while_a_script_starts(capsys):
    with pytest.raises(SystemExit) as end, starting():
        raise UserError("mine.py: rename it")
    assert end.value.code == 2 and capsys.readouterr().err == "error: mine.py: rename it\n"


def test_a_warning_of_a_library_is_one_line():
    code = "import errors, warnings; errors.run_script(lambda: warnings.warn('no locks:\\n files instead'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: no locks: files instead (<string>:1)\n")
