"""The processes of a training: joining, their devices, agreeing, stopping after the same step, ending together.

Several, which train one student together, are started by torchrun. Without it there is one, which agrees with itself.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from errors import Stopped, StoppedAtOnce, UserError, first_line
from models.synchronised import average, count_processes, is_synchronised

#: Where processes tell each other that one of them has failed.
FAILURES = "failures"
#: What asks a run to stop.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds after which a run that has not come to save is stopped without, and how often it is looked at then.
GRACE, LOOK = 2.0, 0.2
#: How far the sums of a buffer may be apart in two processes, as a share of its size: devices may add in any order.
ALIKE = 1e-4


@contextmanager
def joined() -> Iterator[None]:
    """Within this block the processes that torchrun started belong together; a failure of one ends all of them.

    Of those that fail alike one says why, the others end silently with the same exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, world_size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps one store over its restarts, where the addresses of processes that have gone would be found.
        # Agents of several machines may count differently; docs/distributed.md says what to set there.
        store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    distributed.init_process_group(store=store, rank=number, world_size=world_size)
    try:
        yield
    except Stopped as stop:
        distributed.destroy_process_group()
        if number == 0:
            raise
        sys.exit(128 + stop.signal_number)
    except Exception as error:
        first = _is_first(store)
        reason = _one_line(error)
        if reason is None:
            raise
        if first:
            raise reason from None
        sys.exit(2)  # without leaving the group, which may wait for those that have gone
    distributed.destroy_process_group()


def _is_first(store: Any) -> bool:
    """Whether no other process has failed before; True where the process that would know has ended."""
    try:
        return store.add(FAILURES, 1) == 1
    except RuntimeError:
        return True


def _one_line(error: Exception) -> UserError | None:
    """What the terminal is told where that is one line; None for a mistake in the code."""
    if isinstance(error, UserError):
        return error
    lost = isinstance(error, (distributed.DistBackendError, distributed.DistNetworkError)) or "gloo" in str(error)
    if isinstance(error, RuntimeError) and lost:
        return UserError(
            "another process of this run has ended, so this one ends too; start all of them again with --resume"
        )
    return None


def rank() -> int:
    """This process's number among all, from 0."""
    return distributed.get_rank() if count_processes() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes the files and talks to the terminal."""
    return rank() == 0


def find_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA where it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # its random generator is the one that is saved
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).partition(". ")[0]  # torch adds advice to its developers
        raise UserError(f"--device: {name} cannot be used: {reason}") from None
    return device


def device_of(name: str) -> torch.device:
    """The device of `--device`; of several processes on one machine each takes the GPU of its own number."""
    if count_processes() == 1:
        return find_device(name)
    if ":" in name:
        raise UserError(f"--device: {name} is one device, but every process needs its own; give --device cuda")
    with_cuda = name in ("auto", "cuda") and torch.cuda.is_available()
    return find_device(f"cuda:{local_rank()}" if with_cuda else name)


def untested_on(device: torch.device) -> str:
    """A line where nobody has tried this system or this kind of device, else an empty text."""
    system = {"linux": "", "darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
    kind = "" if device.type in ("cpu", "cuda") else f"--device {device.type}"
    names = " and ".join(filter(None, (system, kind)))
    return f"warning: untested: {names}; supported is Linux, on CPUs and with CUDA" if names else ""


def choose_kernels(deterministic: bool) -> None:
    """Have torch take kernels that give the same numbers every time, where it has them; it warns where it has none."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product on a GPU
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def by_main(make: Callable[[], Any]) -> Any:
    """What `make()` gives in the main process, in every process, pickled; its `UserError` is raised everywhere."""
    if count_processes() == 1:
        return make()
    value, error = None, None
    if is_main():
        try:
            value = make()
        except (UserError, SystemExit) as caught:
            error = caught
    box = [(value, error)]
    distributed.broadcast_object_list(box, src=0)
    if not is_main():
        value, error = box[0]
    if error is not None:
        raise error
    return value


