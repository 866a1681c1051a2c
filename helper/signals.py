"""SIGTERM and SIGINT as requests: the step under way is finished, the run is saved, then it stops."""

import signal
import threading

from helper.distributed import count_processes, largest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within its block, `signal_number` holds the first of `SIGNALS` that came; a second one interrupts at once.

    Not so where several processes train: a signal may reach one of them twice, and torchrun ends those that hang.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._before: dict = {}

    def _note(self, number, frame) -> None:
        if self.signal_number is not None:
            if count_processes() > 1:
                return
            raise KeyboardInterrupt
        self.signal_number = number

    def heard_by_any(self) -> int | None:
        """The signal that any process has received; all of them ask together, and so stop at the same step."""
        self.signal_number = largest(self.signal_number or 0) or None
        return self.signal_number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
