"""SIGTERM and SIGINT as requests: the step under way is finished, the run is saved, then it stops."""

import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within its block, `signal_number` holds the first of `SIGNALS` that came; a second one interrupts at once."""

    def __init__(self):
        self.signal_number: int | None = None
        self._before: dict = {}

    def _note(self, number, frame) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
