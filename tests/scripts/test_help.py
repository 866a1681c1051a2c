"""The flags of scripts that train nothing, in `--help` and where a value is wrong; a run's are rows of a table."""

import importlib
import os
import re
from argparse import ArgumentTypeError

import pytest

from errors import UserError
from helper.command_line import Parser
from helper.settings import all_settings
from scripts import evaluate
from setting import file_or_stdout, file_to_write, folder_to_write
from tests.conftest import ROOT, message_of

SCRIPTS = ("compare", "evaluate", "export_student", "fetch", "predict", "report", "reproduce")
#: Every script of Python with flags.
ALL = sorted(
    ".".join(path.relative_to(ROOT / "scripts").with_suffix("").parts)
    for path in (ROOT / "scripts").rglob("*.py")
    if {"def main(argv=None)", "__doc__"} <= set(re.findall(r"def main\(argv=None\)|__doc__", path.read_text()))
)


@pytest.fixture
def arguments_of(monkeypatch):
    """The arguments of a script, as they are given to its parser: names and options."""

    def read(script):
        arguments, add = [], Parser.add_argument

        def note(parser, *names, **options):
            arguments.append((names, options))
            return add(parser, *names, **options)

        monkeypatch.setattr(Parser, "add_argument", note)
        with pytest.raises(SystemExit):
            importlib.import_module(f"scripts.{script}").main(["--help"])
        return arguments

    return read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_a_text_and_its_default(name, arguments_of):
    arguments = arguments_of(name)
    assert len(arguments) > 1
    for names, options in arguments:
        text, default = options.get("help", ""), options.get("default")
        assert text, names
        assert default in (None, []) or "-h" in names or str(default) in text, (names, text)


def refusal(read, text) -> str:
    """What is wrong with a flag's value; argparse itself would say `invalid count value`, our function's name."""
    try:
        read(text)
    except (ArgumentTypeError, UserError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ALL)
def test_every_flag_says_what_it_must_be_and_what_hinders_its_file(name, arguments_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    can_write = os.access
    for names, options in arguments_of(name):
        read = options.get("type")
        for text in ("x", "", "'", "1.5x", "9" * 5000, "nan") if read else ():
            refusal(read, text)
        if options.get("metavar") in ("FILE", "DIR", "TARGET"):
            assert read in (file_to_write, file_or_stdout, folder_to_write), names
            missing = "file/x" if read is folder_to_write else "nodir/x"
            assert refusal(read, missing) and refusal(read, "file" if read is folder_to_write else ".")
            assert read is folder_to_write or "is a device or a pipe" in refusal(read, os.devnull)
            assert (refusal(read, "-") == "") == (read is not file_to_write)
            assert refusal(read, "new") == ""
            monkeypatch.setattr(os, "access", lambda *arguments: False)
            assert "is not writable; name another place" in refusal(read, "new")
            monkeypatch.setattr(os, "access", can_write)


def test_every_flag_of_a_run_says_what_it_must_be():
    for setting in all_settings().values():
        for text in ("x", "", "'", "1.5x", "9" * 5000, "nan") if setting.is_flag else ():
            refusal(setting.type, text)


def test_two_results_are_not_written_to_one_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "x")
    argv = ["network.pth", "--html", str(tmp_path / "link"), "--json", str(tmp_path / "x")]
    assert "argument --html: " in (said := message_of(evaluate.main, argv)) and "link is --json's already" in said
