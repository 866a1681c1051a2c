"""What tells whether a data set is still the one that a run has begun with."""

import hashlib
import json
from collections.abc import Mapping

from dataset.images import ImageData, Images
from dataset.streaming import StreamedImages

#: Number of streamed images, evenly spread, whose file sizes are read; names and classes are read of all.
MOST_SIZES = 100_000


def data_digest(data: ImageData) -> str:
    """A digest of both splits: of pixels and classes in memory; of names, classes and file sizes of streamed images.

    Where the folder is does not matter. To be called before a part is held out or moved to a device.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(data.classes).encode())
    for split in (data.train, data.test):
        digest.update(split.targets.cpu().numpy().tobytes())
        if isinstance(split, Images):
            digest.update(split.pixels.cpu().contiguous().numpy())
        else:
            _add_files(digest, split)
    return digest.hexdigest()


def _add_files(digest, split: StreamedImages) -> None:
    n = len(split.targets)
    step = -(-n // MOST_SIZES)
    for sample in range(n):
        digest.update(split.stamp(sample, with_size=sample % step == 0))


def data_identity(data: ImageData) -> dict:
    """What a run's record holds of its data: classes, numbers of images, digest, normalisation."""
    return {
        "classes": list(data.classes),
        "train_images": len(data.train.targets),
        "test_images": len(data.test.targets),
        "digest": data_digest(data),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def data_changes(recorded: Mapping, now: Mapping) -> list[str]:
    """What differs between two `data_identity`s, for a message; what a record of an older version lacks does not."""
    changes = []
    before, after = recorded.get("classes", now["classes"]), now["classes"]
    if before != after:
        gone, new = (sorted(set(one) - set(other))[:3] for one, other in ((before, after), (after, before)))
        changes.append(f"its classes (gone: {', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'})")
    for name, title in (("train_images", "training images"), ("test_images", "test images")):
        if recorded.get(name, now[name]) != now[name]:
            changes.append(f"the number of its {title} ({recorded[name]} -> {now[name]})")
    if not changes and recorded.get("digest", now["digest"]) != now["digest"]:
        changes.append("its images (other names, sizes or pixels)")
    return changes
