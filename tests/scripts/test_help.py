"""What `--help` says of the flags of scripts that train nothing; those of runs are rows of the table of settings."""

import importlib

import pytest

from helper.command_line import Parser

SCRIPTS = ("compare", "evaluate", "export_student", "fetch", "predict", "report", "reproduce")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_a_text_and_its_default(name, monkeypatch):
    arguments, add = [], Parser.add_argument

    def note(parser, *names, **options):
        arguments.append((names, options))
        return add(parser, *names, **options)

    monkeypatch.setattr(Parser, "add_argument", note)
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{name}").main(["--help"])
    assert len(arguments) > 1
    for names, options in arguments:
        text, default = options.get("help", ""), options.get("default")
        assert text, names
        assert default in (None, []) or "-h" in names or str(default) in text, (names, text)
