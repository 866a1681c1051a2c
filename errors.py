"""The one exception that is meant for the person at the terminal."""

import sys


class UserError(Exception):
    """A mistake in flags, files or data.

    The message names the flag or file and says what to do. It is always one line: `run_script` prints it without a
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Stopped(Exception):
    """A run that was asked to stop by a signal, and has saved what is needed to go on."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def run_script(main):
    """Run `main()` as a script.

    A `UserError` becomes one line on stderr and exit code 2; a run that was stopped by a signal exits with 128 + its
    number, as shells and clusters expect (SIGINT 130, SIGTERM 143).
    """
    try:
        main()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
