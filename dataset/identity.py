"""What tells whether a data set is still the one that a run has begun with."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from dataset.images import ImageData, Images
from dataset.streaming import StreamedImages

#: Number of streamed images, evenly spread, whose file sizes are read; names and classes are read of all.
MOST_SIZES = 100_000


def data_digest(data: ImageData) -> str:
    """A digest of both splits: of pixels and classes in memory; of names, classes and file sizes of streamed images.

    Where the folder is does not matter. To be called before a part is held out or moved to a device.
    """
    return _digest_of(data.classes, data.train, data.test)


def _digest_of(classes: Sequence[str], *splits: Images | StreamedImages) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(classes)).encode())
    for split in splits:
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
    """What a run's record holds of its data: classes, numbers of images, digest, normalisation; of images that may be
    held in memory or streamed, as there is room, also the digest of their files."""
    digest, of_files = data_digest(data), {}
    if data.train_files is not None and data.test_files is not None:
        is_streamed = data.train is data.train_files and data.test is data.test_files
        of_files["files_digest"] = (
            digest if is_streamed else _digest_of(data.classes, data.train_files, data.test_files)
        )
    return {
        "classes": list(data.classes),
        "train_images": len(data.train.targets),
        "test_images": len(data.test.targets),
        "digest": digest,
        "mean": list(data.mean),
        "std": list(data.std),
        **of_files,
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
    # Of images that were in memory and are streamed now, or were streamed, only the files can be compared.
    was, is_now = (identity.get("digest") == identity.get("files_digest") for identity in (recorded, now))
    compared = "files_digest" if was != is_now and {"files_digest"} <= recorded.keys() & now.keys() else "digest"
    if not changes and recorded.get(compared, now[compared]) != now[compared]:
        changes.append("its images (other names, sizes or pixels)")
    return changes
