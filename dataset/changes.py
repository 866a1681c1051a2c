"""Changes of training images besides crops and flips: torchvision's policies, colour jitter, random erasing."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

import dataset.policies as policies
from dataset.policies import Numbers, Step
from dataset.seeds import epoch_seed, torch_numbers


def _unchanged(numbers: Numbers, height: int, width: int, own: str) -> Iterator[Step]:
    yield from ()


#: What `--augment` names -> what draws an image's operations, of an image's random numbers, its height and width, and
#: the name of AutoAugment's policy for the data set. Without the data set's own crops and flips where it is `none`.
POLICIES: dict[str, Callable[[Numbers, int, int, str], Iterator[Step]]] = {
    "standard": _unchanged,
    "none": _unchanged,
    "randaugment": policies.randaugment,
    "trivialaugment": policies.trivialaugment,
    "autoaugment": policies.autoaugment,
}


class Changes(NamedTuple):
    """What is done to every image of an epoch when it has been read; all of it depends on (seed, epoch, key) alone.

    RandAugment (Cubuk et al., NeurIPS 2020), TrivialAugment (Mueller & Hutter, ICCV 2021) and AutoAugment (Cubuk et
    al., CVPR 2019) are torchvision's with its defaults. Colour jitter scales brightness, contrast and saturation by
    factors within 1 +- `colour_jitter`; an image is erased in part with the probability `random_erasing` (Zhong et al.,
    AAAI 2020), by `colour`.
    """

    policy: str
    own_policy: str  # AutoAugment's for the data set: imagenet, cifar10 or svhn
    colour_jitter: float
    random_erasing: float
    colour: tuple[int, ...]
    seed: int = 0
    epoch: int = 0

    def of(self, pixels: Tensor, key: int) -> Tensor:
        """An image's bytes (3, H, W) on the CPU -> its changed bytes; the key is its sample, or where it is shown."""
        return self.of_batch(pixels[None], [key])[0]

    def of_array(self, pixels: numpy.ndarray, key: int) -> numpy.ndarray:
        """The same for an array."""
        return self.of(torch.tensor(pixels), key).numpy()

    def of_batch(self, pixels: Tensor, keys: list[int]) -> Tensor:
        """Bytes (B, 3, H, W) on any device -> the changed bytes there; the work is done on the CPU."""
        # In one layout, so that the same numbers come from a disk and from memory.
        held = pixels.cpu().contiguous()
        return policies.apply(held, [self.draw(key, *pixels.shape[2:]) for key in keys]).to(pixels.device)

    def draw(self, key: int, height: int, width: int) -> list[Step]:
        """The operations of an image, in their order."""
        numbers = torch_numbers(epoch_seed(self.seed, self.epoch, key, stream="changes"), policies.NUMBERS)
        steps = list(POLICIES[self.policy](numbers, height, width, self.own_policy))
        if self.colour_jitter:
            steps += policies.jitter(numbers, self.colour_jitter)
        if self.random_erasing:
            steps += policies.erasing(numbers, height, width, self.random_erasing, self.colour)
        return steps
