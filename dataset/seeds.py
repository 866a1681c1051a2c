"""Where everything random of an epoch comes from."""

import threading
import zlib
from collections.abc import Iterator
from functools import cache

import numpy

#: The stream that decides the order of an epoch's images, and their crops and flips where images are in memory.
ORDER = "order"
#: torch's random numbers in single precision are multiples of a share of this.
SHARES = 2**24


def epoch_seed(seed: int, epoch: int, *numbers: int, stream: str = ORDER) -> int:
    """The seed of one kind of random numbers in an epoch, or in a part of it that `numbers` name, in 0..2^32 - 1.

    A resumed run needs no generator's state for that. Different `stream`s, and different `numbers` within one, have
    independent seeds: `(s, e)`, `(s, e, 0)` and `(s, e, 0, 0)` too.
    """
    if stream == ORDER and not numbers:
        return int(numpy.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    # numpy pads short sequences with zeros; a spawn key comes after the padding.
    key = (zlib.crc32(stream.encode()), len(numbers))
    return int(numpy.random.SeedSequence((seed, epoch, *numbers), spawn_key=key).generate_state(1)[0])


def torch_numbers(seed: int, count: int) -> Iterator[int]:
    """The first `count` numbers, of 32 bits, of torch's generator on the CPU that is seeded so.

    `torch.randint(n, ())` is such a number modulo n. Without torch, which worker processes do not load; and several
    times as fast where few numbers of many seeds are needed.
    """
    generator = _generator(threading.get_ident())
    generator.seed(seed)
    return iter(numpy.frombuffer(generator.bytes(4 * count), "<u4").tolist())


@cache
def _generator(thread: int) -> numpy.random.RandomState:
    """A thread's generator, to be seeded for each use: a new one takes ten times as long."""
    return numpy.random.RandomState(0)


def share(number: int) -> float:
    """What `torch.rand(())` makes of one of `torch_numbers`: from 0 to below 1, in single precision."""
    return (number % SHARES) / SHARES