def main_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives in each process; the main one goes first, so that the others find what it downloads, and
    its `UserError` is raised everywhere."""
    made = []
    by_main(lambda: made.append(make()))
    return made[0] if made else make()


@contextmanager
def one_by_one_here() -> Iterator[None]:
    """On each machine its first process goes through the block before the others, which may find what it has made."""
    if count_processes() > 1 and local_rank() > 0:
        distributed.barrier()
    yield
    if count_processes() > 1 and local_rank() == 0:
        distributed.barrier()


def total_of(values: Sequence[Tensor | float]) -> list[float]:
    """The sums over all processes of some numbers."""
    numbers = [float(value) for value in values]
    if count_processes() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(sums)
    return sums.tolist()


def list_of_all(here: list) -> list:
    """The entries of every process's list, in the order of their ranks, pickled."""
    if count_processes() == 1:
        return here
    gathered: list = [None] * count_processes()
    distributed.all_gather_object(gathered, here)
    return [entry for of_process in gathered for entry in of_process]


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if count_processes() == 1:
        return number
    box = torch.tensor([number])  # on the CPU: nothing waits for an accelerator
    distributed.all_reduce(box, distributed.ReduceOp.MAX)
    return int(box)


class StopRequest:
    """SIGTERM and SIGINT as requests: the step under way is finished, the run is saved, then it stops.

    Within its block, `signal_number` holds the first of `SIGNALS` that came; a second one interrupts at once.

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


def average_statistics(module: nn.Module) -> None:
    """Give all processes the mean of their running statistics, of every BatchNorm that each has updated alone."""
    if count_processes() == 1:
        return
    updated = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and not is_synchronised(layer)
    ]
    both = [buffer for layer in updated for buffer in (layer.running_mean, layer.running_var)]
    buffers = [buffer for buffer in both if buffer is not None]
    if buffers:
        means = average(torch.cat([buffer.flatten() for buffer in buffers])).split([len(buffer) for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean)


def check_alike(method: nn.Module, distill: str) -> None:
    """Raise `UserError`, in all processes, where a buffer of a method is another in each, statistics apart, which have
    been averaged: a checkpoint would hold that of the main one."""
    buffers = {name: one for name, one in method.named_buffers() if one.is_floating_point()}
    if count_processes() == 1 or not buffers:
        return
    sums = [[each.sum(dtype=torch.float64).cpu() for each in (one, -one, one.abs())] for one in buffers.values()]
    extremes = torch.tensor(sums)
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    highest, minus_lowest, size = extremes.T
    for name in itertools.compress(buffers, (highest + minus_lowest > ALIKE * size).tolist()):
        raise UserError(
            f"--distill {distill}: its buffer {name} is another in each process, which updates it by its own images; "
            "update it by those of all (gather_rows in crd/processes.py), or train in one process"
        )


def images_per_pass(batch_size: int, parts: int) -> int:
    """How many images of a whole batch a process computes at once; raises `UserError` where they do not divide."""
    processes = count_processes()
    images, rest = divmod(batch_size, processes * parts)
    if rest:
        raise UserError(
            f"--batch_size: {batch_size} is the global batch size, it cannot be divided by {processes} "
            f"processes x --accumulate {parts}; try {max(images, 1) * processes * parts}"
        )
    return images


class Replica:
    """A method in training, called as replica(compute, ...) for its compute(...), which may be compiled; with several
    processes its gradients are the mean over all of them."""

    def __init__(self, method: nn.Module, uses_everything: bool):
        self._parallel: nn.parallel.DistributedDataParallel | None = None
        if count_processes() > 1:
            self._parallel = nn.parallel.DistributedDataParallel(
                _Detached(method),
                broadcast_buffers=False,  # statistics are averaged where they are used; banks are alike already
                init_sync=False,  # one seed, one checkpoint: weights are alike, and statistics would be lost
                find_unused_parameters=not uses_everything,
            )

    def __call__(self, compute: Callable, *arguments):
        return compute(*arguments) if self._parallel is None else self._parallel(compute, *arguments)

    def close(self) -> None:
        """Free DDP, after training and before the processes leave their group.

        Were it the last to hold the group, it would wait for gloo's threads, which wait for Python's lock to free their
        last tensors, which DDP holds meanwhile.
        """
        self._parallel = None

    def only_adding(self, only: bool) -> AbstractContextManager:
        """Within this block gradients are accumulated in this process and not exchanged, if `only`."""
        return self._parallel.no_sync() if only and self._parallel is not None else nullcontext()


class _Detached(nn.Module):
    """A method whose logits are for reading only: DDP takes every output for something that is differentiated."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, compute: Callable, *arguments):
        logits, losses = compute(*arguments)
        return (None if logits is None else logits.detach()), losses
