"""Errors that are meant for the person at the terminal, and how a script ends."""

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """A mistake in flags, files or data.

    The message names the flag or file and says what to do. It is always one line: `run_script` prints it without a
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """What an exception of a library says, on one line of at most 200 characters; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def count_of(n: int, thing: str) -> str:
    """How many there are, as a message says it: 1 file, 2 files, 10 classes, 2 entries."""
    plural = re.sub("y$", "ie", thing) + ("es" if thing.endswith("s") else "s")
    return f"{n} {thing if n == 1 else plural}"


@contextmanager
def blamed_on_record(recorded: bool, flag: str, what: str) -> Iterator[None]:
    """What is wrong with a file that a record names, `what`, is not blamed on `flag`, which nobody gave."""
    try:
        yield
    except UserError as error:
        before, _, text = str(error).partition(f"{flag}: ")
        if before or not recorded:
            raise
        hint = "" if flag in text else f"; name another with {flag}"
        raise UserError(f"the {what} on record: {text}{hint}") from None


class UnfitPair(UserError, ValueError):
    """Two networks whose maps a method cannot compare; a `ValueError` too, for scripts that use a loss by itself."""


class Stopped(Exception):
    """A run that was asked to stop by a signal, and has saved what is needed to resume."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class StoppedAtOnce(KeyboardInterrupt):
    """A run that a signal ends wherever it is: raised by the signal's handler, and no `Exception`, so that nothing on
    the way takes it for an error of its own."""

    def __init__(self, signal_number: int, reason: str):
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} ({reason}); resume from the last checkpoint with --resume")
        self.signal_number = signal_number


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports of a script, which take seconds: a Ctrl-C meanwhile is one line, and so is a mistake in a
    method of one's own."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, or what torch says of a GPU's and of the machine's memory."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def _format_warning(message: Warning | str, _category: object, file: str, number: int, _line: object = None) -> str:
    """A library's warning in one line, with its place, and without the line of code that is there."""
    return f"warning: {' '.join(str(message).split())} ({file}:{number})\n"


def run_script(main):
    """Run `main()` as a script.

    A `UserError` becomes one line on stderr and exit code 2; a run that was stopped by a signal exits with 128 + its
    number, as shells and clusters expect (SIGINT 130, SIGTERM 143). A library's warning is one line too.
    """
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):  # no name of a file, and no sign, ends a run on a terminal that lacks it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (Stopped, StoppedAtOnce) as stop:
        _leave(128 + stop.signal_number, stop)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "interrupted")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        needs = "a smaller --batch_size or --image_size needs less"
        print(f"error: out of memory: {needs} ({first_line(error)})", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _leave(code: int, message: object) -> None:
    """End the process at once: what is to be saved is saved, and nothing may keep a process that was told to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for stream, line in ((sys.stdout, None), (sys.stderr, message)):
        with suppress(OSError, ValueError):  # closed, or its reader has gone
            if line is not None:
                print(line, file=stream)
            stream.flush()
    os._exit(code)
