"""SIGTERM and SIGINT as requests: the step under way is finished, the run is saved, then it stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from errors import StoppedAtOnce
from helper.distributed import count_processes, largest

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds after which a run that has not come to save is stopped without, and how often it is looked at then.
GRACE, LOOK = 2.0, 0.2


class StopRequest:
    """Within its block, `signal_number` holds the first of `SIGNALS` that came; a second one interrupts at once.

    So does the time, `GRACE` seconds later, where the run hangs (in a read from a disk that does not answer, say) or
    tests. In a block of `finishing` it may take its time, and where several processes train a second signal is ignored:
    a signal may reach one of them twice, and torchrun ends those that hang.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._before: dict = {}
        self._finishing = 0

    def _note(self, number: int, frame) -> None:
        if self.signal_number is None:
            self.signal_number = number
            signal.setitimer(signal.ITIMER_REAL, GRACE, LOOK)
        elif count_processes() == 1:
            raise StoppedAtOnce(self.signal_number, "interrupted again, so nothing more is saved")

    def _grace_is_over(self, number: int, frame) -> None:
        if self.signal_number is not None and not self._finishing:
            self._disarm()
            raise StoppedAtOnce(self.signal_number, f"no step ended within {GRACE:.0f} s, so nothing more is saved")

    def _disarm(self) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A step or a save that is to be finished, however long it takes, once it has begun."""
        self._finishing += 1
        try:
            yield
        finally:
            self._finishing -= 1

    def heard_by_any(self) -> int | None:
        """The signal that any process has received; all of them ask together, and so stop at the same step.

        Whoever is told of one saves and stops.
        """
        self.signal_number = largest(self.signal_number or 0) or None
        if self.signal_number is not None:
            self._disarm()
        return self.signal_number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._grace_is_over)
        return self

    def __exit__(self, *exception) -> None:
        self._disarm()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
