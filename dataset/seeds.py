"""Where everything random of an epoch comes from."""

import zlib

import numpy

#: The stream that decides the order of an epoch's images, and their crops and flips where images are in memory.
ORDER = "order"


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
