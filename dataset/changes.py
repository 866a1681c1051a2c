"""Changes of training images besides crops and flips: torchvision's policies, colour jitter, random erasing."""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

from dataset.seeds import epoch_seed


def v2() -> ModuleType:
    """torchvision's transforms, which take a second to import and are not needed by most runs."""
    from torchvision.transforms import v2

    return v2


#: What `--augment` names -> the transform of an image's bytes, for a data set whose own AutoAugment policy is given.
#: Without the data set's own crops and flips where it is `none`.
POLICIES: dict[str, Callable[[str], list[nn.Module]]] = {
    "standard": lambda own: [],
    "none": lambda own: [],
    "randaugment": lambda own: [v2().RandAugment()],
    "trivialaugment": lambda own: [v2().TrivialAugmentWide()],
    "autoaugment": lambda own: [v2().AutoAugment(v2().AutoAugmentPolicy(own))],
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
        """The same for bytes (H, W, 3), as decoders give them."""
        changed = self.of(torch.tensor(pixels).permute(2, 0, 1), key)
        return changed.permute(1, 2, 0).numpy()

    def of_batch(self, pixels: Tensor, keys: list[int]) -> Tensor:
        """Bytes (B, 3, H, W) on any device -> the changed bytes there; the work is done on the CPU, image by image."""
        change, changed = _transform(self._replace(seed=0, epoch=0)), []
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            for image, key in zip(pixels.cpu(), keys, strict=True):
                torch.default_generator.manual_seed(epoch_seed(self.seed, self.epoch, key, stream="changes"))
                # In one layout, so that the same numbers come from a disk and from memory.
                changed.append(change(image.contiguous()))
        return torch.stack(changed).to(pixels.device)


@cache
def _transform(changes: Changes) -> nn.Module:
    steps = POLICIES[changes.policy](changes.own_policy)
    if changes.colour_jitter:
        steps.append(v2().ColorJitter(*[changes.colour_jitter] * 3))
    if changes.random_erasing:
        steps.append(v2().RandomErasing(changes.random_erasing, value=list(map(float, changes.colour))))
    return nn.Sequential(*steps)
