"""The one exception that is meant for the person at the terminal."""

import sys


class UserError(Exception):
    """A mistake in flags, files or data.

    The message names the flag or file and says what to do. It is always one line: `run_script` prints it without a
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def run_script(main):
    """Run `main()` as a script: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
